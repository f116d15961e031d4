"""Several results on one page: the same rows of two machines or of two versions beside each other."""

from collections.abc import Iterable, Mapping
from html import escape

from benchmarks.columns import NOTHING, TIMES, significant, times
from benchmarks.contests import Contest, contests
from benchmarks.report.page import facts_list, notes_box, page_document
from benchmarks.report.tables import Cell, table, verdict_cell
from benchmarks.results import Results, Row

_TITLE = "Benchmarks of evakernels, beside each other"
_CASES_NOTE = (
    "This library's fastest backend in each result, and how it does against the best peer there. Ratios are over the "
    "first result: the time there over the time here, above 1 is faster."
)
_ROWS_NOTE = "Each candidate that any of the results has, by the median of its times in ms."
_TEXTS = [("operation", ""), ("mode", ""), ("shape", ""), ("dtype", "")]
Key = tuple[str, ...]
"""The names that make rows of several results the same."""


def beside_page(several: Mapping[str, Results]) -> str:
    """The page of results by their names, as HTML; the first one is what the others are compared with."""
    found = {name: {_case(one): one for one in contests(results.rows)} for name, results in several.items()}
    body = [
        f"<h1>{' and '.join(map(escape, several))}</h1>",
        *(
            f"<p>{escape(name)}: {escape(results.machine.name)}</p>{notes_box(results)}"
            for name, results in several.items()
        ),
        f"<h2>Ours against the best peer</h2><p>{_CASES_NOTE}</p>{_cases_table(found)}",
        f"<h2>All rows</h2><p>{_ROWS_NOTE}</p>{_rows_table(found)}",
        *(facts_list(results, f"The run of {escape(name)}") for name, results in several.items()),
    ]
    return page_document(_TITLE, body)


def _case(contest: Contest) -> Key:
    """What makes cases of two machines the same: all but the device."""
    return contest.op, contest.mode, contest.shape, contest.dtype


def _cases_table(found: Mapping[str, Mapping[Key, Contest]]) -> str:
    headings = list(_TEXTS)
    for name in found:
        headings += [(f"{name}, ms", "the fastest backend"), (f"{name}, verdict", "against the best peer there")]
    headings += [_ratio_heading(name) for name in list(found)[1:]]
    lines = []
    for case in _union(found.values()):
        several = [contests_of.get(case) for contests_of in found.values()]
        ours = [contest.ours if contest else None for contest in several]
        cells = [Cell(escape(text), text) for text in case]
        for contest, row in zip(several, ours, strict=True):
            cells += [_time(row), verdict_cell(contest) if contest else Cell(NOTHING, None)]
        lines.append(cells + [_ratio(ours[0], row) for row in ours[1:]])
    return table("cases", headings, lines, texts=len(_TEXTS))


def _rows_table(found: Mapping[str, Mapping[Key, Contest]]) -> str:
    headings = [*_TEXTS, ("candidate", ""), *((f"{name}, ms", "median") for name in found)]
    headings += [_ratio_heading(name) for name in list(found)[1:]]
    rows: list[dict[Key, Row]] = [
        {(*case, row.candidate): row for case, contest in contests_of.items() for row in contest.rows}
        for contests_of in found.values()
    ]
    lines = []
    for key in _union(rows):
        several = [of.get(key) for of in rows]
        times_there = [_ratio(several[0], row) for row in several[1:]]
        lines.append([*(Cell(escape(text), text) for text in key), *map(_time, several), *times_there])
    return table("rows", headings, lines, texts=len(_TEXTS) + 1)


def _union(several: Iterable[Mapping[Key, object]]) -> list[Key]:
    """All keys, in the order in which they come."""
    return list(dict.fromkeys(key for one in several for key in one))


def _ratio_heading(name: str) -> tuple[str, str]:
    return f"{TIMES} {name}", "time in the first result over the time in this one: above 1 is faster"


def _time(row: Row | None) -> Cell:
    if row is None:
        return Cell(NOTHING, None)
    if row.median_ms is None or row.failure is not None:
        return Cell(row.mark or NOTHING, None, "bad")
    return Cell(significant(row.median_ms), row.median_ms)


def _ratio(first: Row | None, other: Row | None) -> Cell:
    if first is None or other is None or not first.median_ms or not other.median_ms:
        return Cell(NOTHING, None)
    ratio = first.median_ms / other.median_ms
    return Cell(times(ratio), ratio)
