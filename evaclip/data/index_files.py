"""Indexes of shards in files: beside the shards or in a cache folder, mapped into memory by whoever reads them.

A file is one of safetensors: the arrays of a `TarIndex`, and its other parts as JSON in the metadata. All processes of
a machine share its pages, so an index costs none of them memory of its own.
"""

import hashlib
import json
import logging
import mmap
import time
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from evaclip.atomic import replacing
from evaclip.data.packed_strings import PackedStrings
from evaclip.data.tar_index import ShardFacts, TarIndex
from evaclip.machine import user_cache

if TYPE_CHECKING:
    from evaclip.data.shards import Shard

_LOG = logging.getLogger("evaclip.data")
_FORMAT = 3
_SUFFIX = ".index"
_THREADS = 8
_AT_A_TIME = 64
"""Shards whose indexes wait to be taken: each holds a file open."""
_SECONDS_BETWEEN_REPORTS = 10.0
_TRIM_EVERY = 256
_CAPACITY = 10 * 10**9
_ARRAYS = ("key_text", "key_ends", "starts", "codes", "blocks", "sizes")
_DTYPES = {"U8": "<u1", "U16": "<u2", "U32": "<u4", "U64": "<u8"}


class IndexCache:
    """Indexes of shards, on disk and, for the `capacity` most recent ones, mapped.

    A file is valid for one stamp: the shard's size and its modification time or ETag. It lies beside the shard
    (`00000.tar.index`), where `beside` writes it, or else in the cache folder, which is held to 10 GB. A folder that
    cannot be read or written costs time, nothing else: indexes that could not be stored stay in memory.
    """

    def __init__(self, folder: Path | None = None, capacity: int = 256, beside: bool = False) -> None:
        self._folder = folder or user_cache("tar-index")
        self._capacity = capacity
        self._beside = beside
        self._recent: OrderedDict[bytes, TarIndex] = OrderedDict()
        self._unstored: dict[bytes, TarIndex] = {}
        self._stored = 0
        self._closed = set[Path]()

    def get(self, shard: "Shard") -> TarIndex:
        """The index of a shard, built if there is none. Raises UserError as `build_index` does."""
        key = shard.identity
        if key in self._unstored:
            return self._unstored[key]
        if key not in self._recent:
            return self._keep(key, *self._load_or_build(shard))
        self._recent.move_to_end(key)
        return self._recent[key]

    def get_all(self, shards: Sequence["Shard"]) -> Iterator[TarIndex]:
        """The indexes of many shards in order, several being read at once. Raises as `get` does."""
        told = time.monotonic()
        with ThreadPoolExecutor(_THREADS) as pool:
            for first in range(0, len(shards), _AT_A_TIME):
                some = shards[first : first + _AT_A_TIME]
                for number, found in enumerate(pool.map(self._load_or_build, some), first):
                    yield self._keep(shards[number].identity, *found)
                    if time.monotonic() - told >= _SECONDS_BETWEEN_REPORTS:
                        told = time.monotonic()
                        _LOG.info("indexed %d of %d shards", number + 1, len(shards))

    def put(self, shard: "Shard", index: TarIndex) -> None:
        """Stores an index that was built elsewhere, if that can be done."""
        self._store(self._files(shard)[-1:], _stamp(shard), index)

    def forget(self, shard: "Shard") -> None:
        """Deletes the stored index of a shard that is not what it was, so that the next opening makes a new one."""
        with suppress(OSError):
            self._files(shard)[-1].unlink()

    def _keep(self, key: bytes, index: TarIndex, stored: bool) -> TarIndex:
        if stored:
            self._recent[key] = index
            if len(self._recent) > self._capacity:
                self._recent.popitem(last=False)
        else:
            self._unstored[key] = index
        return index

    def _load_or_build(self, shard: "Shard") -> tuple[TarIndex, bool]:
        """The index, and whether it lies in a file now."""
        stamp = _stamp(shard)
        files = self._files(shard)
        for file in files[:1] if self._beside else files:
            if (index := _load(file, stamp)) is not None:
                return index, True
        index = shard.index()
        stored = self._store(files if self._beside else files[-1:], stamp, index)
        # What is mapped is shared, what was built is not.
        return (index, False) if stored is None else (_load(stored, stamp) or index, True)

    def _files(self, shard: "Shard") -> list[Path]:
        """Where an index may lie, the cache folder last."""
        cached = self._folder / f"{hashlib.sha256(shard.identity).hexdigest()[:32]}{_SUFFIX}"
        return [cached] if shard.path is None else [shard.path.with_name(shard.path.name + _SUFFIX), cached]

    def _store(self, files: Sequence[Path], stamp: Sequence[int], index: TarIndex) -> Path | None:
        """Writes the index to the first file that can be written, and says which."""
        for file in files:
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                with replacing(file) as temporary:
                    temporary.write_bytes(_packed(stamp, index))
            except OSError as exc:
                told = logging.DEBUG if file == files[-1] or file.parent in self._closed else logging.WARNING
                self._closed.add(file.parent)
                _LOG.log(told, "the index is not stored in %s: %s", file, exc)
                continue
            self._stored += 1
            if file.parent == self._folder and self._stored % _TRIM_EVERY == 0:
                _trim(self._folder)
            return file
        return None


def _stamp(shard: "Shard") -> list[int]:
    return [_FORMAT, *shard.stamp()]


def _trim(folder: Path) -> None:
    """Deletes the oldest files of the cache folder, until the rest takes no more than it may."""
    files = []
    for path in folder.glob("[!.]*"):
        # Another process may have deleted it.
        with suppress(OSError):
            facts = path.stat()
            files.append((facts.st_mtime, facts.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= _CAPACITY:
            break
        with suppress(OSError):
            path.unlink()
        total -= size


def _packed(stamp: Sequence[int], index: TarIndex) -> bytes:
    arrays = (index.keys.text, index.keys.ends, index.starts, index.codes, index.blocks, index.sizes)
    notes = {
        "stamp": list(stamp),
        "suffixes": index.suffixes,
        "facts": astuple(index.facts),
        "crc32": _checksum(arrays),
    }
    return save(dict(zip(_ARRAYS, arrays, strict=True)), {"index": json.dumps(notes)})


def _load(file: Path, stamp: Sequence[int]) -> TarIndex | None:
    try:
        with file.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        # safetensors' own reader copies what it reads.
        body = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:body])
        notes = json.loads(header["__metadata__"]["index"])
        if notes["stamp"] != list(stamp):
            return None
        arrays = [_array(data, body, **header[name]) for name in _ARRAYS]
        if _checksum(arrays) != notes["crc32"]:
            raise ValueError("its checksum differs")
        text, ends, starts, codes, blocks, sizes = arrays
        samples, digest, damage, end, duplicates = notes["facts"]
        facts = ShardFacts(samples, digest, damage, end, tuple(duplicates))
        return TarIndex(PackedStrings(text, ends), starts, tuple(notes["suffixes"]), codes, blocks, sizes, facts)
    except FileNotFoundError:
        return None
    except Exception as exc:  # whatever is damaged: ValueError, KeyError, TypeError, OSError, RecursionError, ...
        _LOG.debug("the index %s is not usable: %s", file, exc)
        return None


def _array(data: mmap.mmap, body: int, dtype: str, shape: Sequence[int], data_offsets: Sequence[int]) -> NDArray[Any]:
    return np.frombuffer(data, np.dtype(_DTYPES[dtype]), shape[0], body + data_offsets[0])


def _checksum(arrays: Iterable[NDArray[Any]]) -> int:
    return reduce(lambda crc, array: zlib.crc32(array.data, crc), arrays, 0)
