"""The report's charts, as SVG: loss, accuracy against chance, and one small chart for each logged number."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from evaclip.report.run_data import Bar, BarGroup, LossCurve
from evaclip.report.theme import COLOURS, PALETTE, STYLE, themed_svg
from evaclip.runs.log import is_share

_ROW = 0.36  # height of one bar's row in inches: the chart grows with its rows
_TITLE_ROWS = 1.5  # a group's title, with some air above it
RUN_COLOURS: Mapping[str, str] = {
    "accent": PALETTE.accent,
    "chance": PALETTE.chance,
    "hit": PALETTE.hit,
    "run-4": "#8a3ab9",
    "run-5": "#b8860b",
    "run-6": "#0f8b8d",
}
"""Of the lines of a chart, in order, by the name of the CSS variable."""

Log = Sequence[Mapping[str, Any]]


def short_number(value: float) -> str:
    """1200000 -> '1.2M'."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class Series:
    """One line: `y` over the samples seen."""

    label: str
    x: list[int]
    y: list[float]


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        form: how its numbers are written.
        log: whether they are drawn on a logarithmic scale.
    """

    title: str
    series: tuple[Series, ...]
    form: Callable[[float], str]
    log: bool = False


def _share(value: float) -> str:
    return f"{100 * value:.3g} %"


@dataclass(frozen=True)
class _Kind:
    title: str
    keys: Mapping[str, str]
    form: Callable[[float], str] = short_number
    log: bool = False


_TOWERS = {"image tower": "{}_visual", "text tower": "{}_text"}


def _of_towers(key: str) -> dict[str, str]:
    return {label: form.format(key) for label, form in _TOWERS.items()}


_KINDS = (
    _Kind("Accuracy in the batch", {"": "accuracy"}, _share),
    _Kind("Learning rate", {**_of_towers("lr"), "the rest": "lr"}, "{:.2g}".format),
    _Kind("Temperature: the factor of the similarities", {"": "logit_scale"}),
    _Kind("Gradient norm", {"all": "grad_norm", **_of_towers("grad_norm")}, "{:.2g}".format, log=True),
    _Kind("Loss scale", {"": "loss_scale"}, log=True),
    _Kind("Update over weights, a step", _of_towers("update_ratio"), "{:.1g}".format, log=True),
    _Kind("Samples a second", {"": "samples_per_second"}),
    _Kind("Tokens a second", {"": "tokens_per_second"}),
    _Kind("Model FLOP/s over the peak (MFU)", {"": "mfu"}, _share),
    _Kind("Time spent waiting for data", {"": "data_wait"}, _share),
    _Kind("Memory, GiB", {"": "memory_gib"}),
    _Kind("Left out so far", {"steps": "skipped", "samples": "bad_samples"}),
)


def panels(log: Log) -> list[Panel]:
    """The charts of one run, without series that have no numbers or stayed 0."""
    charts = []
    for kind in _KINDS:
        series = tuple(_line(label, log, key) for label, key in kind.keys.items())
        charts.append(Panel(kind.title, series, kind.form, kind.log))
    charts += [Panel(title, (line,), form) for title, line, form in _evaluations(log)]
    return [panel for panel in charts if _is_worth_it(panel)]


def compared(logs: Mapping[str, Log]) -> list[Panel]:
    """The charts of several runs by name, a line for each run, a chart for each number."""
    kinds = [_Kind("Loss", {"": "loss"}), *_KINDS]
    singles = [
        (f"{kind.title}: {label}" if label else kind.title, key, kind)
        for kind in kinds
        for label, key in kind.keys.items()
    ]
    charts = [
        Panel(title, tuple(_line(name, log, key) for name, log in logs.items()), kind.form, kind.log)
        for title, key, kind in singles
    ]
    by_title: dict[str, list[Series]] = {}
    forms = {}
    for name, log in logs.items():
        for title, series, form in _evaluations(log):
            by_title.setdefault(title, []).append(Series(name, series.x, series.y))
            forms[title] = form
    charts += [Panel(title, tuple(series), forms[title]) for title, series in by_title.items()]
    return [panel for panel in charts if _is_worth_it(panel)]


def draw_panel(panel: Panel, runs: Sequence[str] = ()) -> tuple[str, list[tuple[str, str]], Markup]:
    """The title, the legend (label and CSS variable of each line, if there are several), and the SVG element.

    Args:
        runs: the runs that the colours stand for; none gives the lines of each chart colours of their own.
    """
    order = list(runs) or [series.label for series in panel.series]
    drawn = [(series, list(RUN_COLOURS)[order.index(series.label)]) for series in panel.series if series.x]
    legend = [(series.label, colour) for series, colour in drawn] if len(order) > 1 else []
    return panel.title, legend, Markup(_svg(panel, drawn))


def _line(label: str, log: Log, key: str) -> Series:
    records = [record for record in log if record.get(key) is not None]
    return Series(label, [record["samples"] for record in records], [float(record[key]) for record in records])


def _evaluations(log: Log) -> list[tuple[str, Series, Callable[[float], str]]]:
    """The metrics of evaluations in between, but for counts, which do not change."""
    lines: dict[str, tuple[list[int], list[float]]] = {}
    samples = 0
    for record in log:
        samples = record.get("samples", samples)
        for name, value in record.get("eval", {}).items():
            if isinstance(value, float):
                x, y = lines.setdefault(name, ([], []))
                x.append(samples)
                y.append(value)
    return [
        (f"Evaluation: {name}", Series("", x, y), _share if is_share(name) else short_number)
        for name, (x, y) in lines.items()
        if "chance" not in name
    ]


def _is_worth_it(panel: Panel) -> bool:
    values = [value for series in panel.series for value in series.y]
    if panel.title.startswith("Loss scale"):
        return len(set(values)) > 1
    return any(values) if panel.title.startswith("Left out") else bool(values)


def _svg(panel: Panel, drawn: Sequence[tuple[Series, str]]) -> str:
    with mpl.rc_context(STYLE):
        # Fixed margins: a layout that looks for them would take most of the time.
        figure = Figure(figsize=(4.8, 2.1))
        _draw(figure.add_axes((0.14, 0.13, 0.83, 0.83), facecolor="none"), panel, drawn)
        return themed_svg(figure, f"Line plot: {panel.title}", {**COLOURS, **RUN_COLOURS})


def _draw(axes: Axes, panel: Panel, drawn: Sequence[tuple[Series, str]]) -> None:
    if panel.log and all(value > 0 for series, _ in drawn for value in series.y):
        axes.set_yscale("log")
    for series, colour in drawn:
        marker = "o" if len(series.x) < 3 else None
        axes.plot(series.x, series.y, color=RUN_COLOURS[colour], linewidth=1.2, marker=marker, markersize=3)
    axes.set_xlim(0, max(1, *(series.x[-1] for series, _ in drawn)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: panel.form(value)))
    axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))
    over_samples(axes, ticks=5)


def loss_svg(curve: LossCurve) -> str:
    """The loss curve as an inline SVG element."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.4), layout="constrained")
        draw_loss(figure.subplots(), curve)
        return themed_svg(figure, "Line plot: the loss over the samples seen")


