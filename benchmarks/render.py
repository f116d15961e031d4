"""Tables of results: built once, without a format, and rendered for a terminal, as Markdown, or by page.html."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from inspect import signature

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from benchmarks.candidates import OURS, candidates
from benchmarks.operation import Operation
from benchmarks.results import Contest, Machine, Results, Row, contests, grouped, verdict

NOTHING = "–"  # noqa: RUF001
TIMES = "\N{MULTIPLICATION SIGN}"
LEVEL = "equal within noise"
PIPED_WIDTH = 120
_STYLES = {"best": "bold", "good": "green", "bad": "red", "ours": "bold cyan", "peer": "magenta"}


# --- numbers as text ------------------------------------------------------------------------------------------------


def significant(value: float, digits: int = 3) -> str:
    """A number with so many significant digits and no exponent: 0.0123, 1.20, 1,230."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    value = float(f"{value:.{digits - 1}e}")
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def mebibytes(size: float) -> str:
    """Bytes in MiB; less than a hundredth is `<0.01`."""
    return "<0.01" if 0 < size < 0.01 * 2**20 else significant(size / 2**20)


def percent(share: float) -> str:
    """A share in percent: two digits below 10 %, whole numbers above."""
    return f"{significant(100 * share, 2)} %" if share < 0.1 else f"{100 * share:.0f} %"


def times(ratio: float) -> str:
    """A ratio with its sign."""
    return f"{significant(ratio)} {TIMES}"


def scientific(value: float) -> str:
    """Two digits and an exponent."""
    return f"{value:.1e}" if value else "0"


# --- a table without a format ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        text: the visible text.
        value: sort key of the column; None is last.
        style: `best`, `good`, `bad`, `ours`, `peer`, or empty.
    """

    text: str
    value: float | str | None = None
    style: str = ""


@dataclass
class Table:
    """A table.

    Attributes:
        name: identifies the table on a page.
        columns: title and meaning of each column; the first `texts` columns hold text, the others numbers.
        rows: one list of cells for each row.
    """

    name: str
    columns: Sequence[tuple[str, str]]
    rows: list[list[Cell]] = field(default_factory=list)
    texts: int = 1

    def to_terminal(self) -> RichTable:
        """The table for a terminal, with one line below its head."""
        table = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
        for index, (title, _) in enumerate(self.columns):
            if index < self.texts:
                longest = max((len(row[index].text) for row in self.rows), default=0)
                table.add_column(title, overflow="fold", min_width=min(longest, 10))
            else:
                table.add_column(title.replace(*(", ", ",\n") if "," in title else (" ", "\n")), justify="right")
        for row in self.rows:
            table.add_row(*(Text(cell.text, _STYLES.get(cell.style, "")) for cell in row))
        return table

    def to_markdown(self) -> str:
        """The table as Markdown."""
        head = [[title for title, _ in self.columns]]
        head.append(["---" if index < self.texts else "---:" for index in range(len(self.columns))])
        lines = [*head, *([cell.text.replace("|", "\\|") for cell in row] for row in self.rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --- tables of results ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """One number of a row: its title with the unit, value (None if the row has none), text form and meaning."""

    title: str
    value: Callable[[Contest, Row], float | None]
    text: Callable[[float], str]
    meaning: str


def _error_ratio(contest: Contest, row: Row) -> float | None:
    return row.error / row.baseline_error if row.error is not None and row.baseline_error else None


COLUMNS = (
    Column("ms", lambda contest, row: row.median_ms, significant, "median time of a call"),
    Column("p20", lambda contest, row: row.quantile_ms(0.2), significant, "20 % of the calls took less, in ms"),
    Column("p80", lambda contest, row: row.quantile_ms(0.8), significant, "80 % of the calls took less, in ms"),
    Column("GB/s", lambda contest, row: row.gigabytes_per_second, significant, "bytes by formula over the median"),
    Column("TFLOP/s", lambda contest, row: row.tflops, significant, "FLOPs of matmuls over the median"),
    Column("roofline", lambda contest, row: row.roofline, percent, "least possible time over the median"),
    Column(f"{TIMES} eager", Contest.speedup, significant, "median of torch eager over this median: above 1 is faster"),
    Column("peak MiB", lambda contest, row: row.peak_bytes, mebibytes, "most memory held beyond the inputs"),
    Column("saved MiB", lambda contest, row: row.saved_bytes, mebibytes, "memory saved for backward"),
    Column("error", lambda contest, row: row.error, scientific, "relative RMS error against float64, worst tensor"),
    Column(f"{TIMES} eager's", _error_ratio, significant, "error over the one of torch eager in the same dtype"),
    Column("first ms", lambda contest, row: row.first_call_ms, significant, "the first call, compilation included"),
)
"""All numbers of a row, in the order of display."""
_LEAVE_OUT = ("first ms", "p20", "p80", "GB/s", f"{TIMES} eager's")
"""Columns that a narrow terminal lacks, one after the other."""
_CASE = ("operation", "mode", "shape", "dtype")
_OURS = "the fastest backend"
_BEST = "the fastest of the others with right results, torch eager and torch.compile among them"
_VERDICT = "time of the best peer over ours"


def summary(found: Iterable[Contest]) -> Table:
    """A row for each case: this library's fastest backend against the fastest of all others."""
    columns = [*((title, "") for title in _CASE), ("ours, ms", _OURS), ("best peer, ms", _BEST), ("verdict", _VERDICT)]
    rows = [[Cell(text, text) for text in one.rows[0].case[:4]] + verdict_cells(one) for one in found]
    return Table("cases", columns, rows, texts=len(_CASE))


