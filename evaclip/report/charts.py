"""The report's charts, drawn with matplotlib."""

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from evaclip.report.run_data import Bar, BarGroup, LossCurve
from evaclip.report.theme import PALETTE, STYLE, themed_svg

_ROW = 0.36  # height of one bar's row in inches: the chart grows with what it shows
_TITLE_ROWS = 1.5  # a group's title, with some air above it


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
        return themed_svg(figure, "Bars: every accuracy beside its chance level")


def draw_loss(axes: Axes, curve: LossCurve) -> None:
    """Loss over samples: each logged value, their running mean, and the loss of guessing."""
    axes.plot(curve.samples, curve.loss, color=PALETTE.accent_soft, linewidth=0.9)
    axes.plot(curve.samples, curve.smooth, color=PALETTE.accent, linewidth=2.0, solid_capstyle="round")
    if len(curve.samples) == 1:
        axes.plot(curve.samples, curve.loss, "o", color=PALETTE.accent)
    for place in curve.returns:
        axes.axvline(place, color=PALETTE.chance, linewidth=1.0)
    # A negative cosine lies below 0.
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


def short_number(value: float) -> str:
    """1200000 -> '1.2M'."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.3g}"
