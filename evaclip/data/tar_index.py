"""Where the members of a tar shard lie: built by one pass over the headers, kept in a cache folder."""

import hashlib
import logging
import os
import tarfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from evaclip.atomic import replacing
from evaclip.data.packed_strings import PackedStrings
from evaclip.errors import UserError

_LOG = logging.getLogger("evaclip.data")
_FORMAT = 2
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
        duplicates: keys with a member that came again and was passed over, in the order of their samples.
    """

    keys: PackedStrings
    starts: NDArray[np.int64]
    suffixes: PackedStrings
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    damage: str
    digest: str
    duplicates: PackedStrings

    def __len__(self) -> int:
        return len(self.keys)

    def members(self, sample: int) -> dict[str, Member]:
        """The members of one sample by suffix."""
        span = range(int(self.starts[sample]), int(self.starts[sample + 1]))
        return {self.suffixes[i]: Member(int(self.offsets[i]), int(self.sizes[i])) for i in span}


def build_index(path: Path, name: str | None = None) -> TarIndex:
    """Reads the headers of a tar. Damage ends the index before the damaged sample; it is not an error.

    Messages call the tar by `name`, or else by its path. Raises UserError for a file that cannot be read or is no plain
    tar.
    """
    name = name or str(path)
    try:
        groups, again, damage = _scan(path, name)
    except OSError as exc:
        raise UserError(f"cannot read the shard {name}: {exc.strerror}") from exc
    members = [(suffix, member) for group in groups.values() for suffix, member in group.items()]
    keys = PackedStrings.pack(groups)
    suffixes = PackedStrings.pack(suffix for suffix, _ in members)
    sizes = np.array([member.size for _, member in members], np.int64)
    starts = np.cumsum([0, *(len(group) for group in groups.values())], dtype=np.int64)
    digest = hashlib.sha256()
    for array in (keys.text, keys.ends, suffixes.text, suffixes.ends, sizes, starts):
        digest.update(array.tobytes())
    offsets = np.array([member.offset for _, member in members], np.int64)
    duplicates = PackedStrings.pack(key for key in groups if key in again)
    return TarIndex(keys, starts, suffixes, offsets, sizes, damage, digest.hexdigest(), duplicates)


def _scan(path: Path, name: str) -> tuple[dict[str, dict[str, Member]], set[str], str]:
    """The members by sample key and suffix, the keys of which a member came again, and the damage.

    Of several members with one name the first counts, so that a sample stays what it is when others are appended.
    """
    groups: dict[str, dict[str, Member]] = {}
    again: set[str] = set()
    file_size = path.stat().st_size
    if file_size == 0:
        return groups, again, "the file has 0 bytes"
    with path.open("rb") as file:
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    folder, _, base = info.name.rpartition("/")
                    stem, _, suffix = base.partition(".")
                    key = f"{folder}/{stem}" if folder else stem
                    if info.offset_data + info.size > file_size:
                        if suffix.lower() not in groups.get(key, {}):
                            groups.pop(key, None)
                        return groups, again, f"{info.name} is cut off at byte {file_size}"
                    if info.isfile() and not base.startswith(("._", "__")):
                        member = Member(info.offset_data, info.size)
                        if groups.setdefault(key, {}).setdefault(suffix.lower(), member) is not member:
                            again.add(key)
                end = tar.offset
        except tarfile.TarError as exc:
            if not groups:
                raise UserError(f"{name} is not a plain tar shard: {_why_no_tar(path, str(exc))}") from exc
            return groups, again, str(exc)
        file.seek(end)
        tail = file.read(tarfile.RECORDSIZE)
    # tarfile stops without a word at a header that it cannot read and at a lone block of zeros: only zeros
    # are a proper end.
    if len(tail) < tarfile.BLOCKSIZE:
        return groups, again, f"no end-of-archive mark at byte {end}"
    if any(tail):
        return groups, again, f"unreadable from byte {end}"
    return groups, again, ""


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


class Indexed(Protocol):
    """A shard, as far as its index goes.

    Attributes:
        identity: what the stored index is named after.
    """

    @property
    def identity(self) -> bytes: ...

    def stamp(self) -> tuple[int, int]:
        """What a stored index must agree with; int64. Raises UserError or OSError."""

    def index(self) -> TarIndex:
        """Reads the headers. Raises UserError as `build_index` does."""


class IndexCache:
    """Indexes of shards, on disk and, for the `capacity` most recent ones, in memory.

    A file of the cache is named after the shard's path or URL and valid for one stamp: the size and the modification
    time or ETag. A folder that cannot be read or written costs time, nothing else: indexes that could not be stored
    stay in memory.
    """

    def __init__(self, folder: Path | None = None, capacity: int = 128) -> None:
        self._folder = folder or default_cache_folder()
        self._capacity = capacity
        self._recent: OrderedDict[bytes, TarIndex] = OrderedDict()
        self._unstored: dict[bytes, TarIndex] = {}

    def get(self, shard: Indexed) -> TarIndex:
        """The index of a shard, built if it is not cached. Raises UserError as `build_index` does."""
        key = shard.identity
        if key in self._unstored:
            return self._unstored[key]
        if key not in self._recent:
            return self._keep(key, *self._load_or_build(shard))
        self._recent.move_to_end(key)
        return self._recent[key]

    def get_all(self, shards: Sequence[Indexed]) -> Iterator[TarIndex]:
        """The indexes of many shards in order, several being read at once. Raises as `get` does."""
        told = time.monotonic()
        with ThreadPoolExecutor(_THREADS) as pool:
            results = zip(shards, pool.map(self._load_or_build, shards), strict=True)
            for number, (shard, (index, stored)) in enumerate(results, 1):
                yield self._keep(shard.identity, index, stored)
                if time.monotonic() - told >= _SECONDS_BETWEEN_REPORTS:
                    told = time.monotonic()
                    _LOG.info("indexed %d of %d shards", number, len(shards))

    def forget(self, shard: Indexed) -> None:
        """Deletes the stored index of a shard that is not what it was, so that the next opening makes a new one."""
        with suppress(OSError):
            self._file(shard).unlink()

    def _keep(self, key: bytes, index: TarIndex, stored: bool) -> TarIndex:
        if stored:
            self._recent[key] = index
            if len(self._recent) > self._capacity:
                self._recent.popitem(last=False)
        else:
            self._unstored[key] = index
        return index

    def _load_or_build(self, shard: Indexed) -> tuple[TarIndex, bool]:
        """The index, and whether the cache folder holds it now."""
        stamp = np.array([_FORMAT, *shard.stamp()], np.int64)
        file = self._file(shard)
        if (index := _load(file, stamp)) is not None:
            return index, True
        index = shard.index()
        try:
            _store(file, stamp, index)
        except OSError as exc:
            _LOG.debug("the index of %s is not cached: %s", shard, exc)
            return index, False
        return index, True

    def _file(self, shard: Indexed) -> Path:
        return self._folder / f"{hashlib.sha256(shard.identity).hexdigest()[:32]}.npz"


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
            duplicate_text=index.duplicates.text,
            duplicate_ends=index.duplicates.ends,
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
                PackedStrings(stored["duplicate_text"], stored["duplicate_ends"]),
            )
    except FileNotFoundError:
        return None
    except Exception as exc:  # a damaged npz raises BadZipFile, zlib.error, KeyError, ValueError, ...
        _LOG.debug("the cached index %s is not usable: %s", file, exc)
        return None
