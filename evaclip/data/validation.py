"""The validation split: which samples it has, and both splits as sources."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from evaclip.data.index_cache import Shard
from evaclip.data.mixture import MixtureSource
from evaclip.data.order import I64, mix
from evaclip.data.samples import RawSample
from evaclip.data.source import Source, hash_list

MOST = 5000
"""More make an evaluation slower and hardly more exact: 0.7 % is the standard error of a share of one half."""

_HELD_OUT = 4
_BLOCK = 2**16
"""Samples that are hashed at a time: their arrays fit into a cache of the processor."""


def hold_out(source: Source, share: float, seed: int, most: int = MOST) -> tuple[Source, Source | None]:
    """Splits a source into training samples and validation samples: `share` of all, at most `most`.

    The split is a function of the seed and the samples' indices, so a resumed run, on any number of ranks, has the same
    one. Samples that share an image, as in a table with a row per caption, stay together. Each source of a mixture
    gives its share.

    Returns:
        training and validation source; None for the second if the share is less than one sample.
    """
    if not share:
        return source, None
    share = min(share, most / len(source))
    if isinstance(source, MixtureSource):
        by_source = [_choose(each, share, seed + number) for number, each in enumerate(source.sources)]
        rests = [
            Rest(each, numbers) if len(numbers) else each
            for each, numbers in zip(source.sources, by_source, strict=True)
        ]
        firsts = np.cumsum([0, *map(len, source.sources)])[:-1]
        indices = np.concatenate([first + numbers for first, numbers in zip(firsts, by_source, strict=True)])
        rest: Source = MixtureSource(rests, source.weights)
    else:
        indices = _choose(source, share, seed)
        rest = Rest(source, indices)
    return (rest, Selection(source, indices.tolist())) if len(indices) else (source, None)


def _choose(source: Source, share: float, seed: int) -> I64:
    """Indices of the samples with the smallest hashes, in rising order; equal hashes stay together."""
    indices, hashes, limit = np.empty(0, np.int64), np.empty(0, np.uint64), np.uint64(2**64 - 1)
    if not (count := int(share * len(source))):
        return indices
    images = source.pictures()
    for start in range(0, len(source), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(source)))
        draws = mix(seed, _HELD_OUT, block if images is None else images[block])
        is_small = draws <= limit
        indices = np.concatenate([indices, block[is_small]])
        hashes = np.concatenate([hashes, draws[is_small]])
        if count < len(hashes):
            limit = np.partition(hashes, count - 1)[count - 1]
            indices, hashes = indices[hashes <= limit], hashes[hashes <= limit]
    return indices


class Selection(Source):
    """Some samples of another source; a sample's key is its index in that source.

    Args:
        source: the other source.
        order: indices of the samples in that source, in the order that they have here.
    """

    def __init__(self, source: Source, order: Sequence[int]) -> None:
        self._source, self._order = source, order
        self.description, self.faults, self.decoding = source.description, source.faults, source.decoding
        self.shard_sizes = [len(order)]
        self.fingerprint = hash_list(source.fingerprint, (("", index) for index in order))

    def number(self, index: int) -> int:
        """The index of a sample in the other source."""
        return self._order[index]

    def __getitem__(self, index: int) -> RawSample:
        number = self.number(index)
        return replace(self._source[number], key=str(number))

    def name(self, index: int) -> str:
        return self._source.name(self.number(index))

    def place(self, index: int) -> tuple[str, str]:
        return self._source.place(self.number(index))

    def close(self) -> None:
        self._source.close()


class Rest(Selection):
    """All samples of another source but some, in the same order and shards.

    Args:
        source: the other source.
        left_out: int64 [n], indices of the samples that are left out, in rising order.
    """

    def __init__(self, source: Source, left_out: I64) -> None:
        super().__init__(source, left_out.tolist())
        # Number of samples in front of each one that is left out.
        self._before = left_out - np.arange(len(left_out))
        sizes = np.asarray(source.shard_sizes, np.int64)
        self.shard_sizes = (sizes - np.diff(np.searchsorted(left_out, np.cumsum(sizes)), prepend=0)).tolist()
        self.description = f"{source.description}, but for {len(left_out)} held out"
        self.classes, self.remote = source.classes, source.remote

    def number(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return index + int(np.searchsorted(self._before, index, side="right"))

    def tar_shards(self, shards: Sequence[int]) -> list[Shard]:
        return self._source.tar_shards(shards)
