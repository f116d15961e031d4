"""The audit on the terminal, and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from rich import box
from rich.table import Table
from rich.text import Text

from benchmarks.audit.occupancy import SHARED, occupancy, source_of
from benchmarks.audit.result import Count, Launch
from benchmarks.audit.triton import Row, traffic
from benchmarks.columns import NOTHING, TIMES, percent, significant
from benchmarks.table import make_console
from evaclip.atomic import write_text

PREDICTED = "predicted from counted accesses, not measured"
_MEANING = (
    f"requested: sectors of 32 bytes over the floor, each input read once and each output written once ({TIMES}); "
    "of weights and the like, which caches keep, each once a kernel",
    f"touched: different sectors over the floor ({TIMES}), the traffic of perfect caches; "
    f"cached: what small buffers are asked for again ({TIMES} the floor)",
    f"memory: bytes past a cache of 1 MiB, as small as the GPU that is played, over the floor ({TIMES}); "
    "the blocks that run at the same time share it",
    "load, store: bytes of a warp's request to a large buffer, 512 at most; "
    "ways: words that the busiest bank of shared memory gives for a request, mean and worst, 1 is no conflict",
    "barriers: of a block, in the largest kernel; warps: share of a multiprocessor's, "
    "of the largest kernel, by registers and shared memory, CUDA's formula",
)


def print_audit(counts: Sequence[Count]) -> None:
    """One table for each operation."""
    console = make_console()
    console.print(Text(f"GPU kernels, {PREDICTED}", "bold yellow"))
    for name, group in groupby(counts, lambda count: count.op):
        console.print()
        console.print(Text(name, "bold"))
        console.print(_table(list(group)))
    console.print()
    for line in _MEANING:
        console.print(Text(line, "dim"))


def print_triton_audit(rows: Sequence[Row]) -> None:
    """One table of all kernels."""
    console = make_console()
    console.print(Text(f"Triton kernels, {PREDICTED}", "bold yellow"))
    console.print()
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    for title in ("operation, shape, dtype, direction", "kernel"):
        table.add_column(title)
    for title in ("floor\nMB", "loaded\nMB", "stored\nMB", "traffic", "useful"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("read again, by the L2 cache")
    for _, group in groupby(rows, lambda row: (row.op, row.shape, row.dtype, row.direction)):
        kernels = list(group)
        for row in kernels:
            table.add_row(*_triton_cells(row, traffic(kernels)))
    console.print(table)
    console.print()
    for line in _TRITON_MEANING:
        console.print(Text(line, "dim"))


_TRITON_MEANING = (
    f"traffic: different bytes of all kernels of the call over the floor ({TIMES}); a second kernel reads anew",
    "useful: multiplications in matrix products by formula over those that are made; the rest is padding of tiles",
    f"read again: what a kernel loads more than once, and how often ({TIMES})",
)


def _triton_cells(row: Row, ratio: float) -> list[str]:
    sizes = [significant(size / 1e6) for size in (row.floor, row.loaded, row.stored)]
    again = ", ".join(f"{name.replace(', ', ' ')} {times:g}" for name, times in row.again.items())
    useful = NOTHING if row.useful is None else percent(row.useful)
    title = f"{row.op} {row.shape} {row.dtype} {row.direction}"
    return [title, row.kernel, *sizes, f"{ratio:.3f}", useful, again or NOTHING]


def write_json(counts: Sequence[Count], rows: Sequence[Row], file: Path) -> None:
    """All that was counted, and what the table shows of it."""
    shown = [asdict(count) | {"shown": dict(zip(_TITLES, _cells(count), strict=True))} for count in counts]
    stored = {"what": PREDICTED, "counts": shown, "triton": [asdict(row) for row in rows]}
    write_text(file, json.dumps(stored, indent=1) + "\n")


_TITLES = ("floor MB", "requested", "touched", "cached", "memory", "load", "store", "ways", "barriers", *SHARED)


def _table(counts: list[Count]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False, pad_edge=False)
    table.add_column("shape, dtype, direction")
    for title in _TITLES:
        table.add_column(title.replace(" ", "\n"), justify="right", no_wrap=True)
    for count in counts:
        table.add_row(f"{count.shape} {count.dtype} {count.direction}", *_cells(count))
    return table


def _cells(count: Count) -> list[str]:
    ratios = [f"{ratio:.3f}" for ratio in (count.traffic, count.touched, count.cached, count.past_cache)]
    requests = [f"{size:.0f}" for size in (count.bytes_a_load, count.bytes_a_store)]
    main = _largest(count)
    return [significant(count.floor / 1e6), *ratios, *requests, _ways(count), f"{main.barriers:.1f}", *_shares(main)]


def _largest(count: Count) -> Launch:
    """The kernel that moves the most."""
    return max(count.launches, key=_bytes_of)


def _bytes_of(launch: Launch) -> int:
    return sum(traffic.bytes for traffic in [*launch.loads.values(), *launch.stores.values()])


def _ways(count: Count) -> str:
    ways = [launch.shared_ways for launch in count.launches if launch.shared_ways is not None]
    return f"{max(ways):.2f} {count.worst_ways}" if ways else NOTHING


def _shares(launch: Launch) -> list[str]:
    shares = occupancy(launch.kernel, launch.threads, launch.dynamic_bytes, source_of(launch.kernel))
    return [percent(shares[arch]) if arch in shares else NOTHING for arch in SHARED]
