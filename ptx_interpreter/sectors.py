"""Traffic: requested sectors of global memory, and cycles of shared memory."""

from typing import NamedTuple

import numpy as np

from .types import Array

SECTOR_SHIFT = 5
IDLE = -1
_MOST_PENDING = 1 << 20


class Asked(NamedTuple):
    """Requests of warps to some memory: their number, different bytes and different sectors of each, summed; and
    different sectors in all."""

    requests: int
    bytes: int
    sectors: int
    touched: int


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
        found = np.zeros((len(numbers), 4), np.int64)
        found[:, 0], found[:, 1] = numbers, 1
        found[first, 2], found[first, 3] = 1, other.sum(1) * size
        self._rows.append(found)
        self._pending += len(found)
        if self._pending > _MOST_PENDING:
            self.table()
        return len(rows), len(found)

    def table(self) -> Array:
        """[sectors, 4], in the order of their numbers."""
        rows = np.concatenate([np.zeros((0, 4), np.int64), *self._rows])
        numbers, place = np.unique(rows[:, 0], return_inverse=True)
        sums = [np.bincount(place, rows[:, column], len(numbers)) for column in (1, 2, 3)]
        table = np.column_stack([numbers, *sums]).astype(np.int64)
        self._rows, self._pending = [table], 0
        return table

    def within(self, start: int, end: int) -> Asked:
        """What was asked of the addresses [start, end), to whole sectors."""
        table = self._rows[0] if self._pending == 0 and len(self._rows) == 1 else self.table()
        first, last = np.searchsorted(table[:, 0], (start >> SECTOR_SHIFT, (end - 1 >> SECTOR_SHIFT) + 1))
        times, requests, asked = (int(n) for n in table[first:last, 1:].sum(0))
        return Asked(requests, asked, times, int(last - first))
