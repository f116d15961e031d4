"""A list of shards with all that opening a data set needs to know of them: a JSON file, made once."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from evaclip.atomic import write_text
from evaclip.data.remote import COMMAND, RemoteError, Version, is_remote, open_remote
from evaclip.data.tar_index import TarIndex
from evaclip.errors import UserError

KIND = "evaclip-shards-v1"
LIST_SUFFIX = ".json"
_TIMEOUT = 60.0


@dataclass(frozen=True)
class ShardFacts:
    """What the order of samples and the fingerprint are made of.

    Attributes:
        samples: how many the shard has.
        digest: hash of its keys, suffixes and sizes.
        damage: why it ends early; empty for a sound one.
        size: in bytes, of what the index covers.
        duplicates: keys that come again in it.
    """

    samples: int
    digest: str
    damage: str
    size: int
    duplicates: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """A shard of a list: a local path, URL or command; its version, if it is remote; and its facts."""

    location: str
    version: Version
    facts: ShardFacts


def facts_of(index: TarIndex) -> ShardFacts:
    """The facts of an indexed shard."""
    size = int((index.offsets + index.sizes).max(initial=0))
    return ShardFacts(len(index), index.digest, index.damage, size, tuple(index.duplicates))


def write_list(path: Path, entries: Sequence[Entry]) -> None:
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


def read_list(location: str) -> list[Entry]:
    """Reads a list from a file or URL; relative names in it are taken from where it lies.

    Raises UserError if it cannot be read or is none.
    """
    text = _fetch(location) if is_remote(location) else Path(location).read_text(encoding="utf-8")
    try:
        content = json.loads(text)
        if content["kind"] != KIND:
            raise ValueError(f"its kind is {content['kind']!r}")
        entries = [_entry(shard, location) for shard in content["shardlist"]]
    except (ValueError, KeyError, TypeError) as exc:
        raise UserError(
            f"{location} is no list of shards ({KIND}), as `evaclip data index` writes it: {type(exc).__name__}: {exc}"
        ) from exc
    if not entries:
        raise UserError(f"there are 0 shards in the list {location}")
    return entries


def _entry(shard: Mapping[str, Any], location: str) -> Entry:
    facts = ShardFacts(
        int(shard["nsamples"]),
        str(shard["digest"]),
        str(shard["damage"]),
        int(shard["indexed_bytes"]),
        tuple(map(str, shard.get("duplicates", ()))),
    )
    return Entry(_absolute(str(shard["url"]), location), Version(shard["filesize"], shard["etag"]), facts)


def _relative(location: str, folder: Path) -> str:
    if is_remote(location):
        return location
    path = Path(os.path.abspath(location))  # noqa: PTH100 - resolve() follows links
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def _absolute(url: str, location: str) -> str:
    if is_remote(url) or Path(url).is_absolute():
        return url
    if location.startswith(COMMAND):
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
