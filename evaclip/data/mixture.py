"""Several data sets as one, in given proportions within every batch, with one common position."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from evaclip.data.order import I64, SampleOrder, mix, sample_order
from evaclip.data.remote import RemoteShard
from evaclip.data.samples import RawSample
from evaclip.data.source import Source, hash_list
from evaclip.errors import UserError

_PERIOD = 1000
_PATTERN = 3


class MixtureSource(Source):
    """The samples of all parts, one part after the other.

    Args:
        parts: at least one source.
        weights: of each, above 0; their sum doesn't matter.
    """

    def __init__(self, parts: Sequence[Source], weights: Sequence[float]) -> None:
        self.parts = list(parts)
        self.weights = list(weights)
        self.counts = counts_of(self.weights)
        if 0 in self.counts:
            raise UserError(
                f"the smallest weight of a mixture is {min(weights):g} of {sum(weights):g}; accepted is 1 in {_PERIOD}"
            )
        shares = (
            f"{100 * count / _PERIOD:g} % {part.description}" for count, part in zip(self.counts, parts, strict=True)
        )
        self.description = "; ".join(shares)
        self.shard_sizes = [size for part in parts for size in part.shard_sizes]
        self.remote = any(part.remote for part in parts)
        self.faults = [fault for part in parts for fault in part.faults]
        self.decoding = parts[0].decoding
        self.fingerprint = hash_list("mixture", zip([p.fingerprint for p in parts], self.counts, strict=True))
        self._ends = list(accumulate(map(len, parts)))
        self._shard_ends = list(accumulate(len(part.shard_sizes) for part in parts))

    def __getitem__(self, index: int) -> RawSample:
        number, position = _locate(index, self._ends)
        return self.parts[number][position]

    def name(self, index: int) -> str:
        number, position = _locate(index, self._ends)
        return self.parts[number].name(position)

    def remote_shards(self, shards: Sequence[int]) -> list[RemoteShard]:
        located = (_locate(shard, self._shard_ends) for shard in shards)
        return [shard for number, own in located for shard in self.parts[number].remote_shards([own])]

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def order(self, seed: int, window: int, nodes: int = 1) -> "MixedOrder":
        """The order of training samples; `window` and `nodes` as for `sample_order`."""
        orders = [sample_order(len(part), seed, window, part.shard_sizes, nodes) for part in self.parts]
        return MixedOrder(orders, self.counts, seed)


def _locate(index: int, ends: Sequence[int]) -> tuple[int, int]:
    """The part that an index lies in, and the index there."""
    if not 0 <= index < ends[-1]:
        raise IndexError(f"sample {index} of {ends[-1]}")
    number = bisect_right(ends, index)
    return number, index - (ends[number - 1] if number else 0)


class MixedOrder:
    """Maps global indices to sample indices of a mixture, as a pure function of the seed.

    Every period of 1,000 indices holds a fixed number of each part, at places that are shuffled anew in each period;
    the n-th place of a part in all takes the n-th sample of the part's order. So proportions are exact, each part goes
    through its own epochs, and any position means the same under any batch size and number of processes.
    """

    def __init__(self, orders: Sequence[SampleOrder], counts: Sequence[int], seed: int) -> None:
        self._orders = list(orders)
        self._first_shards = np.cumsum([0, *(order.num_shards for order in orders)])
        self._counts = np.asarray(counts, np.int64)
        self._offsets = np.cumsum([0, *(order.num_samples for order in orders)])
        self._seed = seed
        self._slots = np.repeat(np.arange(len(counts)), counts)

    def indices(self, global_indices: I64) -> I64:
        """The sample indices [n] of global indices [n]."""
        parts, turns = self._turns(global_indices)
        samples = np.empty_like(turns)
        for number, order in enumerate(self._orders):
            chosen = parts == number
            samples[chosen] = self._offsets[number] + order.indices(turns[chosen])
        return samples

    def nodes(self, global_indices: I64) -> I64:
        """As `SampleOrder.nodes`."""
        parts, turns = self._turns(global_indices)
        found = np.empty_like(turns)
        for number, order in enumerate(self._orders):
            chosen = parts == number
            found[chosen] = order.nodes(turns[chosen])
        return found

    def nearby(self, global_index: int, draw: int) -> int:
        """As `SampleOrder.nearby`, of the same part."""
        parts, turns = self._turns(np.array([global_index], np.int64))
        number = int(parts[0])
        return int(self._offsets[number]) + self._orders[number].nearby(int(turns[0]), draw)

    def shards(self, global_indices: I64) -> tuple[list[int], list[int]]:
        """As `SampleOrder.shards`, of all parts."""
        parts, turns = self._turns(global_indices)
        now, after = list[int](), list[int]()
        for number, order in enumerate(self._orders):
            if (chosen := parts == number).any():
                for found, shards in zip((now, after), order.shards(turns[chosen]), strict=True):
                    found += [int(self._first_shards[number]) + shard for shard in shards]
        return now, after

    def _turns(self, global_indices: I64) -> tuple[I64, I64]:
        """The part [n] that each index takes a sample of, and which turn [n] of that part it is."""
        periods, places = np.divmod(global_indices, _PERIOD)
        distinct, rows = np.unique(periods, return_inverse=True)
        draws = mix(self._seed, _PATTERN, distinct[:, None], np.arange(_PERIOD))
        patterns = self._slots[np.argsort(draws, axis=1, kind="stable")]
        # Sorted by part, a period is `self._slots`: a place's rank there, less its part's first, is its turn.
        ranks = np.empty_like(patterns)
        np.put_along_axis(ranks, np.argsort(patterns, axis=1, kind="stable"), np.arange(_PERIOD)[None], axis=1)
        parts = patterns[rows, places]
        firsts = np.cumsum(self._counts) - self._counts
        return parts, periods * self._counts[parts] + ranks[rows, places] - firsts[parts]


def counts_of(weights: Sequence[float]) -> list[int]:
    """How many of a period's 1,000 places each part gets: by largest remainder, so that they add up."""
    exact = np.asarray(weights, np.float64) / sum(weights) * _PERIOD
    counts = np.floor(exact).astype(np.int64)
    for number in np.argsort(counts - exact, kind="stable")[: _PERIOD - counts.sum()]:
        counts[number] += 1
    found: list[int] = counts.tolist()
    return found
