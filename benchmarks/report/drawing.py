"""What the plots share: a look, a marker for each dtype, texts that appear over a point, and both forms of output."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.columns import significant
from benchmarks.report.colours import COLOURS
from evaclip.report.theme import PALETTE, STYLE, themed_svg

LOOK: Any = {**STYLE, "font.size": 8.5}
MARKERS = {"float32": "o", "bfloat16": "s", "float16": "^"}
_TIP, _BETWEEN = "tip:", "\n\n"


@dataclass(frozen=True)
class Paint:
    """The colours of the candidates, by name of the candidate: hexadecimal values of `COLOURS`."""

    names: Mapping[str, str]

    def __getitem__(self, candidate: str) -> str:
        return COLOURS[self.names[candidate]]


Dot = tuple[float, float, str]
"""x, y, and the text that appears over the dot."""


def draw_dots(axes: Axes, dots: Sequence[Dot], **style: Any) -> None:
    """Dots with texts, in one artist: a page has thousands.

    Args:
        axes: where to.
        dots: inside of the limits that the axes will have.
        style: as `Axes.plot` takes it.
    """
    x, y, texts = zip(*dots, strict=True)
    look = {"marker": "o", "markeredgecolor": PALETTE.paper, "markeredgewidth": 0.5, **style}
    axes.plot(x, y, linestyle="none", gid=tip(*texts), **look)


def tip(*texts: str) -> str:
    """A `gid` for an artist; in a page, the texts then appear while the pointer is over its parts."""
    return _TIP + _BETWEEN.join(texts)


def svg(label: str, size: tuple[float, float], draw: Callable[[Axes], None]) -> str:
    """What `draw` draws, as an inline SVG element that follows the page's theme.

    Args:
        label: says what is shown to those who can't see it.
        size: width and height in inches.
        draw: draws into axes.
    """
    with mpl.rc_context(LOOK):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        text = themed_svg(figure, label, COLOURS)
    return _add_titles(text).replace(' target="_blank"', "")


def _add_titles(text: str) -> str:
    """Turns the ids that `tip` made into title elements: of the artist, or of each of its markers."""
    waiting: list[str] = []

    def replace(match: re.Match[str]) -> str:
        if match["use"] is not None:
            return f"<use{match['use']}><title>{waiting.pop(0)}</title></use>" if waiting else match[0]
        texts = match["texts"].split(_BETWEEN)
        waiting[:] = texts if len(texts) > 1 else []
        return "<g>" if waiting else f"<g><title>{texts[0]}</title>"

    return re.sub(rf'<g id="{_TIP}(?P<texts>[^"]*)">|<use(?P<use> [^>]*)/>', replace, text)


def number_axis(axis: Any, ticks: Sequence[float] = ()) -> None:
    """Plain numbers, no minor ticks. With `ticks` exactly those, else on logarithmic axes 1, 2, 5, 10 and so on."""
    if ticks:
        axis.set_ticks(ticks)
    elif axis.get_scale() == "log":
        decades = abs(math.log10(max(axis.get_view_interval()) / min(axis.get_view_interval())))
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.10g}" if value >= 0.001 or value == 0 else f"{value:.0e}")
    )


def grid(axes: Axes, which: str) -> None:
    """Fine lines behind the data."""
    axes.grid(axis=which, color=PALETTE.line, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)


def milliseconds(value: float) -> str:
    """A time with its unit."""
    return f"{significant(value)} ms"
