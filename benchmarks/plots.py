"""Two pictures of a result: every op under the roofline, and the speedups of an operation."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.render import significant, times
from benchmarks.results import Contest, Machine, Results, Row, contests, grouped
from evaclip.report.theme import PALETTE, STYLE

LOOK: Any = {**STYLE, "font.size": 8.5}
COLOURS = {"ours": PALETTE.accent, "baseline": PALETTE.muted, "peer": "#b0609a", "quantized": PALETTE.accent_soft}
"""By kind of candidate, on light and on dark pages."""
_NAMES = {"ours": "evakernels", "baseline": "torch eager", "peer": "the fastest peer"}
_HEIGHTS = {"ours": -0.24, "baseline": 0.0, "peer": 0.24}
_TITLES = {"forward": "inference", "training": "training step"}
_LINE, _DPI = 0.36, 150  # inches of a line, dots of an inch


def draw_roofline(results: Results) -> Figure | None:
    """Roofline, and each op against plain PyTorch and against this machine; None if nothing was measured.

    Each case has this library's fastest backend, plain PyTorch and the fastest peer. The roofline has operations with
    matmuls only; below it each line is an operation and mode, each dot a shape and dtype.
    """
    found = [contest for contest in contests(results.rows) if contest.measured]
    if not found:
        return None
    products = [contest for contest in found if contest.intensity]
    lines = grouped(found, lambda contest: f"{contest.op}, {contest.mode}")
    heights = [4.6] * bool(products) + [0.8 + _LINE * len(lines)]
    with mpl.rc_context(LOOK):
        figure = _picture(results.machine, sum(heights) + 0.6, 11.0)
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        if products:
            _draw_roofs(parts[0].subplots(), products, results.machine)
        left, right = parts[-1].subplots(1, 2, sharey=True)
        _draw_strip(left, lines, Contest.speedup, "times as fast as torch eager", even=1)
        _draw_strip(right, lines, lambda _, row: row.roofline and 100 * row.roofline, "% of the roofline", even=100)
        right.set_xlim(left=0)
        left.set_xscale("log", base=2)
        _plain_numbers(left.xaxis)
        parts[-1].legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=len(_NAMES), frameon=False)
    return figure


def draw_speedups(results: Results, op: str) -> Figure | None:
    """Bars for each shape of an operation, a panel a mode; the baseline is the line at 1. None without a case."""
    found = [contest for contest in contests(results.rows) if contest.op == op and contest.fastest("baseline")]
    panels = {mode: [contest for contest in found if contest.mode == mode] for mode in _TITLES}
    panels = {mode: panel for mode, panel in panels.items() if panel}
    if not panels:
        return None
    with mpl.rc_context(LOOK):
        figure = _picture(results.machine, 1.0 + _LINE * max(map(len, panels.values())), 9.0)
        for axes, (mode, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
            _draw_bars(axes, panel)
            axes.set_title(f"{op}, {_TITLES[mode]}, times as fast", loc="left", fontweight="bold")
    return figure


def _picture(machine: Machine, height: float, width: float) -> Figure:
    """An empty figure, in inches, that names its machine."""
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor=PALETTE.paper, layout="constrained")
    FigureCanvasAgg(figure)
    about = f"{machine.name}, {machine.threads} threads, {machine.date[:10]}"
    figure.suptitle(about, x=0.01, ha="left", fontsize=8, color=PALETTE.muted)
    return figure


def _draw_roofs(axes: Axes, found: Sequence[Contest], machine: Machine) -> None:
    """Achieved TFLOP/s over FLOPs a byte under this machine's roofs; a vertical line joins the candidates of a case.

    This library's dots have a colour for each operation, the others one for each kind.
    """
    axes.set_xscale("log")
    axes.set_yscale("log")
    slope = machine.copy_gbps / 1e3
    intensities = [contest.intensity or 0.0 for contest in found]
    ridges = [rate / slope for rate in machine.matmul_tflops.values()]
    left, right = min(intensities + ridges) / 3, max(intensities + ridges) * 3
    for (dtype, rate), style in zip(machine.matmul_tflops.items(), ("-", "--", ":"), strict=False):
        label = f"{dtype} {significant(rate)} TFLOP/s, copy {significant(machine.copy_gbps)} GB/s"
        places = [left, rate / slope, right]
        axes.plot(places, [min(x * slope, rate) for x in places], style, color=PALETTE.muted, label=label)
    for op, several in grouped(found, lambda contest: contest.op).items():
        colours = COLOURS | {"ours": axes.plot([], [], "o", label=op)[0].get_color()}
        for contest in several:
            x, rates = contest.intensity or 0.0, {row.kind: row.tflops or 0.0 for row in _best_rows(contest)}
            axes.vlines(x, min(rates.values()), max(rates.values()), color=PALETTE.line, linewidth=1.0, zorder=1)
            for kind, rate in rates.items():
                axes.plot(x, rate, "o", color=colours[kind], markersize=4.5)
    axes.set_xlim(left, right)
    axes.set_xlabel("FLOPs a byte")
    axes.set_ylabel("TFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        _plain_numbers(axis)
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


def _best_rows(contest: Contest) -> list[Row]:
    """Plain PyTorch, the best peer and this library's best, as far as they were measured; the most important last."""
    return [row for kind in ("baseline", "peer", "ours") if (row := contest.fastest(kind))]


def _draw_strip(
    axes: Axes,
    lines: Mapping[str, Sequence[Contest]],
    value: Callable[[Contest, Row], float | None],
    title: str,
    even: float,
) -> None:
    axes.axvline(even, color=PALETTE.muted, linewidth=1.2)
    for kind, name in _NAMES.items():
        dots = [
            (x, y + _HEIGHTS[kind])
            for y, several in enumerate(lines.values())
            for contest in several
            for row in _best_rows(contest)
            if row.kind == kind and (x := value(contest, row)) is not None
        ]
        axes.plot([x for x, _ in dots], [y for _, y in dots], "o", color=COLOURS[kind], label=name, markersize=4.5)
    axes.set_yticks(range(len(lines)), list(lines))
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.tick_params(axis="y", labelcolor=PALETTE.ink)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(title)
    axes.grid(axis="x", color=PALETTE.line, linewidth=0.6)
    axes.set_axisbelow(True)
    for y in range(1, len(lines)):
        axes.axhline(y - 0.5, color=PALETTE.line, linewidth=0.6)


def _draw_bars(axes: Axes, panel: Sequence[Contest]) -> None:
    """For each contest a bar a candidate, as long as its speedup over the baseline."""
    names = list(dict.fromkeys(row.candidate for contest in panel for row in contest.rows if row.kind != "baseline"))
    thickness = 0.8 / max(len(names), 1)
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
    axes.set_yticks(range(len(panel)), [f"{contest.shape}\n{contest.dtype}" for contest in panel])
    axes.invert_yaxis()
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _plain_numbers(axis: Any) -> None:
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:,.10g}")
