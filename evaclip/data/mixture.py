"""Several data sets as one, in given proportions within every batch, with one common position."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from evaclip.data.index_cache import Shard
from evaclip.data.order import I64, PERIOD, SampleOrder, mix, sample_order
from evaclip.data.samples import RawSample
from evaclip.data.source import Source, hash_list
from evaclip.errors import UserError

_PATTERN = 3


class MixtureSource(Source):
    """The samples of all sources, one source after the other.

    Args:
        sources: at least one.
        weights: of each, above 0; their sum doesn't matter.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        self.sources = list(sources)
        self.weights = list(weights)
        self.counts = counts_of(self.weights)
        if 0 in self.counts:
            raise UserError(
                f"the smallest weight of a mixture is {min(weights):g} of {sum(weights):g}; accepted is 1 in {PERIOD}"
            )
        shares = (
            f"{100 * count / PERIOD:g} % {source.description}"
            for count, source in zip(self.counts, sources, strict=True)
        )
        self.description = "; ".join(shares)
        self.shard_sizes = [size for source in sources for size in source.shard_sizes]
        self.remote = any(source.remote for source in sources)
        self.faults = [fault for source in sources for fault in source.faults]
        self.decoding = sources[0].decoding
        self.fingerprint = hash_list("mixture", zip([p.fingerprint for p in sources], self.counts, strict=True))
        self._ends = list(accumulate(map(len, sources)))
        self._shard_ends = list(accumulate(len(source.shard_sizes) for source in sources))

    def __getitem__(self, index: int) -> RawSample:
        number, position = _locate(index, self._ends)
        return self.sources[number][position]

    def name(self, index: int) -> str:
        number, position = _locate(index, self._ends)
        return self.sources[number].name(position)

    def tar_shards(self, shards: Sequence[int]) -> list[Shard]:
        located = (_locate(shard, self._shard_ends) for shard in shards)
        return [shard for number, index in located for shard in self.sources[number].tar_shards([index])]

    def close(self) -> None:
        for source in self.sources:
            source.close()

    def order(self, seed: int, window: int, nodes: int = 1) -> "MixedOrder":
        """The order of training samples; `window` and `nodes` as for `sample_order`."""
        orders = [sample_order(len(source), seed, window, source.shard_sizes, nodes) for source in self.sources]
        return MixedOrder(orders, self.counts, seed)


def _locate(index: int, ends: Sequence[int]) -> tuple[int, int]:
    """Number of the source that an index lies in, and the index there."""
    if not 0 <= index < ends[-1]:
        raise IndexError(f"sample {index} of {ends[-1]}")
    number = bisect_right(ends, index)
    return number, index - (ends[number - 1] if number else 0)


class MixedOrder:
    """Maps global indices to sample indices of a mixture, as a pure function of the seed.

    Every `PERIOD` of 1,000 indices has a fixed number of samples of each source, at places that are shuffled in each
    period. The n-th place of a source takes the n-th sample of the source's order. Proportions are therefore exact,
    each source has separate epochs, and a position doesn't depend on batch size and number of ranks.
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
        sources, turns = self._turns(global_indices)
        samples = np.empty_like(turns)
        for number, order in enumerate(self._orders):
            chosen = sources == number
            samples[chosen] = self._offsets[number] + order.indices(turns[chosen])
        return samples

    def nodes(self, global_indices: I64) -> I64:
        """As `NodeOrder.nodes`."""
        sources, turns = self._turns(global_indices)
        nodes = np.empty_like(turns)
        for number, order in enumerate(self._orders):
            chosen = sources == number
            nodes[chosen] = order.nodes(turns[chosen])
        return nodes

    def counts(self, global_indices: I64) -> I64:
        """As `NodeOrder.counts`."""
        periods, places = np.divmod(global_indices, PERIOD)
        turns = periods[:, None] * self._counts
        for row in np.flatnonzero(places):
            (pattern,) = self._patterns(periods[row : row + 1])
            turns[row] += np.bincount(pattern[: places[row]], minlength=len(self._counts))
        counts: I64 = np.sum([order.counts(turns[:, number]) for number, order in enumerate(self._orders)], axis=0)
        return counts

    def nearby(self, global_index: int, draw: int) -> int:
        """As `SampleOrder.nearby`, of the same source."""
        sources, turns = self._turns(np.array([global_index], np.int64))
        number = int(sources[0])
        return int(self._offsets[number]) + self._orders[number].nearby(int(turns[0]), draw)

    def shards(self, global_indices: I64) -> tuple[list[int], list[int]]:
        """As `SampleOrder.shards`, of all sources."""
        sources, turns = self._turns(global_indices)
        now, after = list[int](), list[int]()
        for number, order in enumerate(self._orders):
            if (chosen := sources == number).any():
                for numbers, shards in zip((now, after), order.shards(turns[chosen]), strict=True):
                    numbers += [int(self._first_shards[number]) + shard for shard in shards]
        return now, after

    def _turns(self, global_indices: I64) -> tuple[I64, I64]:
        """The source [n] of each index, and its turn [n] within that source."""
        periods, places = np.divmod(global_indices, PERIOD)
        distinct, rows = np.unique(periods, return_inverse=True)
        patterns = self._patterns(distinct)
        # Sorted by source, a period is `self._slots`: a place's rank there, less its source's first, is its turn.
        ranks = np.empty_like(patterns)
        np.put_along_axis(ranks, np.argsort(patterns, axis=1, kind="stable"), np.arange(PERIOD)[None], axis=1)
        sources = patterns[rows, places]
        firsts = np.cumsum(self._counts) - self._counts
        return sources, periods * self._counts[sources] + ranks[rows, places] - firsts[sources]

    def _patterns(self, periods: I64) -> I64:
        """The source of each place [n, PERIOD] in periods [n]."""
        draws = mix(self._seed, _PATTERN, periods[:, None], np.arange(PERIOD))
        patterns: I64 = self._slots[np.argsort(draws, axis=1, kind="stable")]
        return patterns


def counts_of(weights: Sequence[float]) -> list[int]:
    """How many of a period's 1,000 places each source gets: by largest remainder, so that they add up."""
    exact = np.asarray(weights, np.float64) / sum(weights) * PERIOD
    counts = np.floor(exact).astype(np.int64)
    for number in np.argsort(counts - exact, kind="stable")[: PERIOD - counts.sum()]:
        counts[number] += 1
    places: list[int] = counts.tolist()
    return places
