"""The bars of one operation: all candidates, shape by shape."""

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.columns import significant, times
from benchmarks.contests import Contest
from benchmarks.report.drawing import COLOURS, LOOK, bare
from benchmarks.results import Row
from evaclip.report.theme import PALETTE

_LINE = 0.2
"""Height in inches of one bar with its gap."""
_CLIP, _RIGHT = 3.0, 4.7
"""Bars end at 3 times the time of plain PyTorch, their numbers to the right of them."""
_TITLE_LINES = 1.35


def bars(panel: Sequence[Contest]) -> Figure:
    """One bar a candidate; its length is the time relative to plain PyTorch.

    A thin line spans p20 to p80. Where plain PyTorch failed, times are relative to the fastest candidate.
    """
    lines = sum(len(contest.rows) + _TITLE_LINES for contest in panel)
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=(4.7, 0.2 + _LINE * lines), layout="constrained")
        _draw(figure.subplots(), panel)
    return figure


def _draw(axes: Axes, panel: Sequence[Contest]) -> None:
    y = 0.0
    ticks: list[tuple[float, str]] = []
    for contest in panel:
        axes.text(0, y + 0.3, contest.shape, fontweight="bold", va="center", clip_on=False)
        y += _TITLE_LINES
        unit = (contest.eager.median_ms if contest.eager else contest.fastest_ms) or 1.0
        ends = (y - 0.5, y + len(contest.rows) - 0.5)
        axes.plot([1, 1], ends, color=PALETTE.muted, linewidth=1.0, dashes=(3, 2), zorder=0)
        for row in contest.rows:
            _draw_bar(axes, y, contest, row, unit)
            ticks.append((y, row.candidate))
            y += 1
    axes.set_xlim(0, _RIGHT)
    axes.set_ylim(y - 0.3, -0.4)
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.tick_params(axis="y", labelcolor=PALETTE.ink)
    bare(axes)


def _draw_bar(axes: Axes, y: float, contest: Contest, row: Row, unit: float) -> None:
    median = row.median_ms
    if row.failure is not None or median is None:
        axes.text(0.05, y, row.mark or "failed", color=PALETTE.chance, va="center")
        return
    length = min(median / unit, _CLIP)
    axes.barh(y, length, height=0.68, color=COLOURS[row.kind])
    ends = [min((row.quantile_ms(share) or 0.0) / unit, _CLIP) for share in (0.2, 0.8)]
    axes.plot(ends, [y, y], color=PALETTE.ink, linewidth=0.9, solid_capstyle="butt")
    speedup = contest.speedup(row)
    more = "" if speedup is None or row.kind == "baseline" else f", {times(speedup)}"
    axes.annotate(
        f"{significant(median)} ms{more}",
        (max(length, ends[1]), y),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        bbox={"facecolor": PALETTE.paper, "edgecolor": "none", "pad": 0.6},  # hides the dashed line
        fontweight="bold" if median == contest.fastest_ms else "normal",
    )
