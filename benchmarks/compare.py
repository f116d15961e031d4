"""Differences of two results in time, memory, errors and failures, with the noise of the machine taken out.

Noise on a shared machine has one sign: others can only make a call take longer. So the fastest round of a pass stands
for the pass, and a run's passes tell how well that repeats. A row counts as slower if

- even the fastest pass after is slower than every pass before, and
- the fastest pass after takes longer than the fastest before by more than the threshold, on top of the distance
  between the two fastest passes of either run.

Before that the machine's own drift is divided out: how plain PyTorch changed, which is measured in the same rounds. It
is taken from the same case and from the median of all cases, and the more forgiving of both is used, because the
baseline is noisy too.

One process may be luckier than another in where its memory lies, for all of its passes: of 687 rows of two runs of one
commit, one was 46 % slower (two AMD EPYC cores, 2026-11-24). So a candidate's rows on an operation are judged together.
They are a regression if two of them are slower, or if their median change is more than the threshold and more than
twice its standard error. One slower row among four or more is a suspect: to be measured again.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.text import Text

from benchmarks.results import Machine, Results, Row
from benchmarks.tables import Cell, Table, make_console, print_notes
from evaclip.errors import UserError, counted

What = Literal["slower", "faster", "fails", "works again", "less exact", "peak memory", "saved memory"]
BETTER = ("faster", "works again")
ERROR_GROWTH = 2.0
"""Times the error may grow."""
MEMORY_GROWTH = 1.1
"""Times the memory may grow; it is counted, so there is no noise in it."""
_FEW_ROWS = 4
"""With fewer rows of an operation one of them is enough for a regression, and they have no spread."""
_NORMAL_DEVIATIONS = 1.4826
"""Standard deviations of a normal distribution in its median deviation."""
_ERROR_OF_MEDIAN = 1.2533
"""The standard error of a median over that of a mean."""


@dataclass(frozen=True)
class Difference:
    """One thing that changed in one row.

    Attributes:
        row: the row of the later result.
        before, after: the values that differ: ms of the fastest round, relative error, or bytes.
        change: after over before, the machine's drift divided out of times.
    """

    what: What
    row: Row
    before: float | None = None
    after: float | None = None
    change: float | None = None


@dataclass(frozen=True)
class Shift:
    """How a candidate changed on an operation: the median over its rows, each relative to plain PyTorch's change.

    Attributes:
        change: after over before.
        error: the standard error of its logarithm, about a share.
    """

    op: str
    candidate: str
    rows: int
    change: float
    error: float


@dataclass
class Comparison:
    """Two results side by side.

    Attributes:
        other_setup: facts in which the machines differ, such as `name`; empty for the same machine. Differences between
            machines are not regressions.
        drift: time of plain PyTorch after over before, the median of all cases; 1 between different machines.
        compared: rows that both results measured.
        regressions: rows of this library that became worse.
        shifts: operations on which this library became slower as a whole.
        suspects: single rows of this library that became slower, where the operation's others did not.
        others: other differences: improvements, and rows of PyTorch and of the peers.
        only_before, only_after: rows that one result lacks.
        notes: why to be careful.
    """

    before: Machine
    after: Machine
    threshold: float
    other_setup: tuple[str, ...] = ()
    drift: float = 1.0
    compared: int = 0
    regressions: list[Difference] = field(default_factory=list)
    shifts: list[Shift] = field(default_factory=list)
    suspects: list[Difference] = field(default_factory=list)
    others: list[Difference] = field(default_factory=list)
    only_before: list[Row] = field(default_factory=list)
    only_after: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def compare(before: Results, after: Results, threshold: float = 0.1) -> Comparison:
    """Find the changes from one result to the other.

    Args:
        before, after: results of the same operations.
        threshold: share that a time may change without counting.

    Raises:
        UserError: the threshold isn't above 0, or no row of this library is in both results.
    """
    if not 0 < threshold < math.inf:
        raise UserError(f"the threshold must be a share above 0 such as 0.1, got {threshold:g}")
    earlier = {row.key: row for row in before.rows}
    later = {row.key: row for row in after.rows}
    pairs = [(earlier[key], row) for key, row in later.items() if key in earlier]
    if not any(row.kind == "ours" for _, row in pairs):
        raise UserError(
            "the two results have no row of evakernels in common\n"
            f"before: {_contents(before)}\nafter: {_contents(after)}\n"
            "Measure both with the same operations, modes, shapes, dtypes, device and backends."
        )
    found = Comparison(before.machine, after.machine, threshold, _other_setup(before.machine, after.machine))
    found.only_before = [row for key, row in earlier.items() if key not in later]
    found.only_after = [row for key, row in later.items() if key not in earlier]
    found.notes = _notes(before.machine, after.machine, pairs)
    drifts = {} if found.other_setup else _drifts(pairs)
    found.drift = statistics.median(drifts.values()) if drifts else 1.0
    for old, new in pairs:
        _add_pair(found, old, new, drifts)
    if not found.other_setup:
        found.shifts = list(_shifts(pairs, drifts, threshold))
        _set_suspects_apart(found, pairs)
    return found


def _contents(results: Results) -> str:
    """The operations of a result, and of its rows of this library the modes, shapes and so on."""
    columns = zip(*(row.key for row in results.rows if row.kind == "ours"), strict=True)
    lists = [list(dict.fromkeys(values)) for values in columns]
    return (
        "; ".join(", ".join([*values[:4], *["..."][: len(values) > 4]]) for values in lists) or "no row of evakernels"
    )


def _shifts(
    pairs: Sequence[tuple[Row, Row]], drifts: Mapping[tuple[str, ...], float], threshold: float
) -> Iterator[Shift]:
    """The operations on which a candidate of this library became slower as a whole."""
    changes: dict[tuple[str, str], list[float]] = {}
    for old, new in pairs:
        if new.kind == "ours" and new.case in drifts and _measured(old) and _measured(new):
            change = math.log(min(_passes(new)) / min(_passes(old)) / drifts[new.case])
            changes.setdefault((new.op, new.candidate), []).append(change)
    for (op, candidate), values in changes.items():
        median = statistics.median(values)
        spread = _NORMAL_DEVIATIONS * statistics.median([abs(value - median) for value in values])
        error = _ERROR_OF_MEDIAN * spread / math.sqrt(len(values))
        if len(values) >= _FEW_ROWS and math.exp(median) > 1 + threshold and median > 2 * error:
            yield Shift(op, candidate, len(values), math.exp(median), error)


def _set_suspects_apart(found: Comparison, pairs: Sequence[tuple[Row, Row]]) -> None:
    def owner(row: Row) -> tuple[str, str]:
        return row.op, row.candidate

    rows = Counter(owner(new) for _, new in pairs)
    slower = Counter(owner(one.row) for one in found.regressions if one.what == "slower")
    shifted = {(shift.op, shift.candidate) for shift in found.shifts}
    found.suspects = [
        one
        for one in found.regressions
        if one.what == "slower"
        and slower[owner(one.row)] == 1
        and rows[owner(one.row)] >= _FEW_ROWS
        and owner(one.row) not in shifted
    ]
    found.regressions = [one for one in found.regressions if one not in found.suspects]


def _add_pair(found: Comparison, old: Row, new: Row, drifts: Mapping[tuple[str, ...], float]) -> None:
    differences = list(_exact_differences(old, new))
    if _measured(old) and _measured(new):
        found.compared += 1
        own = drifts.get(new.case, found.drift) if new.kind != "baseline" else found.drift
        differences += _time_differences(old, new, (own, found.drift), found.threshold)
    for difference in differences:
        regression = new.kind == "ours" and difference.what not in BETTER and not found.other_setup
        (found.regressions if regression else found.others).append(difference)


def _time_differences(old: Row, new: Row, drifts: tuple[float, float], threshold: float) -> Iterator[Difference]:
    first, second = min(_passes(old)), min(_passes(new))
    slower, faster = second / first / max(drifts), second / first / min(drifts)
    if slower > _bound(old, new, threshold):
        yield Difference("slower", new, first, second, slower)
    elif 1 / faster > _bound(new, old, threshold):
        yield Difference("faster", new, first, second, faster)


def _bound(reference: Row, other: Row, threshold: float) -> float:
    """How many times slower than `reference` the fastest pass of `other` may be without being called slower."""
    passes = _passes(reference)
    repeats = max(_repeatability(passes), _repeatability(_passes(other)))
    return max(max(passes) / min(passes), (1 + threshold) * repeats)


def _repeatability(passes: Sequence[float]) -> float:
    """The second fastest pass over the fastest."""
    fastest, *slower = sorted(passes)
    return slower[0] / fastest if slower else 1.0


def _passes(row: Row) -> list[float]:
    """The fastest round of each pass, in ms."""
    return [min(one_pass) for one_pass in row.samples_ms if one_pass]


def _measured(row: Row) -> bool:
    return row.failure is None and any(row.samples_ms)


def _drifts(pairs: Sequence[tuple[Row, Row]]) -> dict[tuple[str, ...], float]:
    """How plain PyTorch's time changed, for each case."""
    return {
        new.case: min(_passes(new)) / min(_passes(old))
        for old, new in pairs
        if new.kind == "baseline" and _measured(old) and _measured(new)
    }


