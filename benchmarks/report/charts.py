"""The plots of one operation: bars of all candidates, and time and memory against the size of the input."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from benchmarks.columns import times
from benchmarks.contests import Contest, contests
from benchmarks.report.drawing import Dot, Paint, draw_dots, grid, milliseconds, number_axis, tip
from benchmarks.report.roofline import describe
from benchmarks.results import Row
from benchmarks.shapes import Shape, parse_shape
from evaclip.errors import UserError
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


@dataclass(frozen=True)
class Sweep:
    """Contests that differ in one size only: `batch` or `tokens`.

    Attributes:
        title: what they have in common.
        size: the one that differs, a key of `Row.sizes`.
        contests: in the order of that size.
    """

    title: str
    size: str
    contests: tuple[Contest, ...]


@dataclass(frozen=True)
class Quantity:
    """What is drawn against a size."""

    title: str
    unit: str
    value: Callable[[Row], float | None]


TIME = Quantity("time", "ms", lambda row: row.median_ms)
PEAK = Quantity("peak memory", "MiB", lambda row: None if row.peak_bytes is None else row.peak_bytes / 2**20)
SAVED = Quantity("saved for backward", "MiB", lambda row: None if row.saved_bytes is None else row.saved_bytes / 2**20)


def sweeps(rows: Sequence[Row]) -> list[Sweep]:
    """All sweeps of at least two sizes among the rows of one operation."""
    groups: dict[tuple[str, str], dict[int, Contest]] = {}
    for contest in contests(rows):
        shape = _shape(contest)
        if shape is None:
            continue
        tower = f"{shape.model}, {shape.tower}"
        where = f"{shape.name.split(' ')[0]}{f' drop{shape.drop}' if shape.drop else ''}"
        about = f"{contest.mode}, {contest.dtype}"
        groups.setdefault((f"{where}, {about}", "batch"), {})[shape.batch] = contest
        groups.setdefault((f"{tower} b{shape.batch}, {about}", "tokens"), {})[shape.tokens] = contest
    return [
        Sweep(title, size, tuple(contest for _, contest in sorted(group.items())))
        for (title, size), group in groups.items()
        if len(group) > 1
    ]


def _shape(contest: Contest) -> Shape | None:
    """The shape that the name stands for; a result of another version may know names that this one doesn't."""
    try:
        return parse_shape(contest.shape)
    except UserError:
        return None


def quantities(sweep: Sweep) -> list[Quantity]:
    """What the rows of a sweep have values for."""
    rows = [row for contest in sweep.contests for row in contest.measured]
    return [quantity for quantity in (TIME, PEAK, SAVED) if any(quantity.value(row) is not None for row in rows)]


def draw_sweep(axes: Axes, sweep: Sweep, quantity: Quantity, paint: Paint) -> None:
    """A line for each candidate; time on logarithmic axes, memory on linear ones that start at zero."""
    lines: dict[str, list[Dot]] = {}
    for contest in sweep.contests:
        for row in contest.measured:
            value = quantity.value(row)
            if value is not None:
                lines.setdefault(row.candidate, []).append((row.sizes[sweep.size], value, describe(contest, row)))
    for candidate, dots in lines.items():
        x, y, _ = zip(*dots, strict=True)
        axes.plot(x, y, color=paint[candidate], linewidth=1.6)
        draw_dots(axes, dots, color=paint[candidate], markersize=5.5)
    if quantity is TIME:
        axes.set_xscale("log")
        axes.set_yscale("log")
        number_axis(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)
    number_axis(axes.xaxis, sorted({x for dots in lines.values() for x, *_ in dots}))
    axes.set_xlabel(sweep.size)
    axes.set_ylabel(f"{quantity.title}, {quantity.unit}")
    grid(axes, "y")
