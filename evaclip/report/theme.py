"""Common parts of pages and plots: colours, the style of plots, plots as SVG, and the frame of a page.

Every colour has one meaning and one hexadecimal value; in a page that value becomes a CSS variable of the same name, so
that the plots follow the reader's light or dark theme. `theme.css` holds the values for both.
"""

import io
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure


@dataclass(frozen=True)
class Palette:
    """Colours by meaning."""

    ink: str = "#1b1f24"
    muted: str = "#656d76"
    line: str = "#d5d9de"
    accent: str = "#2757c4"
    accent_soft: str = "#a9bfee"
    chance: str = "#c2571a"
    hit: str = "#1a8a4f"
    paper: str = "#fefefe"
    panel: str = "#f4f5f7"


PALETTE = Palette()
COLOURS: Mapping[str, str] = {name.replace("_", "-"): value for name, value in asdict(PALETTE).items()}
"""Hexadecimal values by the name of the CSS variable."""

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.edgecolor": PALETTE.line,
    "axes.labelcolor": PALETTE.muted,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "text.color": PALETTE.ink,
    "xtick.color": PALETTE.muted,
    "ytick.color": PALETTE.muted,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
}


def themed_svg(figure: Figure, label: str, colours: Mapping[str, str] = COLOURS) -> str:
    """The figure as an inline SVG element of the page's full width, in the page's fonts and colours.

    Args:
        figure: drawn in the hexadecimal values of `colours`.
        label: says what the plot shows to those who can't see it. Different for every plot of a page: the ids inside
            the SVG depend on it.
        colours: hexadecimal values by the name of the CSS variable.
    """
    FigureCanvasSVG(figure)
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": label}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(label)}" ', 1)
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"(font: (?:bold |\d+ )?[\d.]+px) [^;\"]*", r"\1 var(--sans)", svg)
    for name, value in colours.items():
        svg = svg.replace(value, f"var(--{name})")
    return svg


def document(title: str, body: str, styles: str, script: str = "") -> str:
    """A whole HTML page that needs nothing from outside.

    Args:
        title: plain text.
        body: HTML of what the page shows.
        styles: CSS that comes after the theme's own.
        script: JavaScript that runs once the page is there.
    """
    theme = (Path(__file__).parent / "theme.css").read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{theme}{styles}</style>\n</head>\n"
        f"<body><main>\n{body}\n</main>" + (f"\n<script>\n{script}</script>" if script else "") + "</body>\n</html>\n"
    )