def summary_by_mode(found: Iterable[Contest]) -> Table:
    """The same with a row for each operation, shape and dtype, and the modes next to each other."""
    cases = {(one.op, one.shape, one.dtype, one.mode): one for one in found}
    modes = list(dict.fromkeys(mode for *_, mode in cases))
    columns = [(title, "") for title in ("op", "shape", "dtype")]
    columns += [(title, "") for mode in modes for title in (f"{mode}, ms", "best peer, ms", "verdict")]
    rows = [
        [Cell(f"`{op}`"), Cell(shape), Cell(dtype)]
        + [cell for mode in modes for cell in verdict_cells(cases.get((op, shape, dtype, mode)))]
        for op, shape, dtype in dict.fromkeys(key[:3] for key in cases)
    ]
    return Table("cases", columns, rows, texts=3)


def verdict_cells(contest: Contest | None) -> list[Cell]:
    """Time of ours, time of the best peer, and verdict; sorted by the ratio even where it is noise."""
    if contest is None:
        return [Cell(NOTHING)] * 3
    found = verdict(contest)
    style = {"faster": "good", "slower": "bad"}.get(found.word, "") if found else ""
    last = Cell(verdict_text(contest), found.ratio if found else None, style)
    return [_time_cell(contest, "ours"), _time_cell(contest, "baseline", "peer"), last]


def verdict_text(contest: Contest) -> str:
    """The speedup over the best of the others in a case, or that the difference is noise."""
    found = verdict(contest)
    if found is None or found.word == "level":
        return LEVEL if found else NOTHING
    return times(found.ratio) if found.word == "faster" else f"{times(found.ratio)} ({found.word})"


def time_text(contest: Contest, *kinds: str) -> str:
    """The median in ms and the name of the fastest candidate of these kinds; the reason if none has a time."""
    row = contest.fastest(*kinds)
    if row is None:
        return next((row.mark for row in contest.rows if row.kind in kinds and row.mark), NOTHING)
    return f"{significant(row.median_ms or 0.0)} {row.candidate.removeprefix(OURS).strip()}".strip()


def _time_cell(contest: Contest, *kinds: str) -> Cell:
    row, text = contest.fastest(*kinds), time_text(contest, *kinds)
    if row is None:
        return Cell(text, None, "" if text == NOTHING else "bad")
    return Cell(text, row.median_ms, "best" if row is contest.fastest() else "")


def all_rows(found: Sequence[Contest], columns: Sequence[Column] = COLUMNS, case: Sequence[str] = ()) -> Table:
    """Every row with its numbers.

    Args:
        found: the contests.
        columns: the numbers.
        case: columns that name the case, of `op`, `mode`, `shape` and `dtype`.
    """
    titles = [(title, "") for title in (*case, "candidate")]
    rows = [
        [*(Cell(getattr(row, name), getattr(row, name)) for name in case), Cell(row.candidate, row.candidate, row.kind)]
        + [_number(contest, row, column) for column in columns]
        for contest in found
        for row in contest.rows
    ]
    numbers = [(column.title, column.meaning) for column in columns]
    return Table("rows", [*titles, *numbers], rows, texts=len(titles))


def _number(contest: Contest, row: Row, column: Column) -> Cell:
    if row.failure is not None:
        return Cell(row.mark, None, "bad") if column is COLUMNS[0] else Cell(NOTHING)
    value = column.value(contest, row)
    if value is None:
        return Cell(NOTHING)
    best = column is COLUMNS[0] and row is contest.fastest()
    good = column.value is Contest.speedup and row.kind == "ours" and value > 1
    return Cell(column.text(value), value, "best" if best else "good" if good else "")


