"""Many strings in two flat arrays."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray


class PackedStrings(Sequence[str]):
    """An immutable list of strings held as one UTF-8 buffer and offsets.

    A Python list of strings costs 50 bytes and more per entry and, because of reference counts, is copied
    page by page into every forked worker; these arrays are neither.
    """

    def __init__(self, text: NDArray[np.uint8], ends: NDArray[np.integer[Any]]) -> None:
        self.text = text
        self.ends = ends

    @classmethod
    def pack(cls, strings: Iterable[str]) -> "PackedStrings":
        """Packs strings in order, one at a time: a generator never has two of them in memory."""
        packer = StringPacker()
        for string in strings:
            packer.add(string)
        return packer.packed()

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        start = int(self.ends[position - 1]) if position else 0
        return self.text[start : int(self.ends[position])].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        text, start = self.text.tobytes(), 0
        for end in self.ends.tolist():
            yield text[start:end].decode("utf-8", "surrogateescape")
            start = end


class StringPacker:
    """Takes the strings of a `PackedStrings` one after the other."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._ends = array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, string: str) -> None:
        """Appends one."""
        self._buffer += string.encode("utf-8", "surrogateescape")
        self._ends.append(len(self._buffer))

    def packed(self) -> PackedStrings:
        """All of them, copied."""
        return PackedStrings(np.frombuffer(bytes(self._buffer), np.uint8), np.array(self._ends, np.int64))
