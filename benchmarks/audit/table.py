"""The audit on the terminal."""

from collections.abc import Sequence
from itertools import groupby

from rich.text import Text

from benchmarks.audit.pipes import PIPES
from benchmarks.audit.result import Count, Line
from benchmarks.render import NOTHING, TIMES, Cell, Table, make_console, significant

MOST_LINES = 10
_MEANING = (
    f"requested: sectors of 32 bytes over the floor, each input read once and each output written once ({TIMES}); "
    "small buffers such as weights, which caches keep, once a kernel",
    f"touched: different sectors of each kernel over the floor ({TIMES}), the traffic with perfect caches; "
    f"cached: repeated requests for small buffers ({TIMES} the floor)",
    "load, store: bytes of a warp's request to a large buffer, at most 512; "
    "ways: cycles of shared memory over those without conflicts, mean and worst, 1 is no conflict",
    "the others are warp instructions by pipe, without moves of registers, and sectors of global memory; "
    "barriers: of a warp",
)
_CALL = ("floor MB", "requested", "touched", "cached", "load", "store", "ways")
_COUNTS = (*PIPES, "sectors")


def print_audit(counts: Sequence[Count], *, explain: bool = False) -> None:
    """Two tables for each operation and architecture, of calls and of their kernels; and, to explain, the most
    expensive lines of the source."""
    console = make_console()
    console.print(Text("GPU kernels, counted in their PTX, not measured", "bold yellow"))
    for (name, kernels, arch), group in groupby(counts, lambda count: (count.op, count.kernels, count.arch)):
        found = list(group)
        console.print()
        console.print(Text(f"{name}: {kernels}, {arch}", "bold"))
        calls = [(_title(count), *_call_cells(count)) for count in found]
        console.print(_table("shape, dtype, direction", _CALL, calls).to_terminal())
        kernels_of_calls = [
            (launch.kernel, *_numbers(launch.total), f"{launch.barriers:.1f}")
            for count in found
            for launch in count.launches
        ]
        console.print(_table("kernel", (*_COUNTS, "barriers"), kernels_of_calls).to_terminal())
        for count in found if explain else ():
            lines = [[line.place, *_numbers(line)] for line in costly_lines(count)]
            console.print(_table(f"line of {_title(count)}", _COUNTS, lines).to_terminal())
    console.print()
    for line in _MEANING:
        console.print(Text(line, "dim"))


def _table(first: str, titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    columns = [(title, "") for title in (first, *titles)]
    return Table(first, columns, [[Cell(text) for text in row] for row in rows])


def _title(count: Count) -> str:
    return f"{count.shape} {count.dtype} {count.direction}"


def _call_cells(count: Count) -> list[str]:
    ratios = [f"{ratio:.3f}" for ratio in (count.traffic, count.touched, count.cached)]
    requests = [f"{size:.0f}" for size in map(count.request_bytes, ("loads", "stores"))]
    shared = [launch.total.shared for launch in count.launches]
    ways = [traffic.sectors / traffic.least for traffic in shared if traffic.least]
    mean_and_worst = f"{max(ways):.2f} {count.worst_ways}" if ways else NOTHING
    return [significant(count.floor / 1e6), *ratios, *requests, mean_and_worst]


def _numbers(line: Line) -> list[str]:
    return [f"{number:,}" for number in (*(line.warps[pipe] for pipe in PIPES), line.memory.sectors)]


def costly_lines(count: Count, most: int = MOST_LINES) -> list[Line]:
    """Return the lines with the most instructions and sectors, of all kernels of a call."""
    lines = [line for launch in count.launches for line in launch.lines]
    return sorted(lines, key=_cost, reverse=True)[:most]


def _cost(line: Line) -> int:
    return sum(line.warps[pipe] for pipe in PIPES) + line.memory.sectors
