"""The interface of every kind of data set."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from evaclip.data.index_cache import Shard
from evaclip.data.order import I64
from evaclip.data.samples import WHOLE, Decoding, Fault, RawSample


class Source(ABC):
    """An indexed list of samples with random access.

    Attributes:
        description: kind and place, for messages.
        fingerprint: hash of the indexed list (names and sizes); equal for equal data in any place.
        shard_sizes: samples per shard, in order; one entry where there are no shards.
        faults: of the list itself, such as damaged shards.
        notes: guesses that were made on opening.
        decoding: how its image files are to be decoded.
        classes: names of the classes where the kind of data has them, in label order; else empty.
        wants_captions: whether a sample without a caption can't be used.
        remote: whether there are remote shards.
    """

    description: str
    fingerprint: str
    shard_sizes: Sequence[int]
    faults: Sequence[Fault] = ()
    notes: Sequence[str] = ()
    decoding: Decoding = WHOLE
    classes: Sequence[str] = ()
    wants_captions: bool = True
    remote: bool = False

    def __len__(self) -> int:
        return self._length

    @cached_property
    def _length(self) -> int:
        return sum(self.shard_sizes)

    @abstractmethod
    def __getitem__(self, index: int) -> RawSample:
        """Reads one sample, 0 <= index < len(self). Raises BadSample if it cannot be used."""

    @abstractmethod
    def name(self, index: int) -> str:
        """Name of the sample in messages: file, or shard and key."""

    def place(self, index: int) -> tuple[str, str]:
        """The file that holds a sample (shard, table or image) and its key there; "" if unknown."""
        return "", self.name(index)

    def file(self, index: int) -> Path | None:
        """A sample's image file; None if the image is a part of another file."""
        return None

    def captions(self, index: int) -> tuple[str, ...]:
        """A sample's captions. Raises BadSample if it cannot be used."""
        return self[index].captions

    def label(self, index: int) -> int | None:
        """The place of a sample's class in `classes`; None where the kind of data has no classes."""
        return None

    def pictures(self) -> I64 | None:
        """A number for each sample, equal for samples that share an image; None if no samples do."""
        return None

    def tar_shards(self, shards: Sequence[int]) -> list[Shard]:
        """The tar shards, which can be read ahead, among those of these numbers, in this order."""
        return []

    def close(self) -> None:  # noqa: B027 - most kinds hold nothing open
        """Releases open files; the source stays usable and opens them again on demand."""


def hash_list(kind: str, entries: Iterable[tuple[str, object]]) -> str:
    """The fingerprint of a list of (name, size or hash)."""
    digest = hashlib.sha256(kind.encode())
    for name, size in entries:
        digest.update(f"\0{name}\0{size}".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:32]
