"""Every operation against the machine: the roofline, and strips of speed-ups and of shares of the roofline."""

from collections.abc import Callable, Mapping, Sequence
from math import atan2, degrees

import numpy as np
from matplotlib.axes import Axes

from benchmarks.columns import percent, significant, times
from benchmarks.contests import Contest, grouped
from benchmarks.report.drawing import MARKERS, Paint, draw_dots, grid, milliseconds, number_axis
from benchmarks.report.labels import place_labels
from benchmarks.results import Machine, Row
from evaclip.report.theme import PALETTE

STRIP = 0.42
"""Height in inches of one line of a strip plot."""
_ANCHORS = 4
_HEIGHTS = {"ours": -0.24, "baseline": 0.0, "peer": 0.24}


def draw_roofline(axes: Axes, found: Sequence[Contest], machine: Machine, paint: Paint) -> None:
    """Achieved TFLOP/s over FLOPs a byte under this machine's roofs; a vertical line joins the candidates of a case.

    Only contests that have an intensity take part.
    """
    shown = [contest for contest in found if contest.intensity and contest.measured]
    axes.set_xscale("log")
    axes.set_yscale("log")
    _limit(axes, shown, machine)
    _draw_roofs(axes, machine)
    _draw_spans(axes, shown)
    _draw_rows(axes, [(*_point(contest, row), contest, row) for contest in shown for row in best_rows(contest)], paint)
    axes.set_xlabel("FLOPs a byte")
    axes.set_ylabel("TFLOP/s")
    number_axis(axes.xaxis)
    number_axis(axes.yaxis)
    points = [_point(contest, row) for contest in shown for row in best_rows(contest)]
    place_labels(axes, _anchors(shown), points + _roof_points(axes, machine))


def best_rows(contest: Contest) -> list[Row]:
    """Plain PyTorch, the best peer and this library's best, as far as they were measured; the most important last."""
    return [row for row in (contest.eager, contest.peer, contest.ours) if row is not None]


def _point(contest: Contest, row: Row) -> tuple[float, float]:
    return contest.intensity or 0.0, row.tflops or 0.0


def _anchors(shown: Sequence[Contest]) -> dict[str, list[tuple[float, float]]]:
    """This library's points by op, the highest first."""
    points: dict[str, list[tuple[float, float]]] = {}
    for contest in shown:
        points.setdefault(contest.op, []).extend(_point(contest, row) for row in best_rows(contest)[-1:])
    return {op: sorted(several, key=lambda point: -point[1])[:_ANCHORS] for op, several in points.items()}


def _limit(axes: Axes, shown: Sequence[Contest], machine: Machine) -> None:
    points = [_point(contest, row) for contest in shown for row in best_rows(contest)]
    ridges = [1e3 * rate / machine.copy_gbps for rate in machine.matmul_tflops.values()]
    x, y = [*(x for x, _ in points), *ridges], [y for _, y in points]
    axes.set_xlim(min(x) / 3, max(x) * 3)
    axes.set_ylim(min(y) / 1.8, max([*y, *machine.matmul_tflops.values()]) * 2.2)


def _draw_roofs(axes: Axes, machine: Machine) -> None:
    slope = machine.copy_gbps / 1e3
    left, right = axes.get_xlim()
    end = max(machine.matmul_tflops.values()) / slope
    axes.plot([left, end], [left * slope, end * slope], color=PALETTE.muted, linewidth=1.3)
    start = max(left, axes.get_ylim()[0] / slope) * 1.25
    axes.text(
        start,
        start * slope * 1.12,
        f"copy {significant(machine.copy_gbps)} GB/s",
        rotation=degrees(atan2(slope, 1)),
        rotation_mode="anchor",
        transform_rotates_text=True,
        color=PALETTE.muted,
        fontsize=7.5,
    )
    for rate in machine.matmul_tflops.values():
        axes.plot([rate / slope, right], [rate, rate], color=PALETTE.muted, linewidth=1.3)
    for dtypes in _near_rates(machine.matmul_tflops):
        rates = [machine.matmul_tflops[dtype] for dtype in dtypes]
        lines = [f"{dtype} {significant(rate)}" for dtype, rate in zip(dtypes, rates, strict=True)]
        place = (right * 1.06, sum(rates) / len(rates))
        axes.text(*place, "\n".join(lines), color=PALETTE.muted, fontsize=7.5, va="center")


def _near_rates(rates: Mapping[str, float]) -> list[list[str]]:
    """The dtypes, the fastest first; those whose labels would cover each other stand together."""
    groups: list[list[str]] = []
    for dtype in sorted(rates, key=lambda name: -rates[name]):
        if groups and rates[dtype] * 1.3 > rates[groups[-1][-1]]:
            groups[-1].append(dtype)
        else:
            groups.append([dtype])
    return groups


