"""Global memory: the memory of this process at its own addresses, and the parts that kernels may access."""

import ctypes
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .types import CARRIERS, Array

BASE = 1 << 16
"""Below is no memory; a multiple of all word sizes."""
_BYTES = np.frombuffer(memoryview((ctypes.c_uint8 * ((1 << 47) - 2 * BASE)).from_address(BASE)), np.uint8)
WORDS: dict[int, Array] = {
    size: _BYTES[: len(_BYTES) // size * size].view(carrier) for size, carrier in CARRIERS.items()
}
"""The whole process as words of so many bytes. The word at address a is number (a - BASE) / size."""
MANY = -1
"""Several blocks, in place of a block's number."""
MOST_ALLOCATIONS = 1 << 17


def build_allocations(folder: Path) -> Path:
    """Compiles host/allocations.cpp for LD_PRELOAD with `CXX` or g++; returns the library in `folder`."""
    folder.mkdir(exist_ok=True)
    source, library = Path(__file__).with_name("host") / "allocations.cpp", folder / "allocations.so"
    options = ["-std=c++20", "-O2", "-fPIC", "-shared", "-fvisibility=hidden"]
    subprocess.run([os.environ.get("CXX", "g++"), *options, source, "-o", library], check=True)
    return library


@dataclass
class Shadow:
    """The last accesses to an array, by cells of its elements' size, as 1 + number of the block in the launch.

    Writers: 0 nobody ever, -1 somebody before this launch. Readers: 0 nobody, MANY several. The stamps of shared.py of
    the last ones tell threads of a block apart. `atomic`: the last write was. `written_at`, `read_at`: by the launch's
    clock.
    """

    cell: int
    writer: Array
    reader: Array
    written: Array
    read: Array
    atomic: Array
    written_at: Array
    read_at: Array

    @classmethod
    def allocate(cls, size: int, cell: int, *, written: bool) -> "Shadow":
        """The shadow of an array of `size` bytes."""
        cells = -(-size // cell)
        stamps = np.zeros(cells, np.int64), np.zeros(cells, np.int64)
        more = np.zeros(cells, bool), np.zeros(cells, np.int32), np.zeros(cells, np.int32)
        return cls(cell, np.full(cells, -int(written), np.int32), np.zeros(cells, np.int32), *stamps, *more)

    def divide(self, cell: int) -> None:
        """Makes cells smaller, for accesses that are."""
        for name in ("writer", "reader", "written", "read", "atomic", "written_at", "read_at"):
            setattr(self, name, np.repeat(getattr(self, name), self.cell // cell))
        self.cell = cell


@dataclass
class Interval:
    """Addresses that kernels may touch: [start, end)."""

    start: int
    end: int
    name: str = ""
    array: Array | None = None  # kept alive
    shadow: Shadow | None = None


@dataclass
class GlobalMemory:
    """Which memory of this process kernels may touch: arrays that are added, and allocations that are followed.

    `anywhere` lets them touch everything: a store out of bounds is then not a fault but happens. `poisoned`: masked-off
    lanes of loads have POISON, and to store it is a fault.
    """

    anywhere: bool = False
    poisoned: bool = False
    intervals: list[Interval] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._allocations: ctypes._NamedFuncPointer | None = None
        self._sort()

    def _sort(self) -> None:
        self.intervals.sort(key=lambda interval: interval.start)
        self._starts = np.array([interval.start for interval in self.intervals], np.int64)
        self._ends = np.array([interval.end for interval in self.intervals], np.int64)
        self._last: Interval | None = None

    def add(self, array: Array, name: str = "", *, written: bool = True) -> int:
        """Lets kernels touch an array, and returns its address.

        Accesses of different blocks to an element, one of them a write, are races, and those of different threads of a
        block without a barrier between them. With written=False reading what
        no kernel has written is a fault.
        """
        start = array.__array_interface__["data"][0]
        shadow = Shadow.allocate(array.nbytes, min(array.itemsize, 8), written=written)
        self.remove(start)
        self.intervals.append(Interval(start, start + array.nbytes, name, array, shadow))
        self._sort()
        return int(start)

    def hold(self, intervals: list[Interval]) -> None:
        """Lets kernels touch these and no others."""
        self.intervals = intervals
        self._sort()

    def remove(self, start: int) -> None:
        """Forgets an array that was added."""
        self.intervals = [interval for interval in self.intervals if interval.start != start]
        self._sort()

    def follow_allocations(self) -> bool:
        """Lets kernels touch what a preloaded library has seen allocated; False if there is no such library.

        The library's function `int allocations(int64_t* starts, int64_t* ends, int most)` returns their number.
        """
        try:
            self._allocations = ctypes.CDLL(None).allocations
        except AttributeError:
            return False
        return True

    def refresh(self) -> None:
        """Asks for the allocations of now. Every launch does."""
        if self._allocations is None:
            return
        starts, ends = np.empty(MOST_ALLOCATIONS, np.int64), np.empty(MOST_ALLOCATIONS, np.int64)
        pointers = (ctypes.c_void_p(v.ctypes.data) for v in (starts, ends))
        count = self._allocations(*pointers, MOST_ALLOCATIONS)
        added = [interval for interval in self.intervals if interval.array is not None]
        starts_added = {interval.start for interval in added}
        pairs = zip(starts[:count].tolist(), ends[:count].tolist(), strict=True)
        self.intervals = added + [Interval(start, end) for start, end in pairs if start not in starts_added]
        self._sort()

    def begin_launch(self, blocks: int = 0) -> None:
        """Marks earlier writes as made before this launch.

        `clock` counts atomic instructions. `released` and `acquired`: when each block of the grid made its last one
        that releases, or acquires.
        """
        self.refresh()
        self.clock = 1
        self.released, self.acquired = np.zeros((2, blocks + 1), np.int32)
        for interval in self.intervals:
            if shadow := interval.shadow:
                shadow.writer[shadow.writer > 0] = -1
                shadow.reader.fill(0)

    def find(self, addresses: Array, size: int) -> tuple[Interval | None, Array | None]:
        """The interval that holds all these accesses, if one does; and which of them none holds, or None."""
        if not len(addresses):
            return None, None
        last = self._last
        if last and last.start <= addresses.min() and addresses.max() + size <= last.end:
            return last, None
        if not self.intervals:
            return None, None if self.anywhere else np.ones(len(addresses), bool)
        at = np.searchsorted(self._starts, addresses, "right") - 1
        outside = (at < 0) | (addresses + size > self._ends[at])
        if outside.any():
            return None, None if self.anywhere else outside
        if (at == at[0]).all():
            self._last = self.intervals[at[0]]
            return self._last, None
        return None, None

    def holders(self, addresses: Array) -> list[tuple[Interval, Array]]:
        """The intervals of accesses that are all inside some, each with a mask."""
        at = np.searchsorted(self._starts, addresses, "right") - 1
        return [(self.intervals[number], at == number) for number in np.unique(at) if number >= 0]

    def near(self, address: int) -> str:
        """Where an address is, in words: in or next to the nearest array, one with a name if there is any."""
        intervals = [interval for interval in self.intervals if interval.name] or self.intervals
        if not intervals:
            return "where no array is"
        nearest = min(intervals, key=lambda interval: max(interval.start - address, address - interval.end))
        past, before = address - nearest.end, nearest.start - address
        where = f"{past} bytes past the end of" if past >= 0 else f"at byte {-before} of"
        where = f"{before} bytes before" if before > 0 else where
        return f"{where} {nearest.name or hex(nearest.start)} ({nearest.end - nearest.start} bytes)"
