"""Where the members of a tar shard lie: one pass over its headers, and index files that processes share.

`scan` serves the tars that most writers make (ustar, GNU or pax headers that add times and owners only, members of a
sample side by side): it parses headers together and makes no Python object a member. Anything else, damage too, is left
to `tarfile`, which is slower.

Processes map index files, so an index costs none of them memory.
"""

import hashlib
import logging
import os
import re
import tarfile
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from evaclip.data.packed_strings import PackedStrings, map_arrays, narrow, write_arrays
from evaclip.errors import UserError
from evaclip.machine import user_cache

_LOG = logging.getLogger("evaclip.data")

I64 = NDArray[np.int64]
U8 = NDArray[np.uint8]
Unsigned = NDArray[np.unsignedinteger[Any]]

BLOCK = 512
_RECORD = 20 * BLOCK
_AHEAD = 8 * BLOCK
_TOGETHER = 8192
_NAME, _SIZE, _SUM, _TYPE = slice(0, 100), slice(124, 136), slice(148, 156), 156
_MAGIC, _PREFIX = slice(257, 262), slice(345, 500)
_FILE, _FOLDER, _PAX = (0, ord("0")), ord("5"), ord("x")
_LONGEST_PAX = 16 * BLOCK
# Fields that change neither name nor size of the next member.
_HARMLESS = re.compile(rb"(?:\d+ (?:[acm]time|[ug]id|[ug]name|comment)=[^\n\0]*\n)+\0*")
_COMPRESSION_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

_FORMAT = 3
_SUFFIX = ".index"
_THREADS = 8
_AT_A_TIME = 64
"""Pending shards: each keeps a file open."""
_SECONDS_BETWEEN_REPORTS = 10.0
_TRIM_EVERY = 256
_CAPACITY = 10 * 10**9
_ARRAYS = ("key_text", "key_ends", "starts", "codes", "blocks", "sizes")


class Members(NamedTuple):
    """The members of a shard, those of a sample side by side.

    Attributes:
        key_text: the UTF-8 keys, one after the other.
        key_ends: int64 [n], where they end in it.
        starts: int64 [n + 1]; members starts[i]:starts[i + 1] belong to sample i.
        suffixes: the k distinct suffixes, lower case, sorted.
        codes: int64 [m], of each member's suffix.
        offsets, sizes: int64 [m], in bytes.
    """

    key_text: U8
    key_ends: I64
    starts: I64
    suffixes: list[str]
    codes: I64
    offsets: I64
    sizes: I64


def scan(descriptor: int) -> Members | None:
    """The members of a sound plain tar; None where `tarfile` has to look. Raises OSError."""
    try:
        chunks = _walk(descriptor)
    except ValueError:
        return None
    names, offsets, sizes = (np.concatenate(parts) for parts in zip(*chunks, strict=True))
    return _grouped(names, offsets, sizes) if len(names) else None


def _walk(descriptor: int) -> list[tuple[U8, I64, I64]]:
    """Names [k, 100], offsets [k] and sizes [k] of files, by chunks. Raises ValueError if the tar isn't plain."""
    end, position = os.fstat(descriptor).st_size, 0
    ahead, base = b"", 0
    chunks, headers, offsets, sizes = list[tuple[U8, I64, I64]](), list[bytes](), list[int](), list[int]()
    while True:
        at = position - base
        # A sample's small members follow one another, so that one read has the headers of all.
        if at + BLOCK > len(ahead):
            ahead, base, at = os.pread(descriptor, _AHEAD, position), position, 0
        header = ahead[at : at + BLOCK]
        if len(header) < BLOCK:
            raise ValueError("no end-of-archive mark")
        if not header[0]:
            break
        kind, size = header[_TYPE], int(header[_SIZE].rstrip(b"\0"), 8)
        position += BLOCK
        if kind == _PAX:
            if not (0 <= size <= _LONGEST_PAX and _HARMLESS.fullmatch(os.pread(descriptor, size, position))):
                raise ValueError("a pax header of more than times and owners")
        elif kind == _FOLDER:
            size = 0
        elif kind not in _FILE or size < 0:
            raise ValueError("an unusual type of member")
        if position + size > end:
            raise ValueError("a member that is cut off")
        headers.append(header)
        offsets.append(position)
        sizes.append(size)
        position += (size + BLOCK - 1) // BLOCK * BLOCK
        if len(headers) == _TOGETHER:
            chunks.append(_files(headers, offsets, sizes))
            headers, offsets, sizes = [], [], []
    if any(os.pread(descriptor, _RECORD, position)):
        raise ValueError("a header without a name")
    return [*chunks, _files(headers, offsets, sizes)]


