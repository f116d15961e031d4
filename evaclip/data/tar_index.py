"""Where the members of a tar shard lie: built by one pass over the headers, kept in a cache folder."""

import hashlib
import logging
import os
import tarfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from evaclip.atomic import replacing
from evaclip.data.packed_strings import PackedStrings
from evaclip.errors import UserError

_LOG = logging.getLogger("evaclip.data")
_FORMAT = 1
_THREADS = 8
_SECONDS_BETWEEN_REPORTS = 10.0
_COMPRESSION_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Member:
    """The bytes [offset, offset + size) of a shard."""

    offset: int
    size: int


@dataclass(frozen=True)
class TarIndex:
    """The samples of one shard.

    Attributes:
        keys: the n sample keys in the order of their first member.
        starts: int64 [n + 1]; members starts[i]:starts[i + 1] belong to sample i.
        suffixes: PackedStrings of the m members ('png', 'seg.png'; lower case).
        offsets, sizes: int64 [m], in bytes.
        damage: why the shard ends early; empty for a sound one.
        digest: hash of keys, suffixes and sizes.
    """

    keys: PackedStrings
    starts: NDArray[np.int64]
    suffixes: PackedStrings
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    damage: str
    digest: str

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, sample: int) -> dict[str, Member]:
        """The members of one sample by suffix."""
        span = range(int(self.starts[sample]), int(self.starts[sample + 1]))
        return {self.suffixes[i]: Member(int(self.offsets[i]), int(self.sizes[i])) for i in span}


def build_index(path: Path) -> TarIndex:
    """Reads the headers of a tar. Damage ends the index before the damaged sample; it is not an error.

    Raises UserError for a file that cannot be read or is no plain tar.
    """
    try:
        groups, damage = _scan(path)
    except OSError as exc:
        raise UserError(f"cannot read the shard {path}: {exc.strerror}") from exc
    members = [(suffix, member) for group in groups.values() for suffix, member in group.items()]
    keys = PackedStrings.pack(groups)
    suffixes = PackedStrings.pack(suffix for suffix, _ in members)
    sizes = np.array([member.size for _, member in members], np.int64)
    starts = np.cumsum([0, *(len(group) for group in groups.values())], dtype=np.int64)
    digest = hashlib.sha256()
    for array in (keys.text, keys.ends, suffixes.text, suffixes.ends, sizes, starts):
        digest.update(array.tobytes())
    offsets = np.array([member.offset for _, member in members], np.int64)
    return TarIndex(keys, starts, suffixes, offsets, sizes, damage, digest.hexdigest())


def _scan(path: Path) -> tuple[dict[str, dict[str, Member]], str]:
    """The members by sample key and suffix, and the damage."""
    groups: dict[str, dict[str, Member]] = {}
    file_size = path.stat().st_size
    if file_size == 0:
        return groups, "the file has 0 bytes"
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    folder, _, name = info.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    if info.offset_data + info.size > file_size:
                        groups.pop(key, None)
                        return groups, f"{info.name} is cut off at byte {file_size}"
                    if info.isfile() and not name.startswith(("._", "__")):
                        groups.setdefault(key, {})[suffix.lower()] = Member(info.offset_data, info.size)
                end = tar.offset
        except tarfile.TarError as exc:
            if not groups:
                raise UserError(f"{path} is not a plain tar shard: {_why_no_tar(path, str(exc))}") from exc
            return groups, str(exc)
        file.seek(end)
        tail = file.read(tarfile.RECORDSIZE)
    # tarfile stops without a word at a header that it cannot read and at a lone block of zeros: only zeros
    # are a proper end.
    if len(tail) < tarfile.BLOCKSIZE:
        return groups, f"no end-of-archive mark at byte {end}"
    if any(tail):
        return groups, f"unreadable from byte {end}"
    return groups, ""


