"""From path patterns to shards, and lists of shards in JSON files with all that opening them takes."""

import glob
import json
import os
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urljoin

import numpy as np

from evaclip.atomic import write_text
from evaclip.data.index_cache import IndexCache, LocalShard, Shard
from evaclip.data.packed_strings import StringPacker
from evaclip.data.remote import (
    RemoteError,
    RemoteShard,
    ShardCache,
    Version,
    is_command,
    is_remote,
    local_name,
    open_remote,
)
from evaclip.data.samples import Fault, FaultKind
from evaclip.data.tar_index import ShardFacts
from evaclip.errors import UserError

_INNERMOST_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
KIND = "evaclip-shards-v1"
LIST_SUFFIX = ".json"
_TIMEOUT = 60.0


def expand_paths(pattern: str) -> list[str]:
    """'a-{000..012}.tar::b/*.tar' -> the files, in the order given (globs sorted); URLs and commands as they are.

    Raises UserError for a glob without a match, or local files that do not exist.
    """
    paths: list[str] = []
    for part in filter(None, (part.strip() for part in pattern.split("::"))):
        for expanded in expand_braces(part):
            paths += [expanded] if is_remote(expanded) else _local(expanded)
    if not paths:
        raise UserError(f"the data path {pattern!r} names no file")
    missing = [path for path in paths if not is_remote(path) and not Path(path).exists()]
    if missing:
        subject = f"{missing[0]} does not exist"
        raise UserError(subject if len(paths) == 1 else f"{len(missing)} of {len(paths)} files are missing: {subject}")
    return paths


def _local(pattern: str) -> list[str]:
    pattern = str(Path(pattern).expanduser())
    if not glob.has_magic(pattern) or Path(pattern).exists():
        return [local_name(Path(pattern))]
    matches = sorted(glob.glob(pattern))  # noqa: PTH207 - Path.glob refuses absolute patterns
    if not matches:
        raise UserError(f"no file matches {pattern!r}")
    return [local_name(Path(match)) for match in matches]


def expand_braces(pattern: str) -> list[str]:
    """'x{a,b}{08..10}' -> ['xa08', 'xa09', 'xa10', 'xb08', ...]: lists and zero-padded ranges, nested too."""
    match = _INNERMOST_BRACES.search(pattern)
    if not match:
        return [pattern]
    if bounds := _RANGE.fullmatch(match[1]):
        first, last = int(bounds[1]), int(bounds[2])
        width = len(bounds[1]) if bounds[1].startswith("0") else 0
        step = 1 if last >= first else -1
        choices = [f"{number:0{width}d}" for number in range(first, last + step, step)]
    elif "," in match[1]:
        choices = match[1].split(",")
    else:
        raise UserError(f"{match[0]!r} in {pattern!r} is neither a list {{a,b}} nor a range {{000..123}}")
    head, tail = pattern[: match.start()], pattern[match.end() :]
    # The innermost pair goes first, so its neighbours in a list come once per choice.
    return list(dict.fromkeys(text for choice in choices for text in expand_braces(head + choice + tail)))


def shards_at(paths: Sequence[str], cache: ShardCache) -> list[Shard]:
    """The shards of paths, URLs, commands and folders. Raises UserError for a folder without shards."""
    locations = list[str]()
    for path in paths:
        if is_remote(path) or not Path(path).is_dir():
            locations.append(path)
            continue
        inside = sorted(Path(path).glob("*.tar"))
        if not inside:
            raise UserError(f"there are 0 .tar shards in the folder {path}")
        locations += map(local_name, inside)
    return [RemoteShard(place, cache) if is_remote(place) else LocalShard(Path(place)) for place in locations]


class Entry(NamedTuple):
    """A shard of a list: a local path, URL or command; its version, if it is remote; and its facts."""

    location: str
    version: Version
    facts: ShardFacts


class ShardList:
    """Shards in flat arrays: a worker shares those of the process that opened them, and 160,000 take 24 MB.

    Attributes:
        samples: int64 [n], of each shard.
        faults: of shards as a whole.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        texts, numbers = StringPacker(), array("q")
        self.faults = list[Fault]()
        self._odd = dict[int, Entry]()
        for number, entry in enumerate(entries):
            location, version, facts = entry
            for text in (location, version.tag, facts.digest):
                texts.add(text)
            numbers.extend((facts.samples, facts.size, -1 if version.size is None else version.size))
            if facts.damage or facts.duplicates:
                self._odd[number] = entry
                self.faults += _faults(location, facts)
        self._texts = texts.packed()
        self._numbers = np.array(numbers, np.int64).reshape(-1, 3)
        self.samples = self._numbers[:, 0].copy()

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, number: int) -> Entry:
        if number in self._odd:
            return self._odd[number]
        location, tag, digest = self._texts[3 * number : 3 * number + 3]
        samples, size, version = self._numbers[number].tolist()
        return Entry(location, Version(None if version < 0 else version, tag), ShardFacts(samples, digest, "", size))

    def __iter__(self) -> Iterator[Entry]:
        return map(self.__getitem__, range(len(self)))

    def digests(self) -> Iterator[tuple[str, str]]:
        """Location and digest of each, faster than its entry."""
        texts = iter(self._texts)
        return ((location, digest) for location, _, digest in zip(texts, texts, texts, strict=True))


def _faults(shard: str, facts: ShardFacts) -> Iterator[Fault]:
    if facts.damage:
        detail = f"{facts.damage}; its first {facts.samples} samples are used"
        yield Fault(FaultKind.DAMAGED_SHARD, shard, detail, file=shard)
    for key in facts.duplicates:
        detail = "it comes again in this shard; the first copy is used"
        yield Fault(FaultKind.DUPLICATE_KEY, f"{shard}:{key}", detail, shard, key)


def list_shards(shards: Sequence[Shard], indexes: IndexCache) -> ShardList:
    """Indexes shards, as far as that isn't done. Raises UserError as `build_index` does."""
    return ShardList(
        Entry(str(shard), shard.version if isinstance(shard, RemoteShard) else Version(), index.facts)
        for shard, index in zip(shards, indexes.get_all(shards), strict=True)
    )


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
    """Reads a list from a file or URL; relative names are resolved next to the list.

    Raises UserError if it cannot be read or is none, and for a shard that is a command: downloaded data starts no
    program.
    """
    text = _fetch(location) if is_remote(location) else Path(location).read_text(encoding="utf-8")
    try:
        content = json.loads(text)
        if content["kind"] != KIND:
            raise ValueError(f"its kind is {content['kind']!r}")
        shards = content["shardlist"]
        for shard in shards:
            yield _entry(shard, location)
    except (ValueError, KeyError, TypeError) as exc:
        raise UserError(
            f"{location} is not a list of shards ({KIND}) from `evaclip data index`: {type(exc).__name__}: {exc}"
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
    """The URL of a shard in the list at `location`; relative ones are resolved next to it."""
    if url.startswith("/") or is_remote(url):
        return url
    if is_command(location):
        raise ValueError(f"{url!r} is relative, and a command has no folder")
    if not is_remote(location):
        return str(Path(location).absolute().parent / url)
    return urljoin(location, url) if location.startswith("http") else f"{location.rpartition('/')[0]}/{url}"


def _fetch(url: str) -> str:
    try:
        with open_remote(url, _TIMEOUT) as remote:
            return b"".join(iter(lambda: remote.read(2**20), b"")).decode()
    except (RemoteError, UnicodeDecodeError) as exc:
        raise UserError(f"cannot read the list of shards {url}: {exc}") from exc
