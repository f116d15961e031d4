"""The roofline and the strips as a PNG file, for a README."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.columns import significant
from benchmarks.contests import contests
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
        figure = _figure(sum(heights) + 1.3, results.machine)
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        if with_products:
            draw_roofline(parts[0].subplots(), found, results.machine, paint)
        left, right = parts[-1].subplots(1, 2)
        draw_speedups(left, found, paint)
        draw_shares(right, found, paint)
        right.set_yticklabels([])
        _legend(figure, results.rows, paint)
        figure.savefig(path, format="png")


def _figure(height: float, machine: Machine) -> Figure:
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, facecolor=PALETTE.paper, layout="constrained")
    FigureCanvasAgg(figure)
    rates = ", ".join(f"{dtype} {significant(rate)} TFLOP/s" for dtype, rate in machine.matmul_tflops.items())
    about = f"{machine.name}, {machine.threads} threads, copy {significant(machine.copy_gbps)} GB/s, {rates}"
    figure.suptitle(f"evakernels   {about}   {machine.date[:10]}", x=0.01, ha="left", fontsize=10)
    return figure


def _legend(figure: Figure, rows: Sequence[Row], paint: Paint) -> None:
    shown = {row.candidate for row in rows}
    names = [name for name in paint.names if name in shown]
    handles = [Line2D([], [], color=paint[name], marker="o", linestyle="", label=name) for name in names]
    for dtype in dict.fromkeys(row.dtype for row in rows):
        marker = MARKERS.get(dtype, "o")
        handles.append(Line2D([], [], color=PALETTE.muted, marker=marker, linestyle="", label=dtype))
    figure.legend(handles=handles, loc="outside lower left", ncols=8, frameon=False)
