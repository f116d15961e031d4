"""Differences of two results in time, memory, errors and failures, with the noise of the machine taken out.

Noise on a shared machine has one sign: other processes can only make a call take longer. So the fastest round of a pass
stands for the pass. A row is slower if every pass after exceeds every pass before by more than the threshold. Before
that the machine's drift is divided out: the change of plain PyTorch in the same rounds, in this case or in the median
of all cases, whichever is more forgiving, because the baseline is noisy too.

One process may be luckier than another in the placement of its memory, for all of its passes. So a candidate's rows on
an operation are judged together. They are a regression if two of them are slower, or if their mean change is more than
the threshold and more than twice its standard error. One slower row among four or more is a suspect: to be measured
again.
"""

import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.text import Text

from benchmarks.render import Cell, Table, make_console, print_notes
from benchmarks.results import Machine, Results, Row, grouped
from evaclip.errors import UserError, counted

Kind = Literal["slower", "faster", "fails", "works again", "less exact", "peak memory", "saved memory"]
BETTER = ("faster", "works again")
ERROR_GROWTH, MEMORY_GROWTH = 2.0, 1.1
"""Ratios that an error and the memory may grow by."""
_FEW_ROWS = 4
"""With fewer rows of an operation one slower row is a regression, and their mean isn't judged."""
Pair = tuple[Row, Row]
"""The rows of a candidate on a case, before and after."""


@dataclass(frozen=True)
class Difference:
    """One change in one row, or of the mean time of a candidate's rows on an operation.

    Attributes:
        kind: what changed.
        row: the row of the later result; the first of several.
        before, after: the different values: ms of the fastest round, relative error, or bytes.
        change: after over before, the machine's drift divided out of times.
        rows: number of rows, of which `change` is the geometric mean.
    """

    kind: Kind
    row: Row
    before: float | None = None
    after: float | None = None
    change: float | None = None
    rows: int = 1


@dataclass
class Comparison:
    """Two results side by side.

    Attributes:
        other_setup: facts in which the machines differ, such as `name`; empty for the same machine. Differences between
            machines are not regressions.
        drift: time of plain PyTorch after over before, the median of all cases; 1 between different machines.
        compared: rows that both results measured.
        regressions: rows and operations of this library that became worse.
        suspects: single rows of this library that became slower, where the operation's others did not.
        others: other differences: improvements, and rows of PyTorch and of the peers.
        only_before, only_after: rows that one result lacks.
        notes: reasons to be careful.
    """

    before: Machine
    after: Machine
    other_setup: tuple[str, ...] = ()
    drift: float = 1.0
    compared: int = 0
    regressions: list[Difference] = field(default_factory=list)
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
            f"before: {_describe_rows(before)}\nafter: {_describe_rows(after)}\n"
            "Measure both with the same operations, modes, shapes, dtypes, device and backends."
        )
    found = Comparison(before.machine, after.machine, _other_setup(before.machine, after.machine))
    found.only_before = [row for key, row in earlier.items() if key not in later]
    found.only_after = [row for key, row in later.items() if key not in earlier]
    found.notes = _notes(before.machine, after.machine, pairs)
    timed = [(old, new) for old, new in pairs if _is_timed(old) and _is_timed(new)]
    found.compared = len(timed)
    drifts: dict[tuple[str, ...], float] = {}  # change of plain PyTorch's time, by case
    if not found.other_setup:
        drifts = {new.case: _change(old, new) for old, new in timed if new.kind == "baseline"}
    found.drift = statistics.median(drifts.values()) if drifts else 1.0
    differences = [one for old, new in pairs for one in _exact_differences(old, new)]
    for old, new in timed:
        own = drifts.get(new.case, found.drift) if new.kind != "baseline" else found.drift
        differences += _time_differences(old, new, (own, found.drift), threshold)
    for one in differences:
        regression = one.row.kind == "ours" and one.kind not in BETTER and not found.other_setup
        (found.regressions if regression else found.others).append(one)
    if not found.other_setup:
        _judge_operations(found, [(old, new) for old, new in pairs if new.kind == "ours"], drifts, threshold)
    return found


def _describe_rows(results: Results) -> str:
    """The operations of a result, and the modes, shapes and so on of its rows of this library."""
    columns = zip(*(row.key for row in results.rows if row.kind == "ours"), strict=True)
    lists = [list(dict.fromkeys(values)) for values in columns]
    texts = (", ".join([*values[:4], *["..."][: len(values) > 4]]) for values in lists)
    return "; ".join(texts) or "no row of evakernels"


def _judge_operations(
    found: Comparison, pairs: Sequence[Pair], drifts: Mapping[tuple[str, ...], float], threshold: float
) -> None:
    """Add operations that became slower as a whole to the regressions, and move single rows to the suspects."""
    for (op, candidate), own in grouped(pairs, lambda pair: (pair[1].op, pair[1].candidate)).items():
        slower = [
            one for one in found.regressions if (one.kind, one.row.op, one.row.candidate) == ("slower", op, candidate)
        ]
        timed = [pair for pair in own if all(map(_is_timed, pair)) and pair[1].case in drifts]
        if len(timed) >= _FEW_ROWS:
            changes = [math.log(_change(old, new) / drifts[new.case]) for old, new in timed]
            mean, error = statistics.mean(changes), statistics.stdev(changes) / math.sqrt(len(changes))
            if mean > max(math.log(1 + threshold), 2 * error):
                found.regressions.append(Difference("slower", timed[0][1], change=math.exp(mean), rows=len(timed)))
                continue
        if len(slower) == 1 and len(own) >= _FEW_ROWS:
            found.suspects += slower
            found.regressions.remove(slower[0])