def _exact_differences(old: Row, new: Row) -> Iterator[Difference]:
    """Differences without noise: failures, errors on the same inputs, memory."""
    if old.failure is None and new.failure is not None:
        yield Difference("fails", new)
    if new.failure is not None:
        return
    if old.failure is not None:
        yield Difference("works again", new)
        return
    grown: list[tuple[What, float | None, float | None, float]] = [
        ("less exact", old.error, new.error, ERROR_GROWTH),
        ("peak memory", old.peak_bytes, new.peak_bytes, MEMORY_GROWTH),
        ("saved memory", old.saved_bytes, new.saved_bytes, MEMORY_GROWTH),
    ]
    for what, first, second, most in grown:
        if first is None or second is None or math.isnan(first):
            continue
        if not second <= most * first:  # true for NaN
            yield Difference(what, new, first, second, second / first if first else math.inf)


def _other_setup(before: Machine, after: Machine) -> tuple[str, ...]:
    """Facts that differ, and keep times from being comparable."""
    names = ("device", "name", "threads") if before.device == "cpu" else ("device", "name")
    return tuple(name for name in names if getattr(before, name) != getattr(after, name))


def _notes(before: Machine, after: Machine, pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    notes = [f"before: {note}" for note in before.notes] + [f"after: {note}" for note in after.notes]
    torches = [machine.versions.get("torch", "unknown") for machine in (before, after)]
    if torches[0] != torches[1]:
        notes.append(f"PyTorch {torches[0]} became {torches[1]}: drift is measured on it, so times are less certain")
    if any(len(_passes(row)) == 1 for pair in pairs for row in pair):
        notes.append("a single pass over the suite says nothing about noise: measure with --passes 3 or more")
    return notes


def print_comparison(comparison: Comparison) -> None:
    """Print the differences: first regressions of this library, then the rest."""
    console = make_console()
    for name, machine in (("before", comparison.before), ("after ", comparison.after)):
        facts = (machine.name, f"commit {machine.commit or 'unknown'}", machine.date, machine.package)
        console.print(Text(f"{name}  {', '.join(filter(None, facts))}"))
    print_notes(console, comparison.notes)
    drift = "" if comparison.other_setup else f"; the machine's drift was {comparison.drift - 1:+.0%}"
    console.print(f"{comparison.compared} rows have times in both{drift}", markup=False)
    for shift in comparison.shifts:
        change = f"{_percent(shift.change)}, give or take {shift.error:.0%}, in the median of {shift.rows} rows"
        console.print(Text(f"{shift.op} is slower with {shift.candidate}: {change}", "bold red"))
    other = " and ".join(comparison.other_setup)
    rest = f"differences between machines (another {other})" if other else "other differences"
    for title, differences, style in (
        ("regressions", comparison.regressions, "bold red"),
        ("single rows, to be measured again", comparison.suspects, "bold yellow"),
        (rest, comparison.others, "bold"),
    ):
        if differences:
            console.print(Text(f"\n{title}", style))
            console.print(_differences(differences).to_terminal())
        for one in differences:
            if one.what == "fails":
                console.print(Text(f"{' · '.join(one.row.key)}: {one.row.failure}", "red"))
    for name, rows in (("before", comparison.only_before), ("after", comparison.only_after)):
        for op, count in Counter(row.op for row in rows).items():
            console.print(Text(f"only {name}: {counted(count, 'row')} of {op}", "dim"))
    console.print(_conclusion(comparison))


def _conclusion(comparison: Comparison) -> Text:
    if comparison.other_setup:
        return Text("a comparison of machines: nothing is called a regression")
    ops = {difference.row.op for difference in comparison.regressions} | {shift.op for shift in comparison.shifts}
    if ops:
        return Text(f"regressions of {', '.join(sorted(ops))}", "bold red")
    return Text("no regressions", "bold green")


def _differences(differences: Sequence[Difference]) -> Table:
    columns = [(title, "") for title in ("what", "operation", "candidate", "before", "after", "change")]
    table = Table("differences", columns, texts=3)
    for one in sorted(differences, key=lambda one: (one.what, -(one.change or 0))):
        case = " ".join((one.row.op, one.row.mode, one.row.shape, one.row.dtype))
        values = ["" if value is None else _value(one.what, value) for value in (one.before, one.after)]
        change = "" if one.change is None else _percent(one.change)
        table.rows.append([Cell(text) for text in (one.what, case, one.row.candidate, *values, change)])
    return table


def _value(what: What, value: float) -> str:
    if what == "less exact":
        return f"{value:.2e}"
    return f"{value / 2**20:.4g} MiB" if "memory" in what else f"{value:.4g} ms"


def _percent(change: float) -> str:
    return f"{change - 1:+.0%}" if change < 10 else f"{change:.3g}x"
