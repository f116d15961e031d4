"""The pages' sortable tables."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from benchmarks.columns import (
    COLUMNS,
    ERROR,
    ERROR_RATIO,
    MEDIAN,
    NOTHING,
    Column,
    time_text,
    verdict_text,
)
from benchmarks.contests import Contest, verdict
from benchmarks.results import Row


@dataclass(frozen=True)
class Cell:
    """What a cell shows, HTML, and what its column is sorted by; None sorts last."""

    html: str
    value: float | str | None
    kind: str = ""


def page_name(op: str) -> str:
    """The file of an operation's page."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in op) + ".html"


CASE = [("operation", ""), ("mode", ""), ("shape", ""), ("dtype", "")]
"""Headings of the columns that name a case."""


def summary_table(found: Sequence[Contest]) -> str:
    """One line for each contest: this library's best against the best of the others."""
    headings = [
        *CASE,
        ("ours, ms", "the fastest backend"),
        ("best peer, ms", "the fastest of the others that are right, torch eager and torch.compile among them"),
        ("verdict", "time of the best peer over ours: above 1 is faster"),
    ]
    return table("cases", headings, map(_summary_line, found), texts=len(CASE))


def _summary_line(contest: Contest) -> list[Cell]:
    return [
        Cell(f'<a href="{page_name(contest.op)}">{escape(contest.op)}</a>', contest.op),
        *(Cell(escape(text), text) for text in (contest.mode, contest.shape, contest.dtype)),
        time_cell(contest, "ours"),
        time_cell(contest, "baseline", "peer"),
        verdict_cell(contest),
    ]


def time_cell(contest: Contest, *kinds: str) -> Cell:
    """The fastest of these kinds, with its name; what kept them all from a time."""
    row, text = contest.fastest(*kinds), time_text(contest, *kinds)
    if row is None:
        return Cell(text, None, "" if text == NOTHING else "bad")
    return Cell(escape(text), row.median_ms, "best" if row.median_ms == contest.fastest_ms else "")


def verdict_cell(contest: Contest) -> Cell:
    """Times as fast as the best peer; sorted by that number also where it is noise."""
    found = verdict(contest)
    if found is None:
        return Cell(NOTHING, None)
    colour = {"faster": "good", "slower": "bad"}.get(found.word, "")
    return Cell(verdict_text(contest), found.ratio, colour)


def rows_table(found: Sequence[Contest]) -> str:
    """Every row of one operation with all its numbers."""
    texts = [("candidate", ""), ("mode", ""), ("shape", ""), ("dtype", "")]
    headings = [*texts, *((column.title, column.meaning) for column in COLUMNS), ("version", "of the candidate")]
    lines = (_row_line(contest, row) for contest in found for row in contest.rows)
    return table("rows", headings, lines, texts=len(texts))


def _row_line(contest: Contest, row: Row) -> list[Cell]:
    texts = (row.mode, row.shape, row.dtype)
    return [
        Cell(escape(row.candidate), row.candidate),
        *(Cell(escape(text), text) for text in texts),
        *(_number(contest, row, column) for column in COLUMNS),
        Cell(escape(row.version), row.version),
    ]


def _number(contest: Contest, row: Row, column: Column) -> Cell:
    if row.failure is not None:
        return Cell(row.mark, None, "bad") if column is MEDIAN else Cell(NOTHING, None)
    kind = ""
    if column is MEDIAN and row.median_ms == contest.fastest_ms:
        kind = "best"
    elif column in (ERROR, ERROR_RATIO) and row.breaks_error_rule:
        kind = "bad"
    return Cell(column.show(contest, row), column.value(contest, row), kind)


def table(name: str, headings: Sequence[tuple[str, str]], lines: Iterable[list[Cell]], texts: int) -> str:
    """A sortable table whose first `texts` columns hold text; the first one names its line."""
    head = "".join(
        f'<th scope="col"{_class("text" if index < texts else "")}>'
        f'<button type="button"{_title(meaning)}>{escape(title)}</button></th>'
        for index, (title, meaning) in enumerate(headings)
    )
    body = "\n".join(f"<tr>{_line(cells, texts)}</tr>" for cells in lines)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table of {name}">'
        f'<table id="{name}"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def _line(cells: Sequence[Cell], texts: int) -> str:
    parts = []
    for index, cell in enumerate(cells):
        tag, scope = ("th", ' scope="row"') if index == 0 else ("td", "")
        value = "" if cell.value is None else f' data-value="{escape(str(cell.value))}"'
        kinds = _class(f"{'text' if index < texts else ''} {cell.kind}".strip())
        parts.append(f"<{tag}{scope}{kinds}{value}>{cell.html}</{tag}>")
    return "".join(parts)


def _class(names: str) -> str:
    return f' class="{names}"' if names else ""


def _title(meaning: str) -> str:
    return f' title="{escape(meaning)}"' if meaning else ""