def accuracy_svg(groups: Sequence[BarGroup]) -> str:
    """The accuracies against chance as an inline SVG element."""
    with mpl.rc_context(STYLE):
        rows = sum(len(group.bars) + _TITLE_ROWS for group in groups)
        figure = Figure(figsize=(9.6, 0.5 + _ROW * rows), layout="constrained")
        _draw_accuracy(figure.subplots(), groups)
        return themed_svg(figure, "Bars: every accuracy next to its chance level")


def draw_loss(axes: Axes, curve: LossCurve) -> None:
    """Loss over samples: each logged value, their running mean, and the loss of guessing."""
    axes.plot(curve.samples, curve.loss, color=PALETTE.accent_soft, linewidth=0.9)
    axes.plot(curve.samples, curve.smooth, color=PALETTE.accent, linewidth=2.0, solid_capstyle="round")
    if len(curve.samples) == 1:
        axes.plot(curve.samples, curve.loss, "o", color=PALETTE.accent)
    for place in curve.returns:
        axes.axvline(place, color=PALETTE.chance, linewidth=1.0)
    # A cosine may be negative.
    bottom, top = min(0.0, *curve.loss), max(0.0, *curve.loss)
    if curve.guessing is not None:
        axes.axhline(curve.guessing, color=PALETTE.chance, linewidth=1.0, dashes=(4, 3))
        axes.annotate(
            f"guessing among {curve.batch_size:,}: {curve.guessing:.2f}",
            (1, curve.guessing),
            xycoords=("axes fraction", "data"),
            xytext=(0, 4),
            textcoords="offset points",
            ha="right",
            color=PALETTE.chance,
            fontsize=8.5,
        )
        top = max(top, curve.guessing)
    axes.annotate(
        f"{curve.smooth[-1]:.2f}",
        (curve.samples[-1], curve.smooth[-1]),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        color=PALETTE.accent,
        fontweight="bold",
    )
    axes.set_xlim(0, curve.samples[-1])
    axes.set_ylim(bottom * 1.12, top * 1.12)
    axes.set_xlabel("samples seen")
    axes.yaxis.set_major_locator(MaxNLocator(5))
    over_samples(axes, ticks=6)


