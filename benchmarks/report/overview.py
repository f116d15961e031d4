"""One picture of a whole run: the roofline, and each operation against plain PyTorch and against this machine."""

from collections.abc import Callable, Mapping, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from benchmarks.columns import significant
from benchmarks.contests import Contest, contests, grouped
from benchmarks.report.drawing import COLOURS, LOOK, grid, number_axis, picture
from benchmarks.results import Machine, Results, Row
from evaclip.report.theme import PALETTE

ROOFLINE_FILE = "roofline.png"
_STRIP = 0.36
"""Height in inches of one line of a strip."""
_NAMES = {"ours": "evakernels", "baseline": "torch eager", "peer": "the fastest peer"}
_HEIGHTS = {"ours": -0.24, "baseline": 0.0, "peer": 0.24}


def overview(results: Results) -> Figure | None:
    """The picture; None if nothing was measured.

    Of each case it has this library's fastest backend, plain PyTorch and the fastest peer. The roofline is of
    operations with matrix products alone; below it each line is an operation and mode, each dot a shape and dtype.
    """
    found = [contest for contest in contests(results.rows) if contest.measured]
    if not found:
        return None
    products = [contest for contest in found if contest.intensity]
    lines = grouped(found, lambda contest: f"{contest.op}, {contest.mode}")
    heights = [4.6] * bool(products) + [0.8 + _STRIP * len(lines)]
    with mpl.rc_context(LOOK):
        figure = picture(results.machine, sum(heights) + 0.6)
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        if products:
            draw_roofline(parts[0].subplots(), products, results.machine)
        left, right = parts[-1].subplots(1, 2, sharey=True)
        _draw_strip(left, lines, Contest.speedup, "times as fast as torch eager", even=1)
        _draw_strip(right, lines, lambda _, row: row.roofline and 100 * row.roofline, "% of the roofline", even=100)
        right.set_xlim(left=0)
        left.set_xscale("log", base=2)
        number_axis(left.xaxis)
        parts[-1].legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=len(_NAMES), frameon=False)
    return figure


def best_rows(contest: Contest) -> list[Row]:
    """Plain PyTorch, the best peer and this library's best, as far as they were measured; the most important last."""
    return [row for row in (contest.eager, contest.peer, contest.ours) if row is not None]


def draw_roofline(axes: Axes, found: Sequence[Contest], machine: Machine) -> None:
    """Achieved TFLOP/s over FLOPs a byte under this machine's roofs; a vertical line joins the candidates of a case.

    This library's dots have a colour for each operation, the others those of their kind.
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
            x, rates = contest.intensity or 0.0, {row.kind: row.tflops or 0.0 for row in best_rows(contest)}
            axes.vlines(x, min(rates.values()), max(rates.values()), color=PALETTE.line, linewidth=1.0, zorder=1)
            for kind, rate in rates.items():
                axes.plot(x, rate, "o", color=colours[kind], markersize=4.5)
    axes.set_xlim(left, right)
    axes.set_xlabel("FLOPs a byte")
    axes.set_ylabel("TFLOP/s")
    for axis in (axes.xaxis, axes.yaxis):
        number_axis(axis)
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)


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
            for row in best_rows(contest)
            if row.kind == kind and (x := value(contest, row)) is not None
        ]
        axes.plot([x for x, _ in dots], [y for _, y in dots], "o", color=COLOURS[kind], label=name, markersize=4.5)
    axes.set_yticks(range(len(lines)), list(lines))
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.tick_params(axis="y", labelcolor=PALETTE.ink)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(title)
    grid(axes, "x")
    for y in range(1, len(lines)):
        axes.axhline(y - 0.5, color=PALETTE.line, linewidth=0.6)
