"""Where the members of a tar shard lie, found by one pass over its headers."""

import hashlib
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evaclip.data.packed_strings import PackedStrings
from evaclip.data.tar_headers import BLOCK, Members, scan
from evaclip.errors import UserError

_COMPRESSION_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

Unsigned = NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class Member:
    """The bytes [offset, offset + size) of a shard."""

    offset: int
    size: int


@dataclass(frozen=True)
class ShardFacts:
    """What the order of samples and the fingerprint are made of.

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
        facts: what is known of the shard as a whole.
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
        PackedStrings(found.key_text, _narrow(found.key_ends)),
        _narrow(found.starts),
        tuple(found.suffixes),
        _narrow(found.codes),
        _narrow(found.offsets // BLOCK),
        _narrow(found.sizes),
        ShardFacts(len(found.key_ends), digest.hexdigest(), damage, end, duplicates),
    )


def _narrow(numbers: NDArray[np.int64]) -> Unsigned:
    return numbers.astype(np.min_scalar_type(numbers.max(initial=0)))


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
