"""Indexes of shards in files, which processes map: an index costs none of them memory."""

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path

from evaclip.data.packed_strings import PackedStrings, map_arrays, write_arrays
from evaclip.data.remote import RemoteShard
from evaclip.data.tar_index import ShardFacts, TarIndex, build_index, sample_headers
from evaclip.errors import UserError
from evaclip.machine import user_cache

_LOG = logging.getLogger("evaclip.data")
_FORMAT = 4
_SUFFIX = ".index"
_THREADS = 8
_AT_A_TIME = 64
"""Pending shards: each keeps a file open."""
_SECONDS_BETWEEN_REPORTS = 10.0
_TRIM_EVERY = 256
_AHEAD = 2**17
_CAPACITY = 10 * 10**9
_ARRAYS = ("key_text", "key_ends", "starts", "codes", "blocks", "sizes")


@dataclass(frozen=True)
class LocalShard:
    """A tar file of a mounted file system, with the interface of `RemoteShard` as far as its users need it.

    Attributes:
        size: in bytes, nearly.
    """

    path: Path
    size: int = 0

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def identity(self) -> bytes:
        """The name that its index file is derived from."""
        return os.fsencode(self.path.absolute())

    def stamp(self) -> tuple[int]:
        """The stamp that its index file must have. Raises OSError."""
        return (self.path.stat().st_size,)

    def has_headers_of(self, index: TarIndex) -> bool:
        """Whether an index of a shard of this size is of this one. Raises OSError."""
        with self.path.open("rb") as file:
            return sample_headers(file.fileno(), index) == index.sampled

    def index(self) -> TarIndex:
        """Reads the headers. Raises UserError as `build_index` does."""
        return build_index(self.path)

    @property
    def capacity(self) -> int:
        """Bytes of shards that may be read ahead: a quarter of the machine's memory, which holds the page cache."""
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4

    def fetch_ahead(self) -> None:
        """Makes the kernel read the file from start to end into the page cache, without waiting. Raises OSError.

        Pages that are there or on their way aren't read again, so a machine reads once what its processes ask for.
        """
        with self.path.open("rb") as file:
            # A longer range would be read only up to the device's limit.
            for offset in range(0, os.fstat(file.fileno()).st_size, _AHEAD):
                os.posix_fadvise(file.fileno(), offset, _AHEAD, os.POSIX_FADV_WILLNEED)


Shard = LocalShard | RemoteShard


class IndexCache:
    """Indexes of shards on disk.

    A file is valid for a shard of the same size and ETag or, if it is local, of the same size and sampled headers. With
    `next_to_shards` it is written next to the shard (`00000.tar.index`), else into the cache folder, which is limited
    to 10 GB. Indexes that can't be stored stay in memory.
    """

    def __init__(self, next_to_shards: bool = False) -> None:
        self._folder = user_cache("tar-index")
        self._next_to_shards = next_to_shards
        self._unstored: dict[bytes, TarIndex] = {}
        self._stored = 0
        self._closed = set[Path]()

    def get(self, shard: Shard) -> TarIndex:
        """The index of a shard, built if there is none. Raises OSError, and UserError as `build_index` does."""
        if shard.identity in self._unstored:
            return self._unstored[shard.identity]
        files, stamp = self._files(shard), _stamp(shard)
        for file in files[:1] if self._next_to_shards else files:
            if (index := _load(file, stamp)) is not None and shard.has_headers_of(index):
                return index
        index = shard.index()
        stored = self._store(files if self._next_to_shards else files[-1:], stamp, index)
        if stored is None:
            self._unstored[shard.identity] = index
            return index
        # Processes share a mapped index, not a built one.
        return _load(stored, stamp) or index

    def get_all(self, shards: Sequence[Shard]) -> Iterator[TarIndex]:
        """The indexes of many shards in order, several being read at once.

        Raises:
            OSError: as `get`.
            UserError: as `get`; the message names all local files that are not shards.
        """
        reported, problems = time.monotonic(), list[str]()

        def get(shard: Shard) -> TarIndex | None:
            try:
                return self.get(shard)
            except UserError as exc:
                if isinstance(shard, RemoteShard):  # whose server may be away
                    raise
                problems.append(str(exc))
                return None

        with ThreadPoolExecutor(_THREADS) as pool:
            for first in range(0, len(shards), _AT_A_TIME):
                indexes = pool.map(get, shards[first : first + _AT_A_TIME])
                yield from (index for index in indexes if index is not None)
                if time.monotonic() - reported >= _SECONDS_BETWEEN_REPORTS:
                    reported = time.monotonic()
                    _LOG.info("indexed %d of %d shards", min(first + _AT_A_TIME, len(shards)), len(shards))
        if problems:
            raise UserError("; ".join(sorted(problems)))

    def put(self, shard: Shard, index: TarIndex) -> None:
        """Stores an index that another process built; a folder that can't be written is ignored."""
        self._store(self._files(shard)[-1:], _stamp(shard), index)

    def forget(self, shard: Shard) -> None:
        """Deletes the stored index of a changed shard; the next opening makes a new one."""
        with suppress(OSError):
            self._files(shard)[-1].unlink()

    def _files(self, shard: Shard) -> list[Path]:
        """Where an index may lie, the cache folder last."""
        cached = self._folder / f"{hashlib.sha256(shard.identity).hexdigest()[:32]}{_SUFFIX}"
        return [cached] if shard.path is None else [shard.path.with_name(shard.path.name + _SUFFIX), cached]

    def _store(self, files: Sequence[Path], stamp: Sequence[int], index: TarIndex) -> Path | None:
        """Writes the index to the first file that can be written, and returns that."""
        arrays = (index.keys.text, index.keys.ends, index.starts, index.codes, index.blocks, index.sizes)
        notes = {"suffixes": index.suffixes, "facts": astuple(index.facts), "sampled": index.sampled}
        for file in files:
            try:
                write_arrays(file, stamp, dict(zip(_ARRAYS, arrays, strict=True)), notes)
            except OSError as exc:
                level = logging.DEBUG if file.parent in self._closed else logging.WARNING
                self._closed.add(file.parent)
                _LOG.log(level, "the index is not stored in %s: %s", file, exc)
                continue
            self._stored += 1
            if file.parent == self._folder and self._stored % _TRIM_EVERY == 0:
                _trim(self._folder)
            return file
        return None


def _stamp(shard: Shard) -> list[int]:
    return [_FORMAT, *shard.stamp()]


def _load(file: Path, stamp: list[int]) -> TarIndex | None:
    if not (stored := map_arrays(file, stamp, _ARRAYS)):
        return None
    (text, ends, starts, codes, blocks, sizes), notes = stored[0].values(), stored[1]
    samples, digest, damage, end, duplicates = notes["facts"]
    facts = ShardFacts(samples, digest, damage, end, tuple(duplicates))
    names, suffixes = PackedStrings(text, ends), tuple(notes["suffixes"])
    return TarIndex(names, starts, suffixes, codes, blocks, sizes, facts, notes["sampled"])


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
