"""Where the members of a tar shard lie, from one pass over its headers.

The headers of plain tars, as most writers make them, are read here; `tarfile` reads all others and damaged ones, more
slowly.
"""

import hashlib
import os
import re
import tarfile
import zlib
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaclip.data.packed_strings import PackedStrings, narrow
from evaclip.errors import UserError

Unsigned = NDArray[np.unsignedinteger[Any]]

BLOCK = 512
_RECORD = 20 * BLOCK
_AHEAD = 8 * BLOCK
_NAME, _SIZE, _SUM, _TYPE = slice(0, 100), slice(124, 136), slice(148, 156), 156
_MAGIC, _PREFIX = slice(257, 262), 345
_FILE, _FOLDER, _PAX = (0, ord("0")), ord("5"), ord("x")
_LONGEST_PAX = 16 * BLOCK
_SAMPLED = 4
"""Headers that must be the same for an index to be of a shard."""
# Fields that change neither name nor size of the next member.
_HARMLESS = re.compile(rb"(?:\d+ (?:[acm]time|[ug]id|[ug]name|comment)=[^\n\0]*\n)+\0*")
_COMPRESSION_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class Member(NamedTuple):
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

    def matches(self, other: "ShardFacts") -> bool:
        """Whether a shard with the facts `other` is this one."""
        return (self.samples, self.digest) == (other.samples, other.digest)


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
        sampled: see `sample_headers`.
    """

    keys: PackedStrings
    starts: Unsigned
    suffixes: tuple[str, ...]
    codes: Unsigned
    blocks: Unsigned
    sizes: Unsigned
    facts: ShardFacts
    sampled: str = ""

    def __len__(self) -> int:
        return self.facts.samples

    def members(self, sample: int) -> dict[str, Member]:
        """The members of one sample by suffix."""
        span = range(int(self.starts[sample]), int(self.starts[sample + 1]))
        return {self.suffixes[self.codes[i]]: Member(BLOCK * int(self.blocks[i]), int(self.sizes[i])) for i in span}


def build_index(path: Path, name: str | None = None) -> TarIndex:
    """Reads the headers of a tar. Damage ends the index before the damaged sample; it is not an error.

    Messages call the tar by `name`, or else by its path. Raises UserError for an unreadable file and for one that
    isn't a plain tar.
    """
    name = name or str(path)
    groups, again, cut, damage = dict[str, dict[str, Member]](), set[str](), "", ""
    try:
        with path.open("rb") as file:
            try:
                files = _plain_files(file.fileno())
            except ValueError:
                files, cut, damage = _all_files(file, name)
            for member_name, member in files:
                key, suffix, is_hidden = _parse_name(member_name)
                # Of several members with one name the first counts: appended members don't change a sample.
                if not is_hidden and groups.setdefault(key, {}).setdefault(suffix, member) is not member:
                    again.add(key)
            key, suffix, _ = _parse_name(cut)
            if cut and suffix not in groups.get(key, {}):
                groups.pop(key, None)
            index = _index_of(groups, damage, tuple(key for key in groups if key in again))
            return replace(index, sampled=sample_headers(file.fileno(), index))
    except OSError as exc:
        raise UserError(f"cannot read the shard {name}: {exc.strerror}") from exc


def sample_headers(descriptor: int, index: TarIndex) -> str:
    """Hash of the block after the last member of a tar and of some headers from the first to the last. Raises OSError.

    It tells a changed shard from a copied one, which has another modification time.
    """
    blocks = np.sort(index.blocks)[np.linspace(0, len(index.blocks) - 1, _SAMPLED).astype(int)] if len(index) else ()
    digest = hashlib.sha256()
    for block in (-(-index.facts.size // BLOCK), *(int(block) - 1 for block in blocks)):
        digest.update(os.pread(descriptor, BLOCK, BLOCK * block))
    return digest.hexdigest()


def _plain_files(descriptor: int) -> list[tuple[str, Member]]:
    """Names and places of the files in a sound plain tar. Raises ValueError where `tarfile` has to look, and OSError.

    Plain are ustar, GNU and pax headers that add times and owners only.
    """
    end, position = os.fstat(descriptor).st_size, 0
    ahead, base = b"", 0
    files = list[tuple[str, Member]]()
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
        kind, size, stored = header[_TYPE], int(header[_SIZE].rstrip(b"\0"), 8), int(header[_SUM].rstrip(b"\0 "), 8)
        # The low half of Adler-32 is 1 plus the sum of the bytes; the checksum's own bytes count as spaces.
        total = zlib.adler32(header) % 2**16 - 1 - sum(header[_SUM]) + 8 * ord(" ")
        if (total - stored) % 65521 or header[_MAGIC] != b"ustar" or header[_PREFIX]:
            raise ValueError("an unusual header")
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
        if kind in _FILE:
            name = header[_NAME].partition(b"\0")[0].decode("utf-8", "surrogateescape")
            if name.endswith("/"):
                raise ValueError("a folder of an old format")
            files.append((name, Member(position, size)))
        position += (size + BLOCK - 1) // BLOCK * BLOCK
    if not files or any(os.pread(descriptor, _RECORD, position)):
        raise ValueError("no files, or a header without a name")
    return files


def _all_files(file: BinaryIO, name: str) -> tuple[list[tuple[str, Member]], str, str]:
    """As `_plain_files`, of any tar; the name of a file that is cut off, and the damage. Raises UserError."""
    files = list[tuple[str, Member]]()
    size = os.fstat(file.fileno()).st_size
    if size == 0:
        return files, "", "the file has 0 bytes"
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                if info.offset_data + info.size > size:
                    return files, info.name, f"{info.name} is cut off at byte {size}"
                if info.isfile():
                    files.append((info.name, Member(info.offset_data, info.size)))
            end = tar.offset
    except tarfile.TarError as exc:
        if not files:
            file.seek(0)
            head = file.read(6)
            packers = (packer for magic, packer in _COMPRESSION_MAGIC.items() if head.startswith(magic))
            reason = next((f"it is compressed with {packer}; unpack it first" for packer in packers), exc)
            raise UserError(f"{name} is not a plain tar shard: {reason}") from exc
        return files, "", str(exc)
    file.seek(end)
    tail = file.read(_RECORD)
    # tarfile stops without a word at a header that it cannot read and at a lone block of zeros: only zeros
    # are a proper end.
    if len(tail) < BLOCK:
        return files, "", f"no end-of-archive mark at byte {end}"
    return files, "", f"unreadable from byte {end}" if any(tail) else ""


def _parse_name(name: str) -> tuple[str, str, bool]:
    """The sample's key, the suffix, and whether the file is hidden."""
    base = name.rfind("/") + 1
    dot = name.find(".", base)
    end = len(name) if dot < 0 else dot
    return name[base if base == 1 else 0 : end], name[end + 1 :].lower(), name.startswith(("._", "__"), base)