def _time_differences(old: Row, new: Row, drifts: tuple[float, float], threshold: float) -> Iterator[Difference]:
    slowest, fastest = max(drifts), min(drifts)
    change, values = _change(old, new), (min(_passes(old)), min(_passes(new)))
    if min(_passes(new)) > (1 + threshold) * slowest * max(_passes(old)):
        yield Difference("slower", new, *values, change / slowest)
    elif min(_passes(old)) * fastest > (1 + threshold) * max(_passes(new)):
        yield Difference("faster", new, *values, change / fastest)


def _passes(row: Row) -> list[float]:
    """The fastest round of each pass, in ms."""
    return [min(one_pass) for one_pass in row.samples_ms if one_pass]


def _change(old: Row, new: Row) -> float:
    """The fastest round after over the fastest before."""
    return min(_passes(new)) / min(_passes(old))


def _is_timed(row: Row) -> bool:
    return row.failure is None and any(row.samples_ms)


def _exact_differences(old: Row, new: Row) -> Iterator[Difference]:
    """Differences without noise: failures, errors on the same inputs, memory."""
    if new.failure is not None:
        if old.failure is None:
            yield Difference("fails", new)
        return
    if old.failure is not None:
        yield Difference("works again", new)
        return
    grown: list[tuple[Kind, float | None, float | None, float]] = [
        ("less exact", old.error, new.error, ERROR_GROWTH),
        ("peak memory", old.peak_bytes, new.peak_bytes, MEMORY_GROWTH),
        ("saved memory", old.saved_bytes, new.saved_bytes, MEMORY_GROWTH),
    ]
    for kind, first, second, most in grown:
        if first is None or second is None or math.isnan(first):
            continue
        if not second <= most * first:  # true for NaN
            yield Difference(kind, new, first, second, second / first if first else math.inf)


def _other_setup(before: Machine, after: Machine) -> tuple[str, ...]:
    """Different facts that keep times from being comparable."""
    names = ("device", "name", "threads") if before.device == "cpu" else ("device", "name")
    return tuple(name for name in names if getattr(before, name) != getattr(after, name))


def _notes(before: Machine, after: Machine, pairs: Sequence[tuple[Row, Row]]) -> list[str]:
    notes = [f"before: {note}" for note in before.notes] + [f"after: {note}" for note in after.notes]
    torches = [machine.versions.get("torch", "unknown") for machine in (before, after)]
    if torches[0] != torches[1]:
        notes.append(f"PyTorch {torches[0]} became {torches[1]}: drift is measured on it, so times are less certain")
    if any(len(_passes(row)) == 1 for pair in pairs for row in pair):
        notes.append("a single pass over the suite shows no noise: measure with --passes 3 or more")
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
    other = " and ".join(comparison.other_setup)
    rest = f"differences between machines (another {other})" if other else "other differences"
    for title, differences, style in (
        ("regressions", comparison.regressions, "bold red"),
        ("single rows, to be measured again", comparison.suspects, "bold yellow"),
        (rest, comparison.others, "bold"),
    ):
        if differences:
            console.print(Text(f"\n{title}", style))
            console.print(_tabulate(differences).to_terminal())
        for one in differences:
            if one.kind == "fails":
                console.print(Text(f"{' · '.join(one.row.key)}: {one.row.failure}", "red"))
    for name, rows in (("before", comparison.only_before), ("after", comparison.only_after)):
        for op, count in Counter(row.op for row in rows).items():
            console.print(Text(f"only {name}: {counted(count, 'row')} of {op}", "dim"))
    ops = {one.row.op for one in comparison.regressions}
    if comparison.other_setup:
        console.print("a comparison of machines: nothing is called a regression")
    elif ops:
        console.print(Text(f"regressions of {', '.join(sorted(ops))}", "bold red"))
    else:
        console.print(Text("no regressions", "bold green"))


def _tabulate(differences: Sequence[Difference]) -> Table:
    columns = [(title, "") for title in ("what", "operation", "candidate", "before", "after", "change")]
    table = Table("differences", columns, texts=3)
    for one in sorted(differences, key=lambda one: (one.kind, -(one.change or 0))):
        case = " ".join(one.row.case[:4]) if one.rows == 1 else f"{one.row.op}, mean of {one.rows} rows"
        values = ["" if value is None else _value(one.kind, value) for value in (one.before, one.after)]
        change = "" if one.change is None else _percent(one.change)
        table.rows.append([Cell(text) for text in (one.kind, case, one.row.candidate, *values, change)])
    return table


def _value(kind: Kind, value: float) -> str:
    if kind == "less exact":
        return f"{value:.2e}"
    return f"{value / 2**20:.4g} MiB" if "memory" in kind else f"{value:.4g} ms"


def _percent(change: float) -> str:
    return f"{change - 1:+.0%}" if change < 10 else f"{change:.3g}x"
