"""The table that a Markdown page shows: ours against the best peers, between two markers."""

from collections.abc import Sequence
from pathlib import Path

from benchmarks.columns import NOTHING, machine_facts, tally_text, time_text, verdict_text
from benchmarks.contests import Contest, contests
from benchmarks.report.drawing import save
from benchmarks.report.overview import ROOFLINE_FILE, overview
from benchmarks.results import Results
from evaclip.atomic import write_text
from evaclip.errors import UserError

SECTION = "benchmarks"


def split_page(page: Path, section: str = SECTION) -> tuple[str, str]:
    """What stands before and after a section of a page, with the markers between which it stands.

    Raises:
        UserError: the page can't be read, or lacks the two markers.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as exc:
        raise UserError(f"can't read {page}: {exc}") from exc
    markers = [f"<!-- {section}: {place} -->" for place in ("begin", "end")]
    before, begin, rest = text.partition(markers[0])
    _, end, after = rest.partition(markers[1])
    if not begin or not end:
        raise UserError(
            f"{page} has no place for the table: it goes between the lines {markers[0]!r} and {markers[1]!r}"
        )
    return before + begin, end + after


def write_section(results: Results, page: Path, picture: str = ROOFLINE_FILE) -> Path:
    """Puts machine, counts and table between a page's markers, and a picture beside the page; returns the page.

    Raises:
        UserError: as `split_page`.
    """
    before, after = split_page(page)
    found = contests(results.rows)
    parts = [*_head(results), tally_text(found), "\n".join(_lines(found))]
    if save(overview(results), page.parent / picture):
        parts.append(f"![Speed against eager PyTorch, and the share of the roofline, of each op]({picture})")
    write_text(page, "\n\n".join([before, *parts, after]))
    return page


def _head(results: Results) -> list[str]:
    facts = machine_facts(results.machine) | results.machine.versions
    name, command = facts.pop("device"), facts.pop("command", "")
    return [
        f"**{name}**: {', '.join(f'{what} {text}' for what, text in facts.items())}.",
        *([f"`{command}`"] if command else []),
        *(f"> {note}" for note in results.machine.notes),
    ]


def _lines(found: Sequence[Contest]) -> list[str]:
    """One for each operation, shape and dtype, with its modes side by side."""
    modes = list(dict.fromkeys(contest.mode for contest in found))
    groups: dict[tuple[str, ...], dict[str, Contest]] = {}
    for contest in found:
        groups.setdefault((contest.op, contest.shape, contest.dtype), {})[contest.mode] = contest
    headings = [text for mode in modes for text in (f"{mode}, ms", "best peer, ms", "verdict")]
    lines = [["op", "shape", "dtype", *headings], ["---"] * 3 + ["---:"] * len(headings)]
    for (op, *names), group in groups.items():
        lines.append([f"`{op}`", *names, *(text for mode in modes for text in _cells(group.get(mode)))])
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines]


def _cells(contest: Contest | None) -> tuple[str, str, str]:
    if contest is None:
        return NOTHING, NOTHING, NOTHING
    return time_text(contest, "ours"), time_text(contest, "baseline", "peer"), verdict_text(contest)
