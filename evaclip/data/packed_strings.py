"""Many strings in two flat arrays, and files of arrays that processes share."""

import json
import logging
import mmap
import zlib
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import reduce
from itertools import accumulate
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from evaclip.atomic import replacing

_LOG = logging.getLogger("evaclip.data")
_DTYPES = {"U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8", "I64": "<i8"}


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
        """Packs strings in order."""
        parts = [string.encode("utf-8", "surrogateescape") for string in strings]
        return cls(np.frombuffer(b"".join(parts), np.uint8), np.fromiter(accumulate(map(len, parts)), np.int64))

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
    """Takes the strings of a `PackedStrings` one after the other, without holding them as Python objects."""

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


def narrow(numbers: NDArray[np.integer[Any]]) -> NDArray[np.unsignedinteger[Any]]:
    """Numbers of 0 or more in the narrowest unsigned type."""
    return numbers.astype(np.min_scalar_type(numbers.max(initial=0)))


def write_arrays(
    file: Path, stamp: Sequence[Any], arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]
) -> None:
    """Writes arrays [n] of integers as safetensors, atomically; makes the file's folder.

    Args:
        stamp: a JSON list; `map_arrays` needs an equal one.
        facts: values for JSON.

    Raises:
        OSError: it can't be written.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    notes = {"stamp": stamp, **facts, "crc32": _checksum(arrays.values())}
    with replacing(file) as temporary:
        temporary.write_bytes(save(dict(arrays), {"index": json.dumps(notes)}))


def map_arrays(
    file: Path, stamp: Sequence[Any], names: Sequence[str]
) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
    """The arrays of these names, mapped, and the facts of a file; None if it is missing, damaged or of another stamp.

    `names` are in the order in which the arrays were given to `write_arrays`.
    """
    try:
        with file.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        # safetensors' own reader copies.
        body = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:body])
        facts = json.loads(header["__metadata__"]["index"])
        if facts["stamp"] != stamp:
            return None
        arrays = {
            name: np.frombuffer(data, _DTYPES[part["dtype"]], part["shape"][0], body + part["data_offsets"][0])
            for name, part in ((name, header[name]) for name in names)
        }
        if _checksum(arrays.values()) != facts["crc32"]:
            raise ValueError("its checksum differs")
        return arrays, facts
    except FileNotFoundError:
        return None
    except Exception as exc:  # whatever is damaged: ValueError, KeyError, TypeError, OSError, RecursionError, ...
        _LOG.debug("the index %s is not usable: %s", file, exc)
        return None


def _checksum(arrays: Iterable[NDArray[Any]]) -> int:
    return reduce(lambda crc, array: zlib.crc32(array.data, crc), arrays, 0)
