"""The shared memory of blocks, and its shadow, which shows races and reads of values that aren't there, or not yet.

A stamp holds the thread that accessed a cell, and the time: the number of barriers that its block has passed (from bit
32), the number of its warp's barriers (from bit 12), and 32 + the thread in the block. Two accesses are ordered if a
barrier of the block came between, or one of the warp and both are of this warp. So races don't depend on the order in
which threads run.
"""

import numpy as np

from .types import CARRIERS, SHIFTS, WARP, Array

BLOCK_BARRIER, WARP_BARRIER = 1 << 32, 1 << 12
THREAD, WARP_OF_THREAD = 0xFFF, 0xFE0
UNWRITTEN, WRITTEN, ON_ITS_WAY, BY_ATOMIC = 0, 1, 2, 3


def first_stamps(threads: Array) -> Array:
    """Stamps of threads that have passed no barrier. No stamp is 0, which means no access."""
    return threads.astype(np.int64) + (BLOCK_BARRIER + WARP_BARRIER + WARP)


def warp_stamps(stamps: Array) -> Array:
    """Stamps of accesses that a warp makes as one: no barrier of the warp needs to follow them."""
    return stamps & ~np.int64(BLOCK_BARRIER - WARP_BARRIER)


def stamp_thread(stamp: int) -> int:
    return (stamp & THREAD) - WARP


def conflicts(before: Array, now: Array) -> Array | None:
    """Which accesses `now` aren't ordered after the ones `before`, of other threads; None if all are."""
    changed = before ^ now
    near = (changed < BLOCK_BARRIER) & (changed != 0)
    if not near.any():
        return None
    near &= (changed & THREAD) != 0
    near &= ((changed & WARP_OF_THREAD) != 0) | (changed < WARP_BARRIER)
    return np.flatnonzero(near) if near.any() else None


class SharedMemory:
    """Shared memory of `blocks` blocks, `size` bytes each. The shadow's cells are as wide as the narrowest access."""

    def __init__(self, blocks: int, size: int, cell: int) -> None:
        self.size, self.cell = size, cell
        self.pitch = -(-size // 16) * 16
        length = max(16, blocks * self.pitch)
        raw = np.empty(length + 16, np.uint8)
        skip = -raw.__array_interface__["data"][0] % 16
        self.bytes = raw[skip : skip + length]
        self.words: dict[int, Array] = {width: self.bytes.view(carrier) for width, carrier in CARRIERS.items()}
        cells = length >> SHIFTS[cell]
        # The last reader, one of another warp, and another one of its warp: one of them isn't the thread that writes.
        self.writer, self.reader, self.other_reader, self.near_reader = (np.zeros(cells, np.int64) for _ in range(4))
        self.state = np.zeros(cells, np.uint8)

    def forget(self) -> None:
        """Reset: nobody has written anything, and all values are NaN in every format."""
        self.bytes.fill(0xFF)
        for shadow in (self.writer, self.reader, self.other_reader, self.near_reader, self.state):
            shadow.fill(0)

    def cells_at(self, places: Array, size: int) -> tuple[Array, int]:
        """The cells of accesses at these bytes of all blocks' memory, and how many each takes."""
        first = places >> SHIFTS[self.cell]
        each = size >> SHIFTS[self.cell]
        if each == 1:
            return first, 1
        return (first[:, None] + np.arange(each)).reshape(-1), each

    def note_write(self, cells: Array, stamps: Array, state: int) -> bool:
        """True if several threads write a cell at once."""
        self.writer[cells] = stamps
        self.state[cells] = state
        return bool((self.writer.take(cells, mode="clip") != stamps).any())

    def note_read(self, cells: Array, stamps: Array) -> None:
        before = self.reader.take(cells, mode="clip")
        self.reader[cells] = stamps
        self._keep_others(cells, before, stamps)
        # If several threads read a cell at once, the shadow holds the last one.
        self._keep_others(cells, stamps, self.reader.take(cells, mode="clip"))

    def _keep_others(self, cells: Array, stamps: Array, others: Array) -> None:
        """Keep readers in addition to `others`, where they are other threads."""
        changed = stamps ^ others
        is_other = (changed != 0) & (changed < BLOCK_BARRIER)
        if is_other.any():
            near = (changed & WARP_OF_THREAD) == 0
            for reader, which in ((self.near_reader, is_other & near), (self.other_reader, is_other & ~near)):
                reader[cells[which]] = stamps[which]