def over_samples(axes: Axes, ticks: int) -> None:
    """The look of a curve over the samples seen."""
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    axes.xaxis.set_major_locator(MaxNLocator(ticks))
    axes.grid(axis="y", color=PALETTE.line, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)


def _draw_accuracy(axes: Axes, groups: Sequence[BarGroup]) -> None:
    """One horizontal bar per accuracy, in groups, each with its chance level as a line across it."""
    scale = max(bar.value for group in groups for bar in group.bars) or 1.0
    y = 0.0
    ticks: list[tuple[float, str]] = []
    for group in groups:
        axes.text(0, y + 0.62, group.title, fontweight="bold", va="center")
        axes.text(scale * 1.32, y + 0.62, group.detail, color=PALETTE.muted, va="center", ha="right", fontsize=8.5)
        y += _TITLE_ROWS
        for bar in group.bars:
            _draw_bar(axes, y, bar, scale)
            ticks.append((y, bar.label))
            y += 1
    axes.set_xlim(0, scale * 1.32)
    axes.set_ylim(y, 0)
    axes.set_yticks([position for position, _ in ticks], [label for _, label in ticks])
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw_bar(axes: Axes, y: float, bar: Bar, scale: float) -> None:
    color = PALETTE.accent if bar.main else PALETTE.accent_soft
    axes.barh(y, bar.value, height=0.62, color=color)
    axes.plot([bar.chance] * 2, [y - 0.43, y + 0.43], color=PALETTE.chance, linewidth=1.6, clip_on=False)
    value = axes.annotate(
        percent(bar.value),
        (max(bar.value, bar.chance), y),
        xytext=(7, 0),
        textcoords="offset points",
        va="center",
        fontweight="bold" if bar.main else "normal",
    )
    axes.annotate(
        f"{times_chance(bar)} · chance {percent(bar.chance)}",
        (1, 0.5),
        xycoords=value,
        xytext=(9, 0),
        textcoords="offset points",
        va="center",
        color=PALETTE.muted,
        fontsize=8.5,
    )


def times_chance(bar: Bar) -> str:
    """How many times chance, with the digits that its size deserves."""
    ratio = bar.value / bar.chance
    return f"{ratio:,.0f} \N{MULTIPLICATION SIGN}" if ratio >= 10 else f"{ratio:.1f} \N{MULTIPLICATION SIGN}"


def percent(share: float) -> str:
    """Two significant digits below 10 %, one decimal above."""
    value = 100 * share
    if value == 0 or value >= 10:
        return f"{value:.1f} %" if value else "0 %"
    return f"{value:.1f} %" if value >= 1 else f"{value:.2g} %"
