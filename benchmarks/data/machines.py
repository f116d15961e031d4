"""From how many shards a batch is drawn, and how many a machine reads: by numbers alone, nothing is read."""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from evaclip.data.config import DEFAULT_WINDOW
from evaclip.data.order import sample_order
from evaclip.train.recipes import get_recipe

I64 = NDArray[np.int64]
Batches = Iterator[I64]
"""The samples of an epoch's batches, [machines, samples of each]."""
Shuffle = Callable[..., Callable[[Iterable[int]], Iterator[int]]]

_SHARD_BUFFER, _SHARD_INITIAL = 2_000, 500
_SAMPLE_BUFFER, _SAMPLE_INITIAL = 5_000, 1_000


@dataclass(frozen=True)
class MachinesPlan:
    """A recipe's batches on many machines, all numbers of samples divided by `scale`: those of shards stay as they are.

    Attributes:
        shards, per_shard: the data set; 10,000 samples a shard in full size.
        batch: samples, over all machines.
        gpus: of each machine.
        workers: of each GPU.
    """

    recipe: str = "eva02-b-16"
    scale: int = 16
    shards: int = 2_048
    per_shard: int = 625
    batch: int = 8_192
    machines: int = 8
    gpus: int = 8
    workers: int = 8


@dataclass(frozen=True)
class Spread:
    """One order.

    Attributes:
        shards_of_batch: from how many shards a batch is drawn, in the mean.
        largest_share: what the most frequent shard of a batch has in it, in the mean.
        shards_of_machine: which part of all shards one machine reads in an epoch, in the mean.
    """

    order: str
    shards_of_batch: float
    largest_share: float
    shards_of_machine: float


def measure(plan: MachinesPlan) -> list[Spread]:
    """Looks at an epoch of each order."""
    return [_look(name, batches, plan) for name, batches in _orders(plan)]


def _orders(plan: MachinesPlan) -> Iterator[tuple[str, Batches]]:
    recipe = get_recipe(plan.recipe).data
    yield "full permutation", _windowed(plan, 0, 1)
    yield f"window of {DEFAULT_WINDOW:,}", _windowed(plan, DEFAULT_WINDOW, 1)
    name = f"{plan.recipe}: {recipe.canonical_nodes} canonical nodes, window of {recipe.shuffle_window:,} each"
    yield name, _windowed(plan, recipe.shuffle_window, recipe.canonical_nodes)
    try:
        from webdataset.filters import shuffle
    except ImportError:
        return
    yield f"open_clip: buffers of {_SAMPLE_BUFFER:,} and {_SHARD_BUFFER:,} shards", _buffered(plan, shuffle)


def _windowed(plan: MachinesPlan, window: int, nodes: int) -> Batches:
    samples = plan.shards * plan.per_shard
    order = sample_order(samples, 0, window // plan.scale, [plan.per_shard] * plan.shards, nodes)
    for position in range(0, samples - plan.batch + 1, plan.batch):
        batch = np.arange(position, position + plan.batch)
        by_node = batch[np.argsort(order.nodes(batch), kind="stable")]
        yield order.indices(by_node).reshape(plan.machines, -1)


def _buffered(plan: MachinesPlan, shuffle: Shuffle) -> Batches:
    """As open_clip's: each worker of each GPU has shards and a buffer of its own, and gives its GPU's batches."""
    rng = random.Random(0)
    gpus = plan.machines * plan.gpus
    local = plan.batch // gpus
    shards = list(shuffle(_SHARD_BUFFER, initial=_SHARD_INITIAL, rng=rng)(iter(range(plan.shards))))
    mixed = shuffle(_SAMPLE_BUFFER // plan.scale, initial=_SAMPLE_INITIAL // plan.scale, rng=rng)
    samples = [range(shard * plan.per_shard, (shard + 1) * plan.per_shard) for shard in shards]
    streams = [
        [mixed(chain.from_iterable(samples[gpu::gpus][worker :: plan.workers])) for gpu in range(gpus)]
        for worker in range(plan.workers)
    ]
    while True:
        for workers in streams:
            batch = np.array(list(chain.from_iterable(islice(stream, local) for stream in workers)), np.int64)
            if len(batch) < plan.batch:
                return
            yield batch.reshape(plan.machines, -1)


def _look(name: str, batches: Batches, plan: MachinesPlan) -> Spread:
    counts, largest = list[int](), list[int]()
    read = np.zeros((plan.machines, plan.shards), bool)
    for batch in batches:
        shards = batch // plan.per_shard
        found = np.bincount(shards.ravel(), minlength=plan.shards)
        counts.append(int(np.count_nonzero(found)))
        largest.append(int(found.max()))
        for machine, row in enumerate(shards):
            read[machine, row] = True
    return Spread(name, float(np.mean(counts)), float(np.mean(largest)) / plan.batch, float(read.mean()))