def _files(parts: list[bytes], offsets: list[int], sizes: list[int]) -> tuple[U8, I64, I64]:
    """Names, offsets and sizes of the files among some headers, after a check of their checksums."""
    headers = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, BLOCK)
    sums = headers.sum(axis=1, dtype=np.int64) - headers[:, _SUM].sum(axis=1, dtype=np.int64) + 8 * ord(" ")
    stored = np.zeros(len(headers), np.int64)
    for column in headers[:, _SUM].T.astype(np.int64):
        stored = np.where((column >= ord("0")) & (column < ord("8")), stored * 8 + column - ord("0"), stored)
    names = headers[:, _NAME]
    ended = np.maximum.accumulate(names == 0, axis=1)
    odd = (names > 127).any() or (names * ended).any() or headers[:, _PREFIX].any() or (names[:, 0] == ord("/")).any()
    if odd or not np.array_equal(sums, stored) or (headers[:, _MAGIC] != np.frombuffer(b"ustar", np.uint8)).any():
        raise ValueError("an unusual header")
    kept = np.isin(headers[:, _TYPE], _FILE)
    return names[kept], np.array(offsets, np.int64)[kept], np.array(sizes, np.int64)[kept]


def _grouped(names: U8, offsets: I64, sizes: I64) -> Members | None:
    """The members by sample; None if members of a sample lie apart or come again."""
    columns = np.arange(names.shape[1], dtype=np.uint8)
    ends = np.where((names == 0).any(axis=1), (names == 0).argmax(axis=1), names.shape[1])
    bases = np.where(names == ord("/"), columns + 1, 0).max(axis=1)
    if (bases == ends).any():
        return None
    pairs = np.stack([_at(names, bases), _at(names, bases + 1)], axis=1)
    hidden = (pairs == np.frombuffer(b"._", np.uint8)).all(axis=1) | (pairs == ord("_")).all(axis=1)
    names, offsets, sizes, ends, bases = (part[~hidden] for part in (names, offsets, sizes, ends, bases))
    if not len(names):
        return None
    dots = (names == ord(".")) & (columns >= bases[:, None])
    stems = np.where(dots.any(axis=1), dots.argmax(axis=1), ends)
    in_key = columns < stems[:, None]
    keys = np.where(in_key, names, 0)
    first = np.flatnonzero(np.r_[True, (keys[1:] != keys[:-1]).any(axis=1)])
    if len(np.unique(keys[first].view("S100"))) != len(first):
        return None
    width = int((ends - stems).max())
    letters = np.stack(
        [np.where(stems + 1 + i < ends, _at(names, stems + 1 + i), 0) for i in range(width or 1)], axis=1
    )
    letters += (32 * ((letters >= ord("A")) & (letters <= ord("Z")))).astype(np.uint8)
    suffixes, codes = np.unique(np.ascontiguousarray(letters).view(f"S{width or 1}").ravel(), return_inverse=True)
    starts = np.r_[first, len(names)]
    sample = np.repeat(np.arange(len(first)), np.diff(starts))
    if len(np.unique(sample * len(suffixes) + codes)) != len(names):
        return None
    text = names[first][in_key[first]]
    return Members(text, np.cumsum(stems[first]), starts, [str(s, "ascii") for s in suffixes], codes, offsets, sizes)


def _at(names: U8, columns: I64) -> U8:
    """The bytes at one column of each row; 0 beyond the last column."""
    inside = np.minimum(columns, names.shape[1] - 1)
    return np.where(columns < names.shape[1], names[np.arange(len(names)), inside], 0).astype(np.uint8)


@dataclass(frozen=True)
class Member:
    """The bytes [offset, offset + size) of a shard."""

    offset: int
    size: int


@dataclass(frozen=True)
class ShardFacts:
    """Content that decides sample order and fingerprint.

    Attributes:
        samples: how many the shard has.
        digest: hash of its keys, suffixes and sizes.
        damage: why it ends early; empty for a sound one.
        size: in bytes, of what the index covers.
        duplicates: keys with a member that came again and was passed over, in the order of their samples.
    """

    samples: int
    digest: str
    damage: str
    size: int
    duplicates: tuple[str, ...] = ()

    def matches(self, found: "ShardFacts") -> bool:
        """Whether a shard with the facts `found` is this one."""
        return (self.samples, self.digest) == (found.samples, found.digest)


