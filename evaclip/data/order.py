"""The order of training samples, as a pure function of seed and position.

The endless stream of epochs is numbered by one global index. Within an epoch the shards are permuted, and
the stream of their samples is cut into windows; a keyed permutation mixes the samples of each window.
Nothing depends on the batch size, the number of workers or the number of processes, so one integer says how
far a run has come.

With several canonical nodes (MosaicML Streaming's term) the stream is first cut into as many groups of equal length,
each with separate windows. Global indices alternate between the groups: every batch has equally many samples of each
group, so a machine that reads one group needs only the shards of that group.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]

PERIOD = 1000
"""Indices in which a mixture has a fixed number of samples of each source."""
_ROUNDS = 6
_SHARDS, _WINDOWS = 1, 2
_EPOCHS_KEPT = 4


def mix(seed: int, *values: int | I64 | U64) -> U64:
    """Hashes a seed and integers (arrays broadcast) to 64 bits: SplitMix64 finalisers, one per value."""
    state = _splitmix64(np.array([seed % 2**64], np.uint64))
    for value in values:
        state = _splitmix64(state ^ np.atleast_1d(value).astype(np.uint64))
    return state


def sample_order(
    num_samples: int, seed: int, window: int = 0, shard_sizes: Sequence[int] | None = None, nodes: int = 1
) -> "SampleOrder":
    """The order over `num_samples` samples, stored in shards of `shard_sizes` samples (one shard if not
    given).

    `window` is the number of samples mixed with one another; 0 mixes all, with several canonical `nodes` all of
    each. Raises ValueError for a negative window, less than one node, no samples, or shards that do not add up.
    """
    sizes = [num_samples] if shard_sizes is None else list(shard_sizes)
    if num_samples < 1 or sum(sizes) != num_samples:
        raise ValueError(f"expected shards of 1 or more samples that add up to {num_samples}, got {sum(sizes)}")
    if window < 0:
        raise ValueError(f"the shuffle window must be 0 (everything) or more, got {window}")
    if not 1 <= nodes <= num_samples:
        raise ValueError(f"there must be 1 or more canonical nodes and at most one a sample, got {nodes}")
    return SampleOrder(sizes, seed, min(window, num_samples) or num_samples, nodes)


class NodeOrder(Protocol):
    """The canonical nodes of global indices."""

    def nodes(self, global_indices: I64, /) -> I64:
        """The canonical nodes [n], from 0, that the samples of global indices [n] belong to."""

    def counts(self, global_indices: I64, /) -> I64:
        """For each global index [n] and node, how many smaller ones belong to the node: [n, nodes]."""


def rows_by_node(order: NodeOrder, batch: range, rows: range) -> I64:
    """`rows` of the global indices in `batch` after a stable sort by canonical node, computed without the others."""
    inner = np.arange(batch.start // PERIOD + 1, -(-batch.stop // PERIOD), dtype=np.int64) * PERIOD
    marks = np.concatenate([[batch.start], inner, [batch.stop]])
    counts = order.counts(marks)
    counts -= counts[0]
    # Indices of one node between two marks fill the sorted rows from `firsts` to `ends`.
    before = np.cumsum(counts[-1]) - counts[-1]
    firsts, ends = before + counts[:-1], before + counts[1:]
    hit = (firsts < rows.stop) & (ends > rows.start)
    spans = np.flatnonzero(hit.any(axis=1))
    if not len(spans):
        return np.empty(0, np.int64)
    indices = np.concatenate([np.arange(marks[span], marks[span + 1]) for span in spans])
    nodes = order.nodes(indices)
    chosen = hit[np.searchsorted(marks, indices, side="right") - 1, nodes]
    indices = indices[chosen][np.argsort(nodes[chosen], kind="stable")]
    skipped = rows.start - int(firsts[hit].min())
    found: I64 = indices[skipped : skipped + len(rows)]
    return found


class SampleOrder:
    """Maps global indices to sample indices; memory is O(shards), not O(samples)."""

    def __init__(self, shard_sizes: Sequence[int], seed: int, window: int, nodes: int = 1) -> None:
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._starts = np.cumsum(self._sizes) - self._sizes
        self._seed = seed
        self._window = window
        self._shard_orders: dict[int, _ShardOrder] = {}
        self.num_samples = int(self._sizes.sum())
        self.num_shards = len(self._sizes)
        # Of positions 0 to n - 1 each node gets every nodes-th.
        self._lengths = (self.num_samples - np.arange(nodes) + nodes - 1) // nodes
        self._firsts = np.cumsum(self._lengths) - self._lengths

    def indices(self, global_indices: I64) -> I64:
        """The sample indices [n] of global indices [n]."""
        epochs, positions = np.divmod(global_indices, self.num_samples)
        samples = np.empty_like(positions)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            samples[chosen] = self._in_epoch(int(epoch), positions[chosen])
        return samples

    def nodes(self, global_indices: I64) -> I64:
        """As `NodeOrder.nodes`."""
        return global_indices % self.num_samples % len(self._lengths)

    def counts(self, global_indices: I64) -> I64:
        """As `NodeOrder.counts`."""
        epochs, positions = np.divmod(global_indices[:, None], self.num_samples)
        nodes = len(self._lengths)
        counts: I64 = epochs * self._lengths + (positions - np.arange(nodes) + nodes - 1) // nodes
        return counts

    def nearby(self, global_index: int, draw: int) -> int:
        """The index of a sample of the same window, which `draw`, any number, determines."""
        epoch, position = divmod(global_index, self.num_samples)
        offset, node = divmod(position, len(self._lengths))
        first = offset // self._window * self._window
        length = min(self._window, int(self._lengths[node]) - first)
        other = (first + draw % length) * len(self._lengths) + node
        return int(self.indices(np.array([epoch * self.num_samples + other], np.int64))[0])

    def shards(self, global_indices: I64) -> tuple[list[int], list[int]]:
        """The shards of the windows that these indices lie in, and those of the windows that come after them."""
        epochs, positions = np.divmod(global_indices, self.num_samples)
        offsets, nodes = np.divmod(positions, len(self._lengths))
        now = np.unique(np.stack([epochs, nodes, offsets // self._window], axis=1), axis=0).tolist()
        after = []
        for epoch, node, window in now:
            ends = (window + 1) * self._window >= self._lengths[node]
            after.append((epoch + 1, node, 0) if ends else (epoch, node, window + 1))
        return self._shards_of(now), self._shards_of(after)

    def _shards_of(self, windows: Iterable[tuple[int, int, int]]) -> list[int]:
        shards: dict[int, None] = {}
        for epoch, node, window in windows:
            first = self._firsts[node] + window * self._window
            last = self._firsts[node] + min((window + 1) * self._window, self._lengths[node]) - 1
            order = self._shard_order(epoch)
            slots = np.searchsorted(order.ends, [first, last], side="right")
            shards |= dict.fromkeys(order.order[slots[0] : slots[1] + 1].tolist())
        return list(shards)

    def _in_epoch(self, epoch: int, positions: I64) -> I64:
        offsets, nodes = np.divmod(positions, len(self._lengths))
        windows = offsets // self._window
        first = windows * self._window
        lengths = np.minimum(self._window, self._lengths[nodes] - first)
        keys = mix(self._seed, epoch, _WINDOWS, windows * len(self._lengths) + nodes)
        stream = self._firsts[nodes] + first + _permute(offsets - first, lengths, keys)
        shards = self._shard_order(epoch)
        slots = np.searchsorted(shards.ends, stream, side="right")
        samples: I64 = self._starts[shards.order[slots]] + stream - (shards.ends - shards.sizes)[slots]
        return samples

    def _shard_order(self, epoch: int) -> "_ShardOrder":
        if epoch not in self._shard_orders:
            # Not numpy's generators: their streams may change between versions, and a position must keep
            # its meaning.
            order = np.argsort(mix(self._seed, epoch, _SHARDS, np.arange(len(self._sizes))), kind="stable")
            sizes = self._sizes[order]
            if len(self._shard_orders) >= _EPOCHS_KEPT:
                self._shard_orders.clear()
            self._shard_orders[epoch] = _ShardOrder(order, sizes, np.cumsum(sizes))
        return self._shard_orders[epoch]


class _ShardOrder(NamedTuple):
    order: I64
    sizes: I64
    ends: I64


def _permute(values: I64, lengths: I64, keys: U64) -> I64:
    """A keyed permutation of [0, length), element by element: a Feistel network with cycle walking.

    The network permutes the next power of four; values that leave the range go through it again until they
    are back (Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002).
    """
    bits = np.ceil(np.log2(np.maximum(lengths, 2))).astype(np.uint64)
    half = (bits + np.uint64(1)) // np.uint64(2)
    result = values.astype(np.uint64)
    limits = lengths.astype(np.uint64)
    walking = np.arange(len(values))
    while len(walking):
        result[walking] = _feistel(result[walking], half[walking], keys[walking])
        walking = walking[result[walking] >= limits[walking]]
    return result.astype(np.int64)


def _feistel(values: U64, half: U64, keys: U64) -> U64:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for step in range(_ROUNDS):
        left, right = right, left ^ (_splitmix64(right ^ _splitmix64(keys + np.uint64(step))) & mask)
    return (left << half) | right


def _splitmix64(state: U64) -> U64:
    """Sebastiano Vigna's SplitMix64 step and finaliser."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