def _roof_points(axes: Axes, machine: Machine) -> list[tuple[float, float]]:
    """Points along the roofs, for labels to keep off."""
    slope, rates = machine.copy_gbps / 1e3, machine.matmul_tflops.values()
    places = np.geomspace(*axes.get_xlim(), 60)
    flat = [(x, rate) for rate in rates for x in places if x * slope > rate]
    return flat + [(x, x * slope) for x in places if x * slope < max(rates)]


def _draw_spans(axes: Axes, shown: Sequence[Contest]) -> None:
    rates = [[row.tflops or 0.0 for row in best_rows(contest)] for contest in shown]
    x = [contest.intensity or 0.0 for contest in shown]
    low, high = [min(several) for several in rates], [max(several) for several in rates]
    axes.vlines(x, low, high, color=PALETTE.line, linewidth=1.0, zorder=1)


Place = tuple[float, float, Contest, Row]


def _draw_rows(axes: Axes, places: Sequence[Place], paint: Paint) -> None:
    """A dot for each row: its colour is the candidate's, its form the dtype's, and it leads to the op's page."""
    groups = grouped(places, lambda place: (place[2].op, place[2].dtype, place[3].candidate))
    for (op, dtype, candidate), group in groups.items():
        ours = group[0][3].kind == "ours"
        draw_dots(
            axes,
            [(x, y, describe(contest, row)) for x, y, contest, row in group],
            color=paint[candidate],
            marker=MARKERS.get(dtype, "o"),
            markersize=5.5 if ours else 4.2,
            zorder=3 if ours else 2,
            url=page_name(op),
        )


def describe(contest: Contest, row: Row) -> str:
    """One row in words, for the text over a point."""
    facts = [milliseconds(row.median_ms or 0.0)]
    speedup = contest.speedup(row)
    if speedup is not None and row.kind != "baseline":
        facts.append(f"{times(speedup)} torch eager")
    if row.tflops is not None:
        facts.append(f"{significant(row.tflops)} TFLOP/s")
    if row.roofline is not None:
        facts.append(f"{percent(row.roofline)} of the roofline")
    return f"{contest.title}\n{row.candidate}: {', '.join(facts)}"


def page_name(op: str) -> str:
    """The file of an operation's page."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in op) + ".html"


def strip_lines(found: Sequence[Contest]) -> dict[str, list[Contest]]:
    """The contests by the line of a strip plot that they stand in: `op, mode`."""
    measured = (contest for contest in found if contest.measured)
    return grouped(measured, lambda contest: f"{contest.op}, {contest.mode}")


def draw_speedups(axes: Axes, found: Sequence[Contest], paint: Paint) -> None:
    """How much faster than plain PyTorch: this library's best and the best peer, a dot for each shape and dtype."""

    def speedup(contest: Contest, row: Row) -> float | None:
        return None if row.kind == "baseline" else contest.speedup(row)

    axes.set_xscale("log", base=2)
    axes.axvline(1, color=PALETTE.muted, linewidth=1.2)
    _draw_strip(axes, found, paint, speedup)
    low, high = axes.get_xlim()
    low, high = min(low, 0.45), max(high, 2.2)
    axes.set_xlim(low, high)
    number_axis(axes.xaxis, [2.0**power for power in range(-10, 11) if low <= 2.0**power <= high])
    axes.set_xlabel("times as fast as torch eager")


def draw_shares(axes: Axes, found: Sequence[Contest], paint: Paint) -> None:
    """Least possible time over measured time, a dot for each shape and dtype; 100 % is what this machine allows."""
    axes.axvline(100, color=PALETTE.muted, linewidth=1.2)
    _draw_strip(axes, found, paint, lambda contest, row: row.roofline and 100 * row.roofline)
    axes.set_xlim(0, max(105, axes.get_xlim()[1]))
    axes.set_xlabel("% of the roofline")


def _draw_strip(
    axes: Axes, found: Sequence[Contest], paint: Paint, value: Callable[[Contest, Row], float | None]
) -> None:
    lines = strip_lines(found)
    places: list[Place] = []
    for y, several in enumerate(lines.values()):
        pairs = [(contest, row) for contest in several for row in best_rows(contest)]
        values = [(value(*pair), *pair) for pair in pairs]
        places += [(x, y + _HEIGHTS[row.kind], contest, row) for x, contest, row in values if x is not None]
    _draw_rows(axes, places, paint)
    axes.set_yticks(range(len(lines)), list(lines))
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.tick_params(axis="y", labelcolor=PALETTE.ink)
    axes.spines["left"].set_visible(False)
    grid(axes, "x")
    for y in range(1, len(lines)):
        axes.axhline(y - 0.5, color=PALETTE.line, linewidth=0.6)