@dataclass(frozen=True)
class TarIndex:
    """The samples of one shard. Arrays of numbers are of the narrowest unsigned type.

    Attributes:
        keys: the n sample keys in the order of their first member.
        starts: [n + 1]; members starts[i]:starts[i + 1] belong to sample i.
        suffixes: the k distinct suffixes ('png', 'seg.png'; lower case), sorted.
        codes: [m], of each member the number of its suffix.
        blocks: [m], where the bytes of each member begin, in blocks of 512 bytes.
        sizes: [m], in bytes.
        facts: of the shard as a whole.
    """

    keys: PackedStrings
    starts: Unsigned
    suffixes: tuple[str, ...]
    codes: Unsigned
    blocks: Unsigned
    sizes: Unsigned
    facts: ShardFacts

    def __len__(self) -> int:
        return self.facts.samples

    def members(self, sample: int) -> dict[str, Member]:
        """The members of one sample by suffix."""
        span = range(int(self.starts[sample]), int(self.starts[sample + 1]))
        return {self.suffixes[self.codes[i]]: Member(BLOCK * int(self.blocks[i]), int(self.sizes[i])) for i in span}


def build_index(path: Path, name: str | None = None) -> TarIndex:
    """Reads the headers of a tar. Damage ends the index before the damaged sample; it is not an error.

    Messages call the tar by `name`, or else by its path. Raises UserError for a file that cannot be read or is no plain
    tar.
    """
    name = name or str(path)
    try:
        with path.open("rb") as file:
            plain = scan(file.fileno())
        if plain:
            return _index_of(plain, "", ())
        groups, again, damage = _scan(path, name)
    except OSError as exc:
        raise UserError(f"cannot read the shard {name}: {exc.strerror}") from exc
    return _index_of(_flat(groups), damage, tuple(key for key in groups if key in again))


def _flat(groups: dict[str, dict[str, Member]]) -> Members:
    """The members of `_scan` as those of `scan`."""
    keys = PackedStrings.pack(groups)
    members = [(suffix, member) for group in groups.values() for suffix, member in group.items()]
    suffixes = sorted({suffix for suffix, _ in members})
    codes = {suffix: code for code, suffix in enumerate(suffixes)}
    return Members(
        keys.text,
        keys.ends.astype(np.int64),
        np.cumsum([0, *(len(group) for group in groups.values())], dtype=np.int64),
        suffixes,
        np.array([codes[suffix] for suffix, _ in members], np.int64),
        np.array([member.offset for _, member in members], np.int64),
        np.array([member.size for _, member in members], np.int64),
    )


