"""`report.png`: the report as one picture."""

from pathlib import Path
from textwrap import shorten, wrap
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from evaclip.eval.gallery import Query, Section, open_thumbnail
from evaclip.report.charts import ROW, bar_rows, draw_accuracy, draw_loss, percent, times_chance
from evaclip.report.page import KIND, headline_bars
from evaclip.report.run_data import RunData
from evaclip.report.theme import PALETTE, STYLE

WIDTH = 12.0
MARGIN = 0.55
DPI = 150
_HEADER, _TILES, _LOSS, _QUERY, _SECTION_TITLE, _FACT, _GAP = 1.25, 1.3, 3.0, 0.62, 0.75, 0.22, 0.62


class _Sheet:
    """A figure that is filled from the top, in inches."""

    def __init__(self, height: float) -> None:
        self.figure = Figure(figsize=(WIDTH, height), dpi=DPI, facecolor=PALETTE.paper)
        FigureCanvasAgg(self.figure)
        self._height = height
        self._top = MARGIN

    def skip(self, inches: float) -> None:
        self._top += inches

    def axes(self, height: float, left: float = MARGIN, width: float = WIDTH - 2 * MARGIN) -> Axes:
        """Axes of the given size below what was drawn so far; `skip` moves on."""
        bottom = self._height - self._top - height
        return self.figure.add_axes(
            (left / WIDTH, bottom / self._height, width / WIDTH, height / self._height), facecolor="none"
        )

    def text(self, below: float, text: str, left: float = MARGIN, **style: Any) -> None:
        self.figure.text(left / WIDTH, 1 - (self._top + below) / self._height, text, va="top", **style)


def write_poster(run: RunData, path: Path) -> None:
    """Draws the poster into a PNG file."""
    with mpl.rc_context(STYLE):
        sheet = _Sheet(_height(run))
        sheet.text(0, KIND, fontsize=9.5, fontweight="bold", color=PALETTE.accent)
        sheet.text(0.22, run.name, fontsize=26, fontweight="bold")
        sheet.text(0.76, run.summary, fontsize=11, color=PALETTE.muted)
        sheet.skip(_HEADER)
        if run.groups:
            _draw_tiles(sheet, run)
        _draw_title(sheet, "Training", "the loss of each logged step, and the running mean")
        draw_loss(sheet.axes(_LOSS - 0.4, left=MARGIN + 0.35, width=WIDTH - 2 * MARGIN - 0.8), run.curve)
        sheet.skip(_LOSS + _GAP)
        if run.groups:
            _draw_title(sheet, "Accuracy against chance", "the orange line is what guessing reaches on the same data")
            height = ROW * bar_rows(run.groups)
            draw_accuracy(sheet.axes(height, left=MARGIN + 0.75, width=WIDTH - 2 * MARGIN - 0.75), run.groups)
            sheet.skip(height + _GAP)
        _draw_galleries(sheet, run)
        _draw_facts(sheet, run)
        sheet.figure.savefig(path, format="png")


def _height(run: RunData) -> float:
    accuracy = _SECTION_TITLE + ROW * bar_rows(run.groups) + _GAP + _TILES + _GAP if run.groups else 0.0
    galleries = sum(_gallery_height(gallery.sections) + _GAP for gallery in run.galleries)
    facts = _SECTION_TITLE + _facts_height(run)
    return 2 * MARGIN + _HEADER + _SECTION_TITLE + _LOSS + _GAP + accuracy + galleries + facts


def _gallery_height(sections: tuple[Section, ...]) -> float:
    return _SECTION_TITLE + 0.35 + _QUERY * max(len(section.queries) for section in sections)


def _facts_height(run: RunData) -> float:
    return _FACT * (1.5 + max(len(pairs) for pairs in run.facts.values()))


def _draw_title(sheet: _Sheet, title: str, note: str) -> None:
    sheet.text(0, title, fontsize=15, fontweight="bold")
    sheet.text(0.3, note, fontsize=9.5, color=PALETTE.muted)
    sheet.skip(_SECTION_TITLE)


