"""Several data sets as one, in given proportions: within every batch, and with one position for all of them."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from evaclip.data.order import I64, SampleOrder, mix, sample_order
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
        self.faults = [fault for part in parts for fault in part.faults]
        self.fingerprint = hash_list("mixture", zip([p.fingerprint for p in parts], self.counts, strict=True))
        self._ends = list(accumulate(map(len, parts)))

    def __getitem__(self, index: int) -> RawSample:
        part, position = self._locate(index)
        return part[position]

    def name(self, index: int) -> str:
        part, position = self._locate(index)
        return part.name(position)

    def close(self) -> None:
        for part in self.parts:
            part.close()

    def order(self, seed: int, window: int) -> "MixedOrder":
        """The order of training samples; `window` as for `sample_order`."""
        orders = [sample_order(len(part), seed, window, part.shard_sizes) for part in self.parts]
        return MixedOrder(orders, self.counts, seed)

    def _locate(self, index: int) -> tuple[Source, int]:
        if not 0 <= index < self._ends[-1]:
            raise IndexError(f"sample {index} of {self._ends[-1]}")
        number = bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number] - len(self.parts[number]))


class MixedOrder:
    """Maps global indices to sample indices of a mixture, as a pure function of the seed.

    Every period of 1,000 indices holds a fixed number of each part, at places that are shuffled anew in each period;
    the n-th place of a part in all takes the n-th sample of its own order. So proportions are exact, each part goes
    through epochs of its own, and any position means the same under any batch size and number of processes.
    """

    def __init__(self, orders: Sequence[SampleOrder], counts: Sequence[int], seed: int) -> None:
        self._orders = list(orders)
        self._counts = np.asarray(counts, np.int64)
        self._offsets = np.cumsum([0, *(order.num_samples for order in orders)])
        self._seed = seed
        self._slots = np.repeat(np.arange(len(counts)), counts)

    def indices(self, global_indices: I64) -> I64:
        """The sample indices [n] of global indices [n]."""
        periods, places = np.divmod(global_indices, _PERIOD)
        samples = np.empty_like(places)
        for period in np.unique(periods):
            chosen = periods == period
            samples[chosen] = self._in_period(int(period), places[chosen])
        return samples

    def _in_period(self, period: int, places: I64) -> I64:
        pattern = self._slots[np.argsort(mix(self._seed, _PATTERN, period, np.arange(_PERIOD)), kind="stable")]
        samples = np.empty_like(places)
        for number, order in enumerate(self._orders):
            chosen = pattern[places] == number
            before = np.cumsum(pattern == number)[places[chosen]] - 1
            turns = period * self._counts[number] + before
            samples[chosen] = self._offsets[number] + order.indices(turns)
        return samples


def counts_of(weights: Sequence[float]) -> list[int]:
    """How many of a period's 1,000 places each part gets: by largest remainder, so that they add up."""
    exact = np.asarray(weights, np.float64) / sum(weights) * _PERIOD
    counts = np.floor(exact).astype(np.int64)
    for number in np.argsort(counts - exact, kind="stable")[: _PERIOD - counts.sum()]:
        counts[number] += 1
    found: list[int] = counts.tolist()
    return found