def _index_of(found: Members, damage: str, duplicates: tuple[str, ...]) -> TarIndex:
    texts = [suffix.encode("utf-8", "surrogateescape") for suffix in found.suffixes]
    text = b"".join([texts[code] for code in found.codes.tolist()])
    ends = np.cumsum(np.array([len(text) for text in texts], np.int64)[found.codes])
    digest = hashlib.sha256()
    for part in (found.key_text, found.key_ends, text, ends, found.sizes, found.starts):
        digest.update(part if isinstance(part, bytes) else part.tobytes())
    end = int((found.offsets + found.sizes).max(initial=0))
    return TarIndex(
        PackedStrings(found.key_text, narrow(found.key_ends)),
        narrow(found.starts),
        tuple(found.suffixes),
        narrow(found.codes),
        narrow(found.offsets // BLOCK),
        narrow(found.sizes),
        ShardFacts(len(found.key_ends), digest.hexdigest(), damage, end, duplicates),
    )


def _scan(path: Path, name: str) -> tuple[dict[str, dict[str, Member]], set[str], str]:
    """The members by sample key and suffix, the keys of which a member came again, and the damage.

    Of several members with one name the first counts: appended members don't change a sample.
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
                file.seek(0)
                head = file.read(6)
                packers = (packer for magic, packer in _COMPRESSION_MAGIC.items() if head.startswith(magic))
                reason = next((f"it is compressed with {packer}; unpack it first" for packer in packers), exc)
                raise UserError(f"{name} is not a plain tar shard: {reason}") from exc
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


class Shard(Protocol):
    """A shard that can be indexed.

    Attributes:
        identity: the name that its index file is derived from.
        path: the shard's file; None if it isn't on this machine.
    """

    @property
    def identity(self) -> bytes: ...
    @property
    def path(self) -> Path | None: ...

    def stamp(self) -> tuple[int, int]:
        """The stamp that this shard's index file must have. Raises OSError or UserError."""

    def index(self) -> TarIndex:
        """Reads the headers. Raises UserError as `build_index` does."""


@dataclass(frozen=True)
class LocalShard:
    """A tar file of this machine; a `Shard`."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def identity(self) -> bytes:
        return os.fsencode(self.path.absolute())

    def stamp(self) -> tuple[int, int]:
        facts = self.path.stat()
        return facts.st_size, facts.st_mtime_ns

    def index(self) -> TarIndex:
        return build_index(self.path)


class IndexCache:
    """Indexes of shards, on disk and, for the `capacity` most recent ones, mapped.

    A file is valid for one stamp: the shard's size and its modification time or ETag. With `next_to_shards` it is
    written next to the shard (`00000.tar.index`), else into the cache folder, which is limited to 10 GB. Indexes that
    can't be stored stay in memory.
    """

    def __init__(self, folder: Path | None = None, capacity: int = 256, next_to_shards: bool = False) -> None:
        self._folder = folder or user_cache("tar-index")
        self._capacity = capacity
        self._next_to_shards = next_to_shards
        self._recent: OrderedDict[bytes, TarIndex] = OrderedDict()
        self._unstored: dict[bytes, TarIndex] = {}
        self._stored = 0
        self._closed = set[Path]()

    def get(self, shard: Shard) -> TarIndex:
        """The index of a shard, built if there is none. Raises UserError as `build_index` does."""
        key = shard.identity
        if key in self._unstored:
            return self._unstored[key]
        if key not in self._recent:
            return self._keep(key, *self._load_or_build(shard))
        self._recent.move_to_end(key)
        return self._recent[key]

    def get_all(self, shards: Sequence[Shard]) -> Iterator[TarIndex]:
        """The indexes of many shards in order, several being read at once. Raises as `get` does."""
        reported = time.monotonic()
        with ThreadPoolExecutor(_THREADS) as pool:
            for first in range(0, len(shards), _AT_A_TIME):
                some = shards[first : first + _AT_A_TIME]
                for number, found in enumerate(pool.map(self._load_or_build, some), first):
                    yield self._keep(shards[number].identity, *found)
                    if time.monotonic() - reported >= _SECONDS_BETWEEN_REPORTS:
                        reported = time.monotonic()
                        _LOG.info("indexed %d of %d shards", number + 1, len(shards))

    def put(self, shard: Shard, index: TarIndex) -> None:
        """Stores an index that another process built; a folder that can't be written is ignored."""
        self._store(self._files(shard)[-1:], _stamp(shard), index)

    def forget(self, shard: Shard) -> None:
        """Deletes the stored index of a changed shard; the next opening makes a new one."""
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

    def _load_or_build(self, shard: Shard) -> tuple[TarIndex, bool]:
        """The index, and whether it is in a file now."""
        stamp = _stamp(shard)
        files = self._files(shard)
        for file in files[:1] if self._next_to_shards else files:
            if (index := self._load(file, stamp)) is not None:
                return index, True
        index = shard.index()
        stored = self._store(files if self._next_to_shards else files[-1:], stamp, index)
        # Processes share a mapped index, not a built one.
        return (index, False) if stored is None else (self._load(stored, stamp) or index, True)

    def _load(self, file: Path, stamp: list[int]) -> TarIndex | None:
        if not (found := map_arrays(file, stamp, _ARRAYS)):
            return None
        (text, ends, starts, codes, blocks, sizes), notes = found[0].values(), found[1]
        samples, digest, damage, end, duplicates = notes["facts"]
        facts = ShardFacts(samples, digest, damage, end, tuple(duplicates))
        return TarIndex(PackedStrings(text, ends), starts, tuple(notes["suffixes"]), codes, blocks, sizes, facts)

    def _files(self, shard: Shard) -> list[Path]:
        """Where an index may lie, the cache folder last."""
        cached = self._folder / f"{hashlib.sha256(shard.identity).hexdigest()[:32]}{_SUFFIX}"
        return [cached] if shard.path is None else [shard.path.with_name(shard.path.name + _SUFFIX), cached]

    def _store(self, files: Sequence[Path], stamp: Sequence[int], index: TarIndex) -> Path | None:
        """Writes the index to the first file that can be written, and returns that."""
        arrays = (index.keys.text, index.keys.ends, index.starts, index.codes, index.blocks, index.sizes)
        notes = {"suffixes": index.suffixes, "facts": astuple(index.facts)}
        for file in files:
            try:
                write_arrays(file, stamp, dict(zip(_ARRAYS, arrays, strict=True)), notes)
            except OSError as exc:
                level = logging.DEBUG if file == files[-1] or file.parent in self._closed else logging.WARNING
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
