"""The shards of a data set: local files, and remote ones that are read from local copies."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from evaclip.data.index_files import IndexCache
from evaclip.data.remote import RemoteError, Version, is_remote, local_name
from evaclip.data.shard_cache import Check, ShardCache, Wanted
from evaclip.data.shard_list import Entry, ShardList
from evaclip.data.tar_index import TarIndex, build_index
from evaclip.errors import UserError


@dataclass(frozen=True)
class LocalShard:
    """A tar file of this machine."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def identity(self) -> bytes:
        """What a stored index is named after."""
        return os.fsencode(self.path.absolute())

    def stamp(self) -> tuple[int, int]:
        """What a stored index must agree with to be this shard's. Raises OSError."""
        facts = self.path.stat()
        return facts.st_size, facts.st_mtime_ns

    def index(self) -> TarIndex:
        """Reads the headers. Raises UserError as `build_index` does."""
        return build_index(self.path)


class RemoteShard:
    """A tar elsewhere.

    Args:
        url: as `open_remote` takes it.
        cache: holds the copy that is read.
        version: as which the shard was indexed; None asks the server when it is needed.
    """

    def __init__(self, url: str, cache: ShardCache, version: Version | None = None) -> None:
        self.url = url
        self.identity = os.fsencode(url)
        self.path = None
        self.cache = cache
        self._version = version

    def __str__(self) -> str:
        return self.url

    @property
    def version(self) -> Version:
        """Raises RemoteError."""
        if self._version is None:
            self._version = self.cache.version(self.url)
        return self._version

    def stamp(self) -> tuple[int, int]:
        """What a stored index must agree with to be this shard's. Raises UserError."""
        try:
            size, tag = self.version.size, self.version.tag
        except RemoteError as exc:
            raise UserError(f"cannot read the shard {self.url}: {exc}") from exc
        return -1 if size is None else size, int.from_bytes(hashlib.sha256(tag.encode()).digest()[:7])

    def index(self) -> TarIndex:
        """Fetches the shard, if there is no copy, and reads the headers. Raises UserError as `build_index` does."""
        try:
            with self.opened() as descriptor:
                return build_index(Path(f"/proc/self/fd/{descriptor}"), self.url)
        except RemoteError as exc:
            raise UserError(f"cannot read the shard {self.url}: {exc}") from exc

    @contextmanager
    def opened(self, check: Check | None = None) -> Iterator[int]:
        """A descriptor of the copy; arguments and errors as those of `ShardCache.opened`."""
        with self.cache.opened(self.wanted, check) as descriptor:
            yield descriptor

    @cached_property
    def wanted(self) -> Wanted:
        """What the cache is asked for. Raises RemoteError."""
        return Wanted(self.url, self.version)


Shard = LocalShard | RemoteShard


def shard_at(location: str, cache: ShardCache, version: Version | None = None) -> Shard:
    """The shard of a path, URL or command; arguments as those of `RemoteShard`."""
    return RemoteShard(location, cache, version) if is_remote(location) else LocalShard(Path(location))


def shards_at(paths: Sequence[str], cache: ShardCache) -> list[Shard]:
    """The shards of paths, URLs, commands and folders. Raises UserError for a folder without shards."""
    return [shard_at(location, cache) for path in paths for location in _shards_in(path)]


def list_shards(shards: Sequence[Shard], indexes: IndexCache) -> ShardList:
    """Indexes shards, as far as that isn't done. Raises UserError as `build_index` does."""
    return ShardList(
        Entry(str(shard), shard.version if isinstance(shard, RemoteShard) else Version(), index.facts)
        for shard, index in zip(shards, indexes.get_all(shards), strict=True)
    )


def _shards_in(path: str) -> list[str]:
    if is_remote(path) or not Path(path).is_dir():
        return [path]
    shards = sorted(Path(path).glob("*.tar"))
    if not shards:
        raise UserError(f"there are 0 .tar shards in the folder {path}")
    return list(map(local_name, shards))
