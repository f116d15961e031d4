"""How well samples are mixed: by numbers alone, nothing is read."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evaclip.data.order import sample_order

I64 = NDArray[np.int64]
Order = Callable[[int], I64]
"""The samples of an epoch, in the order in which they are read."""

QUANTILES = tuple(range(1, 100))


@dataclass(frozen=True)
class ShufflePlan:
    """A data set and its batches.

    Attributes:
        windows: in samples; 0 is the whole data set.
        buffers: of webdataset's shuffle, in samples.
        nodes: canonical nodes of one more row, whose windows are each `windows[-1]` over `nodes`.
    """

    shards: int = 200
    per_shard: int = 1_000
    batch: int = 4_000
    windows: tuple[int, ...] = (0, 100_000, 20_000, 5_000)
    buffers: tuple[int, ...] = (100_000, 20_000, 5_000)
    nodes: int = 8


@dataclass(frozen=True)
class Shuffle:
    """How well one order mixes; means over an epoch.

    Attributes:
        held: samples from whose shards the order takes at a time.
        same_shard: others of its own shard that a sample meets in its batch, over as many as in a full permutation.
        meet_again: pairs that share a batch in two epochs in a row, over as many as by chance.
        distances: quantiles, 1 % to 99 %, of the distance in the epoch between samples that are neighbours in a shard,
            as a share of the epoch.
    """

    order: str
    held: int
    same_shard: float
    meet_again: float
    distances: tuple[float, ...]

    def distance(self, percent: int) -> float:
        """One of the quantiles."""
        return self.distances[QUANTILES.index(percent)]


def measure(plan: ShufflePlan) -> list[Shuffle]:
    """Looks at two epochs of each order."""
    return [_look(name, held, order, plan) for name, held, order in _orders(plan)]


def _orders(plan: ShufflePlan) -> Iterator[tuple[str, int, Order]]:
    samples = plan.shards * plan.per_shard
    for window in plan.windows:
        held = min(window or samples, samples)
        yield ("full permutation" if held == samples else f"window of {window:,}"), held, _windowed(plan, window, 1)
    if plan.nodes > 1:
        window = max(plan.windows[-1] // plan.nodes, 1)
        name = f"{plan.nodes} canonical nodes, window of {window:,} each"
        yield name, window * plan.nodes, _windowed(plan, window, plan.nodes)
    try:
        from webdataset.filters import shuffle
    except ImportError:
        return
    for buffer in plan.buffers:
        yield f"webdataset, buffer of {buffer:,}", min(buffer, samples), _buffered(plan, buffer, shuffle)


def _windowed(plan: ShufflePlan, window: int, nodes: int) -> Order:
    samples = plan.shards * plan.per_shard
    order = sample_order(samples, 0, window, [plan.per_shard] * plan.shards, nodes)
    return lambda epoch: order.indices(np.arange(epoch * samples, (epoch + 1) * samples))


def _buffered(plan: ShufflePlan, buffer: int, shuffle: Callable[..., Callable[..., Iterator[int]]]) -> Order:
    """Shards in an order of their own each epoch, and their samples through a buffer that is full before it gives."""

    def read(epoch: int) -> I64:
        rng = random.Random(epoch)
        shards = rng.sample(range(plan.shards), plan.shards)
        stream = (shard * plan.per_shard + number for shard in shards for number in range(plan.per_shard))
        return np.fromiter(shuffle(buffer, initial=buffer, rng=rng)(stream), np.int64)

    return read


def _look(name: str, held: int, order: Order, plan: ShufflePlan) -> Shuffle:
    first, second = order(0), order(1)
    samples = len(first)
    places = np.argsort(first)
    neighbours = np.abs(np.diff(places.reshape(plan.shards, plan.per_shard), axis=1)).ravel()
    in_first, in_second = places // plan.batch, np.argsort(second) // plan.batch
    shards = np.arange(samples) // plan.per_shard
    batches = -(-samples // plan.batch)
    together = _pairs(in_first, batches)
    by_chance = together * _pairs(in_second, batches) / (samples * (samples - 1) / 2)
    of_shards = together * _pairs(shards, plan.shards) / (samples * (samples - 1) / 2)
    return Shuffle(
        name,
        held,
        _pairs(in_first * plan.shards + shards, batches * plan.shards) / of_shards,
        _pairs(in_first * batches + in_second, batches * batches) / by_chance,
        tuple((np.percentile(neighbours, QUANTILES) / samples).tolist()),
    )


def _pairs(groups: I64, count: int) -> float:
    """How many pairs are of one group."""
    sizes = np.bincount(groups, minlength=count).astype(np.float64)
    return float((sizes * (sizes - 1) / 2).sum())
