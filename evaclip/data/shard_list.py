"""A list of shards with all that opening a data set needs to know of them: a JSON file, made once."""

import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload
from urllib.parse import urljoin

import numpy as np

from evaclip.atomic import write_text
from evaclip.data.packed_strings import StringPacker
from evaclip.data.remote import RemoteError, Version, is_command, is_remote, open_remote
from evaclip.data.samples import Fault, FaultKind
from evaclip.data.tar_index import ShardFacts
from evaclip.errors import UserError

KIND = "evaclip-shards-v1"
LIST_SUFFIX = ".json"
_TIMEOUT = 60.0


@dataclass(frozen=True)
class Entry:
    """A shard of a list: a local path, URL or command; its version, if it is remote; and its facts."""

    location: str
    version: Version
    facts: ShardFacts


def agree(listed: ShardFacts, found: ShardFacts) -> bool:
    """Whether a shard is the one that is listed."""
    return (listed.samples, listed.digest) == (found.samples, found.digest)


class ShardList(Sequence[Entry]):
    """Shards in flat arrays: a worker shares those of the process that opened them, and 160,000 take 24 MB.

    Attributes:
        samples: int64 [n], of each shard.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        texts, numbers, odd = StringPacker(), array("q"), dict[int, tuple[str, tuple[str, ...]]]()
        for number, entry in enumerate(entries):
            for text in (entry.location, entry.version.tag, entry.facts.digest):
                texts.add(text)
            size = -1 if entry.version.size is None else entry.version.size
            numbers.extend((entry.facts.samples, entry.facts.size, size))
            if entry.facts.damage or entry.facts.duplicates:
                odd[number] = entry.facts.damage, entry.facts.duplicates
        self._texts = texts.packed()
        self._numbers = np.array(numbers, np.int64).reshape(-1, 3)
        self._odd = odd
        self.samples = self._numbers[:, 0].copy()

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> Entry: ...
    @overload
    def __getitem__(self, index: slice) -> list[Entry]: ...
    def __getitem__(self, index: int | slice) -> Entry | list[Entry]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        location, tag, digest = self._texts[3 * number : 3 * number + 3]
        samples, size, version = self._numbers[number].tolist()
        damage, duplicates = self._odd.get(number, ("", ()))
        facts = ShardFacts(samples, digest, damage, size, duplicates)
        return Entry(location, Version(None if version < 0 else version, tag), facts)

    def digests(self) -> Iterator[tuple[str, str]]:
        """Location and digest of each, faster than its entry."""
        texts = iter(self._texts)
        return ((location, digest) for location, _, digest in zip(texts, texts, texts, strict=True))

    def faults(self) -> Iterator[Fault]:
        """What is wrong with shards as a whole."""
        for number in self._odd:
            entry = self[number]
            shard, facts = entry.location, entry.facts
            if facts.damage:
                detail = f"{facts.damage}; its first {facts.samples} samples are used"
                yield Fault(FaultKind.DAMAGED_SHARD, shard, detail, file=shard)
            for key in facts.duplicates:
                detail = "it comes again in this shard; the first copy is used"
                yield Fault(FaultKind.DUPLICATE_KEY, f"{shard}:{key}", detail, shard, key)


def write_list(path: Path, entries: Iterable[Entry]) -> None:
    """Writes a list. Local shards in its folder or below are named relative to it, so that they can move together."""
    folder = path.absolute().parent
    shards = [
        {
            "url": _relative(entry.location, folder),
            "nsamples": entry.facts.samples,
            "filesize": entry.version.size,
            "etag": entry.version.tag,
            "digest": entry.facts.digest,
            "damage": entry.facts.damage,
            "indexed_bytes": entry.facts.size,
            **({"duplicates": entry.facts.duplicates} if entry.facts.duplicates else {}),
        }
        for entry in entries
    ]
    lines = ",\n".join(json.dumps(shard) for shard in shards)
    write_text(path, f'{{"kind": "{KIND}", "shardlist": [\n{lines}\n]}}\n')


def read_list(location: str) -> Iterator[Entry]:
    """Reads a list from a file or URL; relative names in it are taken from where it lies.

    Raises UserError if it cannot be read or is none, and for a shard that is a command: what was downloaded runs
    nothing.
    """
    text = _fetch(location) if is_remote(location) else Path(location).read_text(encoding="utf-8")
    try:
        content = json.loads(text)
        if content["kind"] != KIND:
            raise ValueError(f"its kind is {content['kind']!r}")
        shards = content["shardlist"]
        yield from (_entry(shard, location) for shard in shards)
    except (ValueError, KeyError, TypeError) as exc:
        raise UserError(
            f"{location} is no list of shards ({KIND}), as `evaclip data index` writes it: {type(exc).__name__}: {exc}"
        ) from exc
    if not shards:
        raise UserError(f"there are 0 shards in the list {location}")


def _entry(shard: Mapping[str, Any], location: str) -> Entry:
    facts = ShardFacts(
        int(shard["nsamples"]),
        str(shard["digest"]),
        str(shard["damage"]),
        int(shard["indexed_bytes"]),
        tuple(map(str, shard.get("duplicates", ()))),
    )
    size = shard["filesize"]
    version = Version(None if size is None else int(size), str(shard["etag"] or ""))
    name = _absolute(str(shard["url"]), location)
    if is_command(name):
        raise UserError(
            f"the url of a shard in the list {location} must be a path or a URL, got the command {name!r}; commands run"
            " from the command line and the configuration alone: set data.train to the command"
        )
    return Entry(name, version, facts)


def _relative(location: str, folder: Path) -> str:
    if is_remote(location):
        return location
    path = Path(os.path.abspath(location))  # noqa: PTH100 - resolve() follows links
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _absolute(url: str, location: str) -> str:
    if url.startswith("/") or is_remote(url):
        return url
    if is_command(location):
        raise ValueError(f"{url!r} is relative, and a command has no folder")
    return _beside(location, url)


def _beside(location: str, name: str) -> str:
    if not is_remote(location):
        return str(Path(location).absolute().parent / name)
    if location.startswith("http"):
        return urljoin(location, name)
    return f"{location.rpartition('/')[0]}/{name}"


def _fetch(url: str) -> str:
    try:
        with open_remote(url, _TIMEOUT) as remote:
            return b"".join(iter(lambda: remote.read(2**20), b"")).decode()
    except (RemoteError, UnicodeDecodeError) as exc:
        raise UserError(f"cannot read the list of shards {url}: {exc}") from exc
