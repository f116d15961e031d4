"""The plots of one operation: bars of all candidates."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from benchmarks.columns import times
from benchmarks.contests import Contest
from benchmarks.report.drawing import Paint, milliseconds, tip
from benchmarks.report.roofline import describe
from benchmarks.results import Row
from evaclip.report.theme import PALETTE

LINE = 0.2
"""Height in inches of one bar with its gap."""
_CLIP = 3.0
"""Bars end here: 3 times the time of plain PyTorch. What is slower gets a mark and its number."""
_RIGHT = 4.7
_TITLE_LINES = 1.35


def bar_lines(panel: Sequence[Contest]) -> float:
    """How many lines `draw_bars` takes."""
    return sum(len(contest.rows) + _TITLE_LINES for contest in panel)


def draw_bars(axes: Axes, panel: Sequence[Contest], paint: Paint) -> None:
    """One bar a candidate, shape by shape; its length is the time relative to plain PyTorch.

    A thin line spans p20 to p80. Where plain PyTorch failed, times are relative to the fastest candidate.
    """
    y = 0.0
    ticks: list[tuple[float, str]] = []
    for contest in panel:
        axes.text(0, y + 0.3, contest.shape, fontweight="bold", va="center", clip_on=False)
        y += _TITLE_LINES
        unit = (contest.eager.median_ms if contest.eager else contest.fastest_ms) or 1.0
        ends = (y - 0.5, y + len(contest.rows) - 0.5)
        axes.plot([1, 1], ends, color=PALETTE.muted, linewidth=1.0, dashes=(3, 2), zorder=0)
        for row in contest.rows:
            _draw_bar(axes, y, contest, row, unit, paint)
            ticks.append((y, row.candidate))
            y += 1
    axes.set_xlim(0, _RIGHT)
    axes.set_ylim(y - 0.3, -0.4)
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks])
    axes.tick_params(axis="y", labelcolor=PALETTE.ink)
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_bar(axes: Axes, y: float, contest: Contest, row: Row, unit: float, paint: Paint) -> None:
    median = row.median_ms
    if row.failure is not None or median is None:
        axes.text(
            0.05, y, row.mark or "failed", color=PALETTE.chance, va="center", gid=tip(f"{row.candidate}: {row.failure}")
        )
        return
    length = median / unit
    bar = axes.barh(y, min(length, _CLIP), height=0.68, color=paint[row.candidate])[0]
    bar.set_gid(tip(describe(contest, row)))
    ends = [(row.quantile_ms(share) or 0.0) / unit for share in (0.2, 0.8)]
    if length > _CLIP:
        axes.plot([_CLIP - 0.13, _CLIP - 0.07], [y + 0.42, y - 0.42], color=PALETTE.paper, linewidth=2.5)
    elif ends[1] < _CLIP:
        axes.plot(ends, [y, y], color=PALETTE.ink, linewidth=0.9, solid_capstyle="butt")
    _write_value(axes, max(min(length, _CLIP), min(ends[1], _CLIP)), y, contest, row)


def _write_value(axes: Axes, x: float, y: float, contest: Contest, row: Row) -> None:
    value = axes.annotate(
        milliseconds(row.median_ms or 0.0),
        (x, y),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        bbox={"facecolor": PALETTE.paper, "edgecolor": "none", "pad": 0.6},  # hides the dashed line
        fontweight="bold" if row.median_ms == contest.fastest_ms else "normal",
    )
    speedup = contest.speedup(row)
    if speedup is not None and row.kind != "baseline":
        axes.annotate(
            times(speedup),
            (1, 0.5),
            xycoords=value,
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=7.5,
            color=PALETTE.muted,
        )