def _draw_tiles(sheet: _Sheet, run: RunData) -> None:
    bars = headline_bars(run.groups)
    gap = 0.2
    width = (WIDTH - 2 * MARGIN - gap * (len(bars) - 1)) / len(bars)
    for number, (group, bar) in enumerate(bars):
        axes = sheet.axes(_TILES, left=MARGIN + number * (width + gap), width=width)
        axes.set_axis_off()
        axes.set_xlim(0, width)
        axes.set_ylim(0, _TILES)
        box = FancyBboxPatch(
            (0.1, 0.1), width - 0.2, _TILES - 0.2, boxstyle="round,pad=0.1", fc=PALETTE.panel, ec="none"
        )
        axes.add_patch(box)
        lines = wrap(f"{group.title}, {bar.label}", int(width * 13.5), max_lines=2, placeholder="…")
        axes.text(
            0.2,
            _TILES - 0.16,
            "\n".join(lines),
            fontsize=8.5,
            color=PALETTE.muted,
            va="top",
            linespacing=1.35,
        )
        axes.text(0.2, 0.56, percent(bar.value), fontsize=22, fontweight="bold", va="center")
        axes.text(0.2, 0.22, f"{times_chance(bar)} chance", fontsize=8.5, color=PALETTE.muted, va="center")
    sheet.skip(_TILES + _GAP)


def _draw_galleries(sheet: _Sheet, run: RunData) -> None:
    column_gap = 0.45
    for gallery in run.galleries:
        note = f"the nearest pictures of {gallery.pictures:,}, best first; a green frame marks the right one"
        _draw_title(sheet, gallery.title, note)
        width = (WIDTH - 2 * MARGIN - column_gap) / 2
        for column, section in enumerate(gallery.sections):
            left = MARGIN + column * (width + column_gap)
            sheet.text(0, section.title, left=left, fontsize=10.5, fontweight="bold")
            height = _QUERY * len(section.queries)
            _draw_queries(_inch_axes(sheet, 0.35, height, left, width), section.queries)
        sheet.skip(_gallery_height(gallery.sections) - _SECTION_TITLE + _GAP)


def _inch_axes(sheet: _Sheet, below: float, height: float, left: float, width: float) -> Axes:
    """Axes in inches, from the top left corner downwards, that start `below` the current place."""
    sheet.skip(below)
    axes = sheet.axes(height, left=left, width=width)
    sheet.skip(-below)
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    return axes


def _draw_queries(axes: Axes, queries: tuple[Query, ...]) -> None:
    width = axes.get_xlim()[1]
    text_width, size, gap = 1.5, 0.44, 0.055
    shown = int((width - text_width) / (size + gap))
    for row, query in enumerate(queries):
        top = row * _QUERY
        axes.text(0, top + 0.2, shorten(query.text, 24, placeholder="…"), fontsize=8.5, va="center")
        place = "first" if query.rank == 1 else f"place {query.rank:,}"
        color = PALETTE.hit if query.rank == 1 else PALETTE.muted
        axes.text(0, top + 0.38, place, fontsize=7, color=color, va="center")
        for number, found in enumerate(query.found[:shown]):
            left = text_width + number * (size + gap)
            picture = np.asarray(open_thumbnail(found.image).convert("RGB"))
            axes.imshow(picture, extent=(left, left + size, top + 0.06 + size, top + 0.06), aspect="auto", zorder=1)
            axes.add_patch(_frame(left, top + 0.06, size, found.correct))
    axes.set_xlim(0, width)
    axes.set_ylim(len(queries) * _QUERY, 0)


def _frame(left: float, top: float, size: float, correct: bool) -> FancyBboxPatch:
    color, line = (PALETTE.hit, 2.2) if correct else (PALETTE.line, 0.7)
    style = "round,pad=0.012,rounding_size=0.05"
    return FancyBboxPatch((left, top), size, size, boxstyle=style, fc="none", ec=color, lw=line, zorder=2)


def _draw_facts(sheet: _Sheet, run: RunData) -> None:
    sheet.text(0, "Facts of the run", fontsize=15, fontweight="bold")
    sheet.skip(_SECTION_TITLE - 0.25)
    width = (WIDTH - 2 * MARGIN) / len(run.facts)
    most = int((width - 1.3) / 0.07)  # characters that fit
    for column, (heading, pairs) in enumerate(run.facts.items()):
        left = MARGIN + column * width
        sheet.text(0, heading, left=left, fontsize=9.5, fontweight="bold")
        for row, (name, value) in enumerate(pairs, 1):
            sheet.text(row * _FACT + 0.06, name, left=left, fontsize=8, color=PALETTE.muted)
            text = shorten(value, most, placeholder="…") if " " in value else value[:most]
            sheet.text(row * _FACT + 0.06, text, left=left + 1.3, fontsize=8)
