"""What the plots share: a look, a colour for each kind of candidate, and plain axes."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from benchmarks.results import Machine
from evaclip.atomic import replacing
from evaclip.report.theme import PALETTE, STYLE, themed_svg

LOOK: Any = {**STYLE, "font.size": 8.5}
COLOURS = {"ours": PALETTE.accent, "baseline": PALETTE.muted, "peer": "#b0609a"}
"""By kind of candidate, on light and on dark pages."""
WIDTH, _DPI = 11.0, 150


def picture(machine: Machine, height: float, width: float = WIDTH) -> Figure:
    """An empty picture, in inches, that says which machine it is of; to be drawn within `LOOK`."""
    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor=PALETTE.paper, layout="constrained")
    FigureCanvasAgg(figure)
    about = f"{machine.name}, {machine.threads} threads, {machine.date[:10]}"
    figure.suptitle(about, x=0.01, ha="left", fontsize=8, color=PALETTE.muted)
    return figure


def save(figure: Figure | None, path: Path) -> bool:
    """Saves a picture as PNG; tells whether there is one."""
    if figure is not None:
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png")
    return figure is not None


def svg(label: str, figure: Figure) -> str:
    """The figure as an inline SVG element that follows the page's theme; `label`, its own, says what it shows."""
    with mpl.rc_context(LOOK):
        return themed_svg(figure, label)


def bare(axes: Axes) -> None:
    """Takes away all but the names on the left."""
    axes.set_xticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def number_axis(axis: Any) -> None:
    """Plain numbers, no minor ticks."""
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:,.10g}")


def grid(axes: Axes, which: str) -> None:
    """Fine lines behind the data."""
    axes.grid(axis=which, color=PALETTE.line, linewidth=0.6)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
