"""The validation split: which samples it has, and both splits as sources."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from evaclip.data.mixture import MixtureSource
from evaclip.data.order import I64, U64, mix
from evaclip.data.remote import RemoteShard
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
        chosen = [_choose(each, share, seed + number) for number, each in enumerate(source.sources)]
        rests = [Rest(each, held) if len(held) else each for each, held in zip(source.sources, chosen, strict=True)]
        firsts = np.cumsum([0, *map(len, source.sources)])[:-1]
        held = np.concatenate([first + indices for first, indices in zip(firsts, chosen, strict=True)])
        rest: Source = MixtureSource(rests, source.weights)
    else:
        held = _choose(source, share, seed)
        rest = Rest(source, held)
    return (rest, Selection(source, held.tolist())) if len(held) else (source, None)


def _choose(source: Source, share: float, seed: int) -> I64:
    """The numbers of the samples with the smallest hashes, in rising order; equal hashes stay together."""
    size = len(source)
    wanted = int(share * size)
    if not wanted:
        return np.empty(0, np.int64)
    pictures = source.pictures()
    # A threshold above slightly more than `wanted` hashes; it is raised if there are fewer.
    limit = 2 * (wanted + 32) * 2**64 // size
    while True:
        indices, draws = _below(min(limit, 2**64 - 1), size, seed, pictures)
        if len(indices) >= wanted:
            chosen: I64 = indices[draws <= np.partition(draws, wanted - 1)[wanted - 1]]
            return chosen
        limit *= 2


def _below(limit: int, size: int, seed: int, pictures: I64 | None) -> tuple[I64, U64]:
    """Indices of samples with a hash of at most `limit`, in rising order, and their hashes."""
    indices, draws = list[I64](), list[U64]()
    for start in range(0, size, _BLOCK):
        block = np.arange(start, min(start + _BLOCK, size))
        hashes = mix(seed, _HELD_OUT, block if pictures is None else pictures[block])
        chosen = hashes <= np.uint64(limit)
        indices.append(block[chosen])
        draws.append(hashes[chosen])
    return np.concatenate(indices), np.concatenate(draws)


class View(Source):
    """Samples of another source in another order; subclasses set `shard_sizes` and `fingerprint`."""

    def __init__(self, whole: Source) -> None:
        self.whole = whole
        self.description = whole.description
        self.faults = whole.faults
        self.decoding = whole.decoding

    @abstractmethod
    def number(self, index: int) -> int:
        """The index of a sample in the other source."""

    def __getitem__(self, index: int) -> RawSample:
        return self.whole[self.number(index)]

    def name(self, index: int) -> str:
        return self.whole.name(self.number(index))

    def place(self, index: int) -> tuple[str, str]:
        return self.whole.place(self.number(index))

    def close(self) -> None:
        self.whole.close()


class Selection(View):
    """Some samples of another source, in the given order; a sample's key is its index in that source."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        super().__init__(source)
        self._indices = indices
        self.fingerprint = hash_list(source.fingerprint, (("", index) for index in self._indices))
        self.shard_sizes = [len(self._indices)]

    def number(self, index: int) -> int:
        return self._indices[index]

    def __getitem__(self, index: int) -> RawSample:
        sample = super().__getitem__(index)
        return RawSample(str(self.number(index)), sample.image, sample.captions)


class Rest(View):
    """All samples of another source but some, in the same shards.

    Args:
        whole: the other source.
        left_out: int64 [n], the numbers of the samples that are left out, in rising order.
    """

    def __init__(self, whole: Source, left_out: I64) -> None:
        super().__init__(whole)
        # How many samples lie in front of each one that is left out.
        self._before = left_out - np.arange(len(left_out))
        gone = np.searchsorted(left_out, np.cumsum(np.asarray(whole.shard_sizes, np.int64)))
        self.shard_sizes = (np.asarray(whole.shard_sizes, np.int64) - np.diff(gone, prepend=0)).tolist()
        self.description = f"{whole.description}, but for {len(left_out)} held out"
        self.fingerprint = hash_list(whole.fingerprint, (("", index) for index in left_out.tolist()))
        self.classes = whole.classes
        self.remote = whole.remote

    def remote_shards(self, shards: Sequence[int]) -> list[RemoteShard]:
        return self.whole.remote_shards(shards)

    def number(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return index + int(np.searchsorted(self._before, index, side="right"))
