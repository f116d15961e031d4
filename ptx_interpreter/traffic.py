"""Counts cycles of shared memory."""

import numpy as np

from .report import Traffic
from .sectors import IDLE
from .step import Active
from .types import WARP, Array


def by_warp(active: Active | None, values: Array) -> Array:
    """[warps, 32] of the warps that have active threads; IDLE where a thread is not."""
    if active is None:
        return values.reshape(-1, WARP)
    spread = np.full(len(active.mask), IDLE, values.dtype)
    spread[active.lanes] = values
    rows = spread.reshape(-1, WARP)
    return rows[active.mask.reshape(-1, WARP).any(1)]


def cycles(active: Active | None, addresses: Array, size: int) -> Traffic:
    """Of shared memory. The words of a warp are served at once, those of 8 and 16 bytes by halves and quarters."""
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