def failures(found: Iterable[Contest]) -> dict[str, str]:
    """Reasons why rows have no time, by case and candidate."""
    return {f"{one.title}: {row.candidate}": row.failure for one in found for row in one.rows if row.failure}


def tally_text(found: Sequence[Contest]) -> str:
    """The number of cases in which this library is faster than all others, as a sentence."""
    words = [one.word for one in map(verdict, found) if one is not None]
    return (
        f"Against the fastest of all others with right results, plain PyTorch among them: faster in "
        f"{words.count('faster')} of {len(words)} cases, {LEVEL} in {words.count('level')}, "
        f"slower in {words.count('slower')}."
    )


def machine_facts(machine: Machine) -> dict[str, str]:
    """The facts about a machine and its run, without empty ones."""
    facts = {
        "device": machine.name,
        "CPU threads": str(machine.threads),
        "copy": f"{significant(machine.copy_gbps)} GB/s",
        **{f"{dtype} matmul": f"{significant(rate)} TFLOP/s" for dtype, rate in machine.matmul_tflops.items()},
        "last-level cache": f"{machine.cache_bytes / 2**20:.0f} MiB",
        **{name: significant(value) for name, value in machine.clocks.items()},
        "load": "one spinning process per core" if machine.busy else "",
        "date": machine.date,
        "commit": machine.commit,
        "evakernels from": machine.package,
        "command": machine.command,
    }
    return {name: text for name, text in facts.items() if text}


# --- the terminal ---------------------------------------------------------------------------------------------------


def make_console() -> Console:
    """Standard output; 120 columns wide if it is a pipe."""
    console = Console(highlight=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(highlight=False, width=PIPED_WIDTH)


def print_results(results: Results) -> None:
    """Print this library against the best of the others, then a table for each operation, mode and dtype.

    Columns without values are left out; in a narrow terminal also the less important ones.
    """
    console, found = make_console(), contests(results.rows)
    facts = machine_facts(results.machine)
    name, command = facts.pop("device"), facts.pop("command", "")
    console.print(Text(name, "bold"))
    console.print(Text(" · ".join(f"{fact} {text}" for fact, text in facts.items())))
    console.print(Text(" · ".join(f"{package} {text}" for package, text in results.machine.versions.items()), "dim"))
    console.print(Text(command, "dim"))
    print_notes(console, results.machine.notes)
    console.print(Text("\nours against the best peer", "bold"))
    console.print(summary(found).to_terminal())
    for group in grouped(found, lambda contest: (contest.op, contest.mode, contest.dtype)).values():
        _print_group(console, group)
    print_notes(console, results.machine.notes)  # once more: the lines above may have scrolled away
    for name, reason in results.absent.items():
        console.print(Text(f"absent: {name}, {reason}", "dim"))


def print_notes(console: Console, notes: Iterable[str]) -> None:
    """Print the reasons to doubt the numbers."""
    for note in notes:
        console.print(Text(f"! {note}", "bold yellow"))


def _print_group(console: Console, group: list[Contest]) -> None:
    measured = [(contest, row) for contest in group for row in contest.measured]
    columns = [column for column in COLUMNS if any(column.value(*one) is not None for one in measured)]
    for title in ("", *_LEAVE_OUT):
        columns = [column for column in columns if column.title != title]
        table = all_rows(group, columns, ("shape",)).to_terminal()
        if Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width:
            break
    console.print(Text.assemble("\n", (group[0].op, "bold"), f" · {group[0].mode} · {group[0].dtype}"))
    console.print(table)
    for title, reason in failures(group).items():
        console.print(Text(f"{title}: {reason}", "red"))


def print_operations(operations: Sequence[Operation], device: str) -> None:
    """Print the operations, their inputs, shapes and candidates on `device`, and who is absent and why."""
    console = make_console()
    for op in operations:
        found, absent = candidates(op, device)
        console.print(Text.assemble((op.name, "bold"), f"  {op.summary}", (f"  ({', '.join(op.modes)})", "dim")))
        facts = RichTable.grid(padding=(0, 2))
        facts.add_column(min_width=12, style="dim")
        facts.add_column()
        facts.add_row("  inputs", Text(str(signature(op.eager))))
        facts.add_row("  shapes", Text(", ".join(op.shapes.get(device, ())) or "none; give one with --shape"))
        if op.raw_sizes:
            facts.add_row("  sizes", f"{' x '.join(op.raw_sizes)}, such as --shape {op.small}")
        facts.add_row("  candidates", Text(", ").join(Text(one.name, _STYLES.get(one.kind, "")) for one in found))
        for reason, names in grouped(absent, absent.__getitem__).items():
            facts.add_row("  absent", Text(f"{', '.join(names)}: {reason}"))
        console.print(facts)
        console.print()
