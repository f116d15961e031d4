"""The summary as a Markdown table, for a README."""

from collections.abc import Iterable, Sequence

from benchmarks.columns import NOTHING, machine_facts, percent, significant, times
from benchmarks.contests import Contest, contests
from benchmarks.results import Results, Row

_HEADINGS = ("op", "mode", "shape", "dtype", "ours, ms", "torch eager, ms", "best peer, ms", "speed-up", "roofline")


def to_markdown(results: Results) -> str:
    """The machine, what makes its numbers doubtful, and one line for each operation, mode, shape and dtype."""
    facts = machine_facts(results.machine)
    name = facts.pop("device")
    versions = [f"{what} {version}" for what, version in results.machine.versions.items()]
    about = [f"{what} {text}" for what, text in facts.items() if what != "command"]
    parts = [f"**{name}**: {', '.join([*about, *versions])}."]
    if results.machine.command:
        parts.append(f"`{results.machine.command}`")
    parts += [f"> {note}" for note in results.machine.notes]
    parts.append("\n".join(_table(contests(results.rows))))
    if results.absent:
        parts.append("\n".join(f"- not measured: {peer} ({reason})" for peer, reason in results.absent.items()))
    return "\n\n".join(parts) + "\n"


def _table(found: Sequence[Contest]) -> Iterable[str]:
    yield _line(_HEADINGS)
    yield _line(["---"] * 4 + ["---:"] * 5)
    for contest in found:
        ours = contest.ours
        speedup = contest.speedup(ours) if ours else None
        yield _line(
            [
                contest.op,
                contest.mode,
                contest.shape,
                contest.dtype,
                _time(contest, "ours", ours),
                _time(contest, "baseline", contest.eager),
                _time(contest, "peer", contest.peer, named=True),
                NOTHING if speedup is None else times(speedup),
                NOTHING if ours is None or ours.roofline is None else percent(ours.roofline),
            ]
        )


def _time(contest: Contest, kind: str, row: Row | None, named: bool = False) -> str:
    if row is None:
        return "failed" if any(other.kind == kind for other in contest.rows) else NOTHING
    return significant(row.median_ms or 0.0) + (f" ({row.candidate})" if named else "")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
