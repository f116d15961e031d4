"""One picture of whole models: how many times as fast each becomes, beside what its user could pick instead."""

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.columns import times
from benchmarks.contests import Contest, contests
from benchmarks.report.drawing import COLOURS, LOOK, bare, picture
from benchmarks.results import Results
from evaclip.report.theme import PALETTE

_TITLES = {"forward": "inference", "training": "training step"}
_WIDTH, _LINE = 9.0, 0.36


def speedups(results: Results, op: str) -> Figure | None:
    """Bars from 0, a pair for each model, one panel a mode; the untouched model is the line at 1. None without any."""
    found = [contest for contest in contests(results.rows) if contest.op == op and contest.eager]
    panels = {mode: [contest for contest in found if contest.mode == mode] for mode in _TITLES}
    panels = {mode: panel for mode, panel in panels.items() if panel}
    if not panels:
        return None
    with mpl.rc_context(LOOK):
        figure = picture(results.machine, 1.0 + _LINE * max(map(len, panels.values())), _WIDTH)
        for axes, (mode, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            _draw(axes, panel)
            axes.set_title(f"{_TITLES[mode]}, {panel[0].dtype}, times as fast", loc="left", fontweight="bold")
    return figure


def _draw(axes: Axes, panel: Sequence[Contest]) -> None:
    """For each contest a bar a candidate, as long as it is times as fast as the baseline."""
    names = [row.candidate for row in panel[0].rows if row.kind != "baseline"]
    thickness = 0.8 / len(names)
    for place, contest in enumerate(panel):
        for row in contest.measured:
            speedup = contest.speedup(row)
            if row.candidate not in names or speedup is None:
                continue
            y = place + (names.index(row.candidate) + 0.5) * thickness - 0.4
            axes.barh(y, speedup, height=0.92 * thickness, color=COLOURS[row.kind])
            text = f"{times(speedup)}  {row.candidate}" if place == 0 else times(speedup)
            axes.annotate(text, (speedup, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.axvline(1, color=PALETTE.muted, linewidth=1.0)
    axes.set_xlim(0, 1.6 * max(contest.speedup(row) or 0 for contest in panel for row in contest.measured))
    axes.set_yticks(range(len(panel)), [contest.shape for contest in panel])
    axes.invert_yaxis()
    bare(axes)
