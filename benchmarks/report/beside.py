"""Several results on one page: the same cases of two machines or of two versions beside each other."""

from collections.abc import Mapping
from html import escape
from pathlib import Path

from benchmarks.columns import NOTHING, TIMES, times
from benchmarks.contests import Contest, contests
from benchmarks.report.page import INDEX, facts_list, notes_box, write_page
from benchmarks.report.tables import CASE, Cell, table, time_cell, verdict_cell
from benchmarks.results import Results

_TITLE = "Benchmarks of evakernels, beside each other"
_NOTE = (
    "This library's fastest backend in each result, and how it does against the best peer there. Ratios are over the "
    "first result: the time there over the time here, above 1 is faster."
)
Key = tuple[str, ...]
"""What makes cases of two machines the same: all but the device."""


def write_beside(several: Mapping[str, Results], folder: Path) -> Path:
    """Writes one page, `index.html`, of results by their names, the first of which the others are compared with.

    Returns:
        Its path.
    """
    found = {name: {_key(one): one for one in contests(results.rows)} for name, results in several.items()}
    body = [
        f"<h1>{' and '.join(map(escape, several))}</h1>",
        *(
            f"<p>{escape(name)}: {escape(results.machine.name)}</p>{notes_box(results)}"
            for name, results in several.items()
        ),
        f"<h2>Ours against the best peer</h2><p>{_NOTE}</p>{_table(found)}",
        *(facts_list(results, f"The run of {escape(name)}") for name, results in several.items()),
    ]
    return write_page(folder / INDEX, _TITLE, body)


def _key(contest: Contest) -> Key:
    return contest.op, contest.mode, contest.shape, contest.dtype


def _table(found: Mapping[str, Mapping[Key, Contest]]) -> str:
    headings = list(CASE)
    for name in found:
        headings += [(f"{name}, ms", "the fastest backend"), (f"{name}, verdict", "against the best peer there")]
    headings += [(f"{TIMES} {name}", "time in the first result over the time in this one") for name in list(found)[1:]]
    lines = []
    for key in dict.fromkeys(key for of_key in found.values() for key in of_key):
        several = [of_key.get(key) for of_key in found.values()]
        cells = [Cell(escape(text), text) for text in key]
        for contest in several:
            cells += [time_cell(contest, "ours"), verdict_cell(contest)] if contest else [Cell(NOTHING, None)] * 2
        lines.append(cells + [_ratio(several[0], contest) for contest in several[1:]])
    return table("cases", headings, lines, texts=len(CASE))


def _ratio(first: Contest | None, other: Contest | None) -> Cell:
    before, after = ((one.ours.median_ms if one and one.ours else None) for one in (first, other))
    return Cell(times(before / after), before / after) if before and after else Cell(NOTHING, None)
