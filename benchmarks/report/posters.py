"""The same plots as PNG files, for a README."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from benchmarks.columns import significant
from benchmarks.contests import contests, panels
from benchmarks.report.charts import LINE, bar_lines, draw_bars, draw_sweep, quantities, sweeps
from benchmarks.report.drawing import LOOK, MARKERS, Paint
from benchmarks.report.roofline import STRIP, draw_roofline, draw_shares, draw_speedups, strip_lines
from benchmarks.results import Machine, Results, Row
from evaclip.report.theme import PALETTE

_WIDTH, _DPI = 11.0, 150


def write_roofline(results: Results, paint: Paint, path: Path) -> None:
    """The roofline with all operations, and the strips of speed-ups and shares of the roofline."""
    found = contests(results.rows)
    with_products = any(contest.intensity and contest.measured for contest in found)
    heights = [4.6] * with_products + [0.7 + STRIP * 0.85 * len(strip_lines(found))]
    with mpl.rc_context(LOOK):
        figure = _figure(sum(heights) + 1.3, "evakernels", results.machine)
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        if with_products:
            draw_roofline(parts[0].subplots(), found, results.machine, paint)
        left, right = parts[-1].subplots(1, 2)
        draw_speedups(left, found, paint)
        draw_shares(right, found, paint)
        right.set_yticklabels([])
        _legend(figure, results.rows, paint)
        _save(figure, path)


def write_op(results: Results, op: str, paint: Paint, path: Path) -> None:
    """Bars of all candidates, and time and memory against the size where shapes differ in one size only."""
    rows = [row for row in results.rows if row.op == op]
    bars = list(panels(contests(rows)).items())
    lines = sweeps(rows)
    pairs = [bars[index : index + 2] for index in range(0, len(bars), 2)]
    heights = [0.5 + LINE * max(bar_lines(panel) for _, panel in pair) for pair in pairs] + [2.5] * len(lines)
    with mpl.rc_context(LOOK):
        figure = _figure(sum(heights) + 1.3, op, results.machine)
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for part, pair in zip(parts, pairs, strict=False):
            for axes, ((_, mode, dtype), panel) in zip(_columns(part, 2, len(pair)), pair, strict=True):
                axes.set_title(f"{mode}, {dtype}", loc="left", fontweight="bold")
                draw_bars(axes, panel, paint)
        for part, sweep in zip(parts[len(pairs) :], lines, strict=True):
            part.suptitle(sweep.title, x=0.01, ha="left", fontweight="bold", fontsize=9)
            shown = quantities(sweep)
            for axes, quantity in zip(_columns(part, 3, len(shown)), shown, strict=True):
                draw_sweep(axes, sweep, quantity, paint)
        _legend(figure, rows, paint)
        _save(figure, path)


def _columns(part: SubFigure, count: int, used: int) -> list[Axes]:
    """The first `used` of so many axes side by side; the others keep their place empty."""
    axes: list[Axes] = list(part.subplots(1, count, squeeze=False)[0])
    for unused in axes[used:]:
        unused.set_axis_off()
    return axes[:used]


def _figure(height: float, title: str, machine: Machine) -> Figure:
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor=PALETTE.paper, layout="constrained")
    FigureCanvasAgg(figure)
    rates = ", ".join(f"{dtype} {significant(rate)} TFLOP/s" for dtype, rate in machine.matmul_tflops.items())
    about = f"{machine.name}, {machine.threads} threads, copy {significant(machine.copy_gbps)} GB/s, {rates}"
    figure.suptitle(f"{title}   {about}   {machine.date[:10]}", x=0.01, ha="left", fontsize=10)
    return figure


def _legend(figure: Figure, rows: Sequence[Row], paint: Paint) -> None:
    shown = {row.candidate for row in rows}
    names = [name for name in paint.names if name in shown]
    handles = [Line2D([], [], color=paint[name], marker="o", linestyle="", label=name) for name in names]
    for dtype in dict.fromkeys(row.dtype for row in rows):
        marker = MARKERS.get(dtype, "o")
        handles.append(Line2D([], [], color=PALETTE.muted, marker=marker, linestyle="", label=dtype))
    figure.legend(handles=handles, loc="outside lower left", ncols=8, frameon=False)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png")
