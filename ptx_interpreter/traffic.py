"""Counts sectors of global memory and cycles of shared memory."""

import numpy as np

from .step import Active
from .types import WARP, Array

IDLE = -1


def by_warp(active: Active | None, values: Array) -> Array:
    """[warps, 32] of the warps that have active threads; IDLE where a thread is not."""
    if active is None:
        return values.reshape(-1, WARP)
    spread = np.full(len(active.mask), IDLE, values.dtype)
    spread[active.lanes] = values
    rows = spread.reshape(-1, WARP)
    return rows[active.mask.reshape(-1, WARP).any(1)]


def sectors(active: Active | None, addresses: Array) -> tuple[int, int]:
    """Requests, and the sectors of 32 bytes that each one touches, summed."""
    rows = by_warp(active, addresses >> 5)
    if (rows[:, 1:] < rows[:, :-1]).any():
        rows = np.sort(rows, axis=1)
    found = int(np.count_nonzero(rows[:, 1:] != rows[:, :-1])) + len(rows)
    if active is not None:
        found -= int(np.count_nonzero((rows == IDLE).any(1)))
    return len(rows), found


def cycles(active: Active | None, addresses: Array, size: int) -> tuple[int, int]:
    """Requests and cycles. The words of a warp are served at once, those of 8 and 16 bytes by halves and quarters."""
    words = by_warp(active, addresses >> 2)
    each = max(1, size // 4)
    parts = words.reshape(-1, WARP // each)
    parts = parts[(parts != IDLE).any(1)]
    if each > 1:
        wide = parts[:, :, None] + np.arange(each)
        parts = np.where(parts[:, :, None] == IDLE, IDLE, wide).reshape(len(parts), -1)
    return len(words), cycles_of_rows(parts)


def cycles_of_rows(rows: Array) -> int:
    """Each row holds words that are asked for at once: the most different ones that a bank has, summed."""
    if not len(rows):
        return 0
    ordered = np.sort(rows, axis=1)
    different = ordered != IDLE
    different[:, 1:] &= ordered[:, 1:] != ordered[:, :-1]
    numbers = np.broadcast_to(np.arange(len(ordered))[:, None], ordered.shape)[different]
    load = np.bincount(numbers * WARP + ordered[different] % WARP, minlength=len(ordered) * WARP)
    return int(load.reshape(-1, WARP).max(1).sum())