def _index_of(groups: dict[str, dict[str, Member]], damage: str, duplicates: tuple[str, ...]) -> TarIndex:
    keys = PackedStrings.pack(groups)
    of_members = list(chain.from_iterable(groups.values()))
    suffixes = sorted(set(of_members))
    code_of = {suffix: code for code, suffix in enumerate(suffixes)}
    codes = np.array([code_of[suffix] for suffix in of_members], np.int64)
    members = chain.from_iterable(group.values() for group in groups.values())
    places = np.fromiter(chain.from_iterable(members), np.int64).reshape(-1, 2)
    offsets, sizes = places[:, 0], places[:, 1].copy()
    starts = np.cumsum([0, *map(len, groups.values())], dtype=np.int64)
    digest = hashlib.sha256()
    texts = PackedStrings.pack(of_members)
    for part in (keys.text, keys.ends, texts.text, texts.ends, sizes, starts):
        digest.update(part.data)
    return TarIndex(
        PackedStrings(keys.text, narrow(keys.ends)),
        narrow(starts),
        tuple(suffixes),
        narrow(codes),
        narrow(offsets // BLOCK),
        narrow(sizes),
        ShardFacts(len(keys), digest.hexdigest(), damage, int(places.sum(axis=1).max(initial=0)), duplicates),
    )