def _why_no_tar(path: Path, reason: str) -> str:
    with path.open("rb") as file:
        head = file.read(6)
    for magic, name in _COMPRESSION_MAGIC.items():
        if head.startswith(magic):
            return f"it is compressed with {name}; unpack it first"
    return reason


def default_cache_folder() -> Path:
    """`evaclip/tar-index` in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache)."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "evaclip" / "tar-index"


class IndexCache:
    """Indexes of shards, on disk and, for the `capacity` most recent ones, in memory.

    A file of the cache is named after the shard's path and valid for one size and modification time. A folder
    that cannot be read or written costs time, nothing else: indexes that could not be stored stay in memory.
    """

    def __init__(self, folder: Path | None = None, capacity: int = 128) -> None:
        self._folder = folder or default_cache_folder()
        self._capacity = capacity
        self._recent: OrderedDict[Path, TarIndex] = OrderedDict()
        self._unstored: dict[Path, TarIndex] = {}

    def get(self, path: Path) -> TarIndex:
        """The index of a shard, built if it is not cached. Raises UserError as `build_index` does."""
        if path in self._unstored:
            return self._unstored[path]
        if path not in self._recent:
            return self._keep(path, *self._load_or_build(path))
        self._recent.move_to_end(path)
        return self._recent[path]

    def get_all(self, paths: Sequence[Path]) -> Iterator[TarIndex]:
        """The indexes of many shards in order, several being read at once. Raises as `get` does."""
        told = time.monotonic()
        with ThreadPoolExecutor(_THREADS) as pool:
            results = zip(paths, pool.map(self._load_or_build, paths), strict=True)
            for number, (path, (index, stored)) in enumerate(results, 1):
                yield self._keep(path, index, stored)
                if time.monotonic() - told >= _SECONDS_BETWEEN_REPORTS:
                    told = time.monotonic()
                    _LOG.info("indexed %d of %d shards", number, len(paths))

    def _keep(self, path: Path, index: TarIndex, stored: bool) -> TarIndex:
        if stored:
            self._recent[path] = index
            if len(self._recent) > self._capacity:
                self._recent.popitem(last=False)
        else:
            self._unstored[path] = index
        return index

    def _load_or_build(self, path: Path) -> tuple[TarIndex, bool]:
        """The index, and whether the cache folder holds it now."""
        stat = path.stat()
        stamp = np.array([_FORMAT, stat.st_size, stat.st_mtime_ns], np.int64)
        name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
        file = self._folder / f"{name}.npz"
        if (index := _load(file, stamp)) is not None:
            return index, True
        index = build_index(path)
        try:
            _store(file, stamp, index)
        except OSError as exc:
            _LOG.debug("the index of %s is not cached: %s", path, exc)
            return index, False
        return index, True


def _store(file: Path, stamp: NDArray[np.int64], index: TarIndex) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as temporary, temporary.open("wb") as stream:
        np.savez(
            stream,
            stamp=stamp,
            key_text=index.keys.text,
            key_ends=index.keys.ends,
            starts=index.starts,
            suffix_text=index.suffixes.text,
            suffix_ends=index.suffixes.ends,
            offsets=index.offsets,
            sizes=index.sizes,
            notes=np.array([index.damage, index.digest]),
        )


def _load(file: Path, stamp: NDArray[np.int64]) -> TarIndex | None:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            if not np.array_equal(stored["stamp"], stamp):
                return None
            return TarIndex(
                PackedStrings(stored["key_text"], stored["key_ends"]),
                stored["starts"],
                PackedStrings(stored["suffix_text"], stored["suffix_ends"]),
                stored["offsets"],
                stored["sizes"],
                str(stored["notes"][0]),
                str(stored["notes"][1]),
            )
    except FileNotFoundError:
        return None
    except Exception as exc:  # a damaged npz raises BadZipFile, zlib.error, KeyError, ValueError, ...
        _LOG.debug("the cached index %s is not usable: %s", file, exc)
        return None
