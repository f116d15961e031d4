"""Traffic of warps: sectors of global memory, and cycles of shared memory."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .step import Active
from .types import WARP, Array

SECTOR_SHIFT = 5
SECTOR = 1 << SECTOR_SHIFT
"""Bytes of the smallest transfer of global memory."""
IDLE = -1
_MOST_PENDING = 1 << 20


@dataclass
class Traffic:
    """Traffic of an instruction that accesses memory.

    `requests`: by warps. `sectors`: sectors of 32 bytes of global memory; for shared memory cycles, one for each
    different word of a bank. `bytes`: bytes that the threads requested. For shared memory, `least` are the cycles
    without conflicts, and `worst` the most cycles of any part of a request that would take one.
    """

    requests: int = 0
    sectors: int = 0
    bytes: int = 0
    least: int = 0
    worst: int = 0

    def add(self, other: "Traffic") -> None:
        self.requests += other.requests
        self.sectors += other.sectors
        self.bytes += other.bytes
        self.least += other.least
        self.worst = max(self.worst, other.worst)


class Requests(NamedTuple):
    """Requests of warps to some memory.

    Attributes:
        requests: warp instructions.
        bytes: different bytes of each request, summed.
        sectors: different sectors of each request, summed.
        touched: different sectors of all requests together.
    """

    requests: int = 0
    bytes: int = 0
    sectors: int = 0
    touched: int = 0


class Sectors:
    """A table of sectors, a row for each: its number, how many requests touched it, how many of them begin there, and
    the different bytes that these asked for, in all of their sectors."""

    def __init__(self) -> None:
        self._rows: list[Array] = []
        self._pending = 0

    def add(self, rows: Array, size: int) -> tuple[int, int]:
        """Takes requests: addresses [requests, 32] of accesses of `size` bytes, each within a sector, IDLE where a lane
        has none. Returns how many requests there are, and the sectors of each, summed."""
        if (rows[:, 1:] < rows[:, :-1]).any():
            rows = np.sort(rows, axis=1)
        sectors = rows >> SECTOR_SHIFT
        new, other = sectors != IDLE, rows != IDLE
        new[:, 1:] &= sectors[:, 1:] != sectors[:, :-1]
        other[:, 1:] &= rows[:, 1:] != rows[:, :-1]
        numbers = sectors[new]
        counts = new.sum(1)
        first = np.cumsum(counts) - counts
        entries = np.zeros((len(numbers), 4), np.int64)
        entries[:, 0], entries[:, 1] = numbers, 1
        entries[first, 2], entries[first, 3] = 1, other.sum(1) * size
        self._rows.append(entries)
        self._pending += len(entries)
        if self._pending > _MOST_PENDING:
            self.table()
        return len(rows), len(entries)

    def table(self) -> Array:
        """[sectors, 4], in the order of their numbers."""
        rows = np.concatenate([np.zeros((0, 4), np.int64), *self._rows])
        numbers, place = np.unique(rows[:, 0], return_inverse=True)
        sums = [np.bincount(place, rows[:, column], len(numbers)) for column in (1, 2, 3)]
        table = np.column_stack([numbers, *sums]).astype(np.int64)
        self._rows, self._pending = [table], 0
        return table

    def within(self, start: int, end: int) -> Requests:
        """Requests to the addresses [start, end), extended to whole sectors."""
        table = self._rows[0] if self._pending == 0 and len(self._rows) == 1 else self.table()
        first, last = np.searchsorted(table[:, 0], (start >> SECTOR_SHIFT, (end - 1 >> SECTOR_SHIFT) + 1))
        times, requests, byte_count = (int(n) for n in table[first:last, 1:].sum(0))
        return Requests(requests, byte_count, times, int(last - first))


def by_warp(active: Active | None, values: Array) -> Array:
    """[warps, 32] of the warps that have active threads; IDLE where a thread is not."""
    if active is None:
        return values.reshape(-1, WARP)
    spread = np.full(len(active.mask), IDLE, values.dtype)
    spread[active.lanes] = values
    rows = spread.reshape(-1, WARP)
    return rows[active.mask.reshape(-1, WARP).any(1)]


def cycles(active: Active | None, addresses: Array, size: int) -> Traffic:
    """Traffic of shared memory.

    The words of a warp are served at once, those of 8 and 16 bytes by halves and quarters.
    """
    words = by_warp(active, addresses >> 2)
    each = max(1, size // 4)
    parts = words.reshape(-1, WARP // each)
    parts = parts[(parts != IDLE).any(1)]
    if each > 1:
        wide = parts[:, :, None] + np.arange(each)
        parts = np.where(parts[:, :, None] == IDLE, IDLE, wide).reshape(len(parts), -1)
    ways = ways_of_rows(parts)
    return Traffic(len(words), int(ways.sum()), len(addresses) * size, len(ways), int(ways.max(initial=0)))


def ways_of_rows(rows: Array) -> Array:
    """Each row holds words that are asked for at once: the most different ones that a bank has."""
    ordered = np.sort(rows, axis=1)
    different = ordered != IDLE
    different[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    numbers = np.broadcast_to(np.arange(len(ordered))[:, None], ordered.shape)[different]
    load = np.bincount(numbers * WARP + ordered[different] % WARP, minlength=len(ordered) * WARP)
    ways: Array = load.reshape(-1, WARP).max(1)
    return ways
