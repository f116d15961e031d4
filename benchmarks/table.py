"""The terminal's tables: results, and what can be measured."""

import os
from collections.abc import Iterable, Sequence
from inspect import signature

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from benchmarks.candidates import candidates
from benchmarks.columns import (
    BANDWIDTH,
    COLUMNS,
    ERROR,
    ERROR_RATIO,
    FIRST,
    MEDIAN,
    NOTHING,
    P20,
    P80,
    SPEEDUP,
    Column,
    machine_facts,
    time_text,
    verdict_text,
)
from benchmarks.contests import Contest, contests, panels, verdict
from benchmarks.operation import Operation
from benchmarks.results import Machine, Results, Row

PIPED_WIDTH = 120
_LEAVE_OUT = (FIRST, P20, P80, BANDWIDTH, ERROR_RATIO)
"""What a narrow terminal goes without, one after the other."""
_STYLES = {"ours": "bold cyan", "baseline": "", "peer": "magenta"}


def print_table(results: Results) -> None:
    """Prints this library against the best of the others, then everything: a table a operation, mode and dtype.

    Columns that a table has no values for are left out; in a narrow terminal also the less important ones.
    """
    console, found = make_console(), contests(results.rows)
    print_machine(console, results.machine)
    _print_summary(console, found)
    for group in panels(found).values():
        _print_group(console, group)
    print_notes(console, results.machine.notes)
    print_absent(console, results.absent)


def print_operations(operations: Sequence[Operation], device: str) -> None:
    """Prints the operations, their inputs, default shapes and candidates on `device`, and who is absent and why."""
    console = make_console()
    for op in operations:
        found, absent = candidates(op, device)
        line = Text.assemble((op.name, "bold"), "  ", op.summary, (f"  ({', '.join(op.modes)})", "dim"))
        facts = Table.grid(padding=(0, 2))
        facts.add_column(min_width=12, style="dim")
        facts.add_column()
        facts.add_row("  inputs", Text(str(signature(op.eager))))
        facts.add_row("  shapes", ", ".join(op.shapes[device]))
        if op.raw_sizes:
            facts.add_row(
                "  sizes", f"{' x '.join(op.raw_sizes)}, such as --shape {'x'.join('64' for _ in op.raw_sizes)}"
            )
        facts.add_row("  candidates", Text(", ").join(Text(one.name, _STYLES[one.kind]) for one in found))
        for name, reason in absent.items():
            facts.add_row("  absent", f"{name}: {reason}")
        console.print(line, facts, "", sep="\n")


def make_console() -> Console:
    """Standard output, wide enough for a table also where it is no terminal."""
    console = Console(highlight=False)
    if console.is_terminal or "COLUMNS" in os.environ:
        return console
    return Console(highlight=False, width=PIPED_WIDTH)


def plain_table(*titles: str, texts: int = 1) -> Table:
    """A table without lines but that below its head; its columns are so many of texts, and then numbers."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for number, title in enumerate(titles):
        if number < texts:
            table.add_column(title, overflow="fold")
        else:
            table.add_column(title, justify="right", no_wrap=True)
    return table


def print_machine(console: Console, machine: Machine) -> None:
    facts = machine_facts(machine)
    name, command = facts.pop("device"), facts.pop("command", "")
    console.print(Text(name, "bold"))
    console.print(" · ".join(f"{what} {text}" for what, text in facts.items()), markup=False)
    console.print(
        " · ".join(f"{what} {version}" for what, version in machine.versions.items()), style="dim", markup=False
    )
    console.print(command, style="dim", markup=False)
    print_notes(console, machine.notes)


def print_notes(console: Console, notes: Iterable[str]) -> None:
    """Before the tables and after them: the lines before may have scrolled away."""
    for note in notes:
        console.print(Text(f"! {note}", "bold yellow"))


def print_absent(console: Console, absent: dict[str, str]) -> None:
    for name, reason in absent.items():
        console.print(Text.assemble((f"absent: {name}", "dim"), (f", {reason}", "dim")))


def _print_summary(console: Console, found: Sequence[Contest]) -> None:
    table = plain_table("operation", "mode", "shape", "dtype", "ours, ms", "best peer, ms", "verdict", texts=7)
    for contest in found:
        one = verdict(contest)
        style = {"faster": "green", "slower": "yellow"}.get(one.word, "") if one else ""
        names = (contest.op, contest.mode, contest.shape, contest.dtype)
        times = (time_text(contest, "ours"), time_text(contest, "baseline", "peer"))
        table.add_row(*map(Text, (*names, *times)), Text(verdict_text(contest), style))
    console.print(Text("\nours against the best peer", "bold"))
    console.print(table)


def _print_group(console: Console, group: list[Contest]) -> None:
    columns = _used_columns(group)
    for column in (None, *_LEAVE_OUT):
        columns = [kept for kept in columns if kept is not column]
        table = _group_table(group, columns)
        if Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width:
            break
    first = group[0]
    console.print()
    console.print(Text.assemble((first.op, "bold"), f" · {first.mode} · {first.dtype}"))
    console.print(table)
    for contest in group:
        for row in contest.rows:
            if row.failure is not None:
                console.print(Text(f"{row.candidate}, {row.shape}: {row.failure}", "red"))


def _used_columns(group: list[Contest]) -> list[Column]:
    rows = [(contest, row) for contest in group for row in contest.measured]
    return [column for column in COLUMNS if any(column.value(*row) is not None for row in rows)]


def _group_table(group: list[Contest], columns: list[Column]) -> Table:
    table = plain_table("shape, candidate", *(column.title.replace(" ", "\n") for column in columns))
    for contest in group:
        table.add_row(Text(contest.shape, "bold"))
        for row in contest.rows:
            table.add_row(Text(f"  {row.candidate}", _STYLES[row.kind]), *_cells(contest, row, columns))
    return table


def _cells(contest: Contest, row: Row, columns: list[Column]) -> list[Text]:
    if row.failure is not None:
        return [Text(row.mark, "red") if column is MEDIAN else Text(NOTHING) for column in columns]
    return [Text(column.show(contest, row), _style(contest, row, column)) for column in columns]


def _style(contest: Contest, row: Row, column: Column) -> str:
    if column in (ERROR, ERROR_RATIO) and row.breaks_error_rule:
        return "bold red"
    if column is SPEEDUP and row.kind == "ours":
        return "green" if (contest.speedup(row) or 0) > 1 else "yellow"
    return "bold" if column is MEDIAN else ""
