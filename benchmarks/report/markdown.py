"""The summary as a Markdown table, and the table that a page of the documentation shows."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.columns import LEVEL, NOTHING, machine_facts, percent, time_text, times, verdict_text
from benchmarks.contests import Contest, contests, tally
from benchmarks.results import Results
from evaclip.atomic import write_text
from evaclip.errors import UserError

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
_TEXTS = ("op", "mode", "shape", "dtype")
_NUMBERS = ("ours, ms", "best peer, ms", "verdict", "torch eager, ms", "speed-up", "roofline")
_MODE = ("ms", "best peer, ms", "verdict")


def to_markdown(results: Results) -> str:
    """The machine, what makes its numbers doubtful, and one line for each operation, mode, shape and dtype."""
    parts = [*_head(results), _table((*_TEXTS, *_NUMBERS), len(_TEXTS), map(_line, contests(results.rows)))]
    if results.absent:
        parts.append("\n".join(f"- not measured: {peer} ({reason})" for peer, reason in results.absent.items()))
    return "\n\n".join(parts) + "\n"


def _line(contest: Contest) -> list[str]:
    ours = contest.ours
    speedup = contest.speedup(ours) if ours else None
    return [
        *(contest.op, contest.mode, contest.shape, contest.dtype),
        time_text(contest, "ours"),
        time_text(contest, "baseline", "peer"),
        verdict_text(contest),
        time_text(contest, "baseline"),
        NOTHING if speedup is None else times(speedup),
        NOTHING if ours is None or ours.roofline is None else percent(ours.roofline),
    ]


def split_page(page: Path) -> tuple[str, str]:
    """What stands before and after the table in a page, markers included.

    Raises:
        UserError: the page can't be read, or lacks the two markers.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except OSError as exc:
        raise UserError(f"can't read {page}: {exc}") from exc
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{page} has no place for the table: it goes between the lines {BEGIN!r} and {END!r}")
    return before + begin, end + after


def write_page(results: Results, page: Path, picture: str) -> None:
    """Puts the table of ours against the best peers, a line for each operation and shape, between a page's markers.

    Args:
        results: what was measured.
        page: a Markdown file.
        picture: name of a picture beside it, shown below the table; empty for none.

    Raises:
        UserError: as `split_page`.
    """
    before, after = split_page(page)
    found = contests(results.rows)
    counts = tally(found)
    count = (
        f"Against the fastest of the others whose results are right, `torch eager` and `torch.compile` among them: "
        f"faster in {counts['faster']} of {counts.total()} cases, {LEVEL} in {counts['level']}, slower in "
        f"{counts['slower']}."
    )
    parts = [*_head(results), count, _op_table(found)]
    if picture:
        parts.append(f"![Speed against eager PyTorch, and the share of the roofline, of each op]({picture})")
    write_text(page, "\n\n".join([before, *parts, after]))


def _op_table(found: Sequence[Contest]) -> str:
    """The modes of an operation, shape and dtype side by side."""
    modes = list(dict.fromkeys(contest.mode for contest in found))
    groups: dict[tuple[str, ...], dict[str, Contest]] = {}
    for contest in found:
        groups.setdefault((contest.op, contest.shape, contest.dtype), {})[contest.mode] = contest
    headings = ["op", "shape", "dtype"]
    for mode in modes:
        headings += [f"{mode}, {_MODE[0]}", *_MODE[1:]]
    lines = ([f"`{op}`", *rest, *_mode_cells(group, modes)] for (op, *rest), group in groups.items())
    return _table(headings, 3, lines)


def _mode_cells(group: dict[str, Contest], modes: Sequence[str]) -> list[str]:
    cells = []
    for mode in modes:
        contest = group.get(mode)
        if contest is None:
            cells += [NOTHING] * len(_MODE)
        else:
            cells += [time_text(contest, "ours"), time_text(contest, "baseline", "peer"), verdict_text(contest)]
    return cells


def _head(results: Results) -> list[str]:
    facts = machine_facts(results.machine)
    name, command = facts.pop("device"), facts.pop("command", "")
    versions = [f"{what} {version}" for what, version in results.machine.versions.items()]
    about = [f"{what} {text}" for what, text in facts.items()]
    return [
        f"**{name}**: {', '.join([*about, *versions])}.",
        *([f"`{command}`"] if command else []),
        *(f"> {note}" for note in results.machine.notes),
    ]


def _table(headings: Sequence[str], texts: int, lines: Iterable[Sequence[str]]) -> str:
    rules = ["---"] * texts + ["---:"] * (len(headings) - texts)
    return "\n".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in (headings, rules, *lines)
    )
