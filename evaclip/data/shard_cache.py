"""Local copies of remote shards: one folder, bounded in bytes, shared by all processes of a machine."""

import fcntl
import hashlib
import logging
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from evaclip.data.config import RemoteConfig
from evaclip.data.remote import RemoteError, Version, is_command, open_remote
from evaclip.errors import UserError
from evaclip.machine import user_cache

_LOG = logging.getLogger("evaclip.data")
_CHUNK = 2**20
_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the second try; each further pause is twice as long."""
_FAILURES_LAST = 300.0
"""Seconds in which a shard that could not be had is not asked for again."""
_TOUCH_AFTER = 10.0
_ABANDONED_AFTER = 3600.0

T = TypeVar("T")
Check = Callable[[Path], None]
"""Looks at a copy before anybody else sees it, and raises RemoteError to refuse it."""


@dataclass(frozen=True)
class Wanted:
    """A shard: where it lies, and as which version it is known."""

    url: str
    version: Version

    @cached_property
    def file_name(self) -> str:
        """Of its copy."""
        name = f"{self.url}\0{self.version.size}\0{self.version.tag}"
        return f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.tar"


class ShardCache:
    """Fetches whole shards, once for all processes of a machine, and forgets those that were read longest ago.

    A copy appears complete or not at all. It is written under a lock that the kernel takes from a process that is
    killed. A shard that could not be had is not asked for again for five minutes.

    Attributes:
        capacity: bytes that the copies may take together; those being written come on top.
    """

    def __init__(self, config: RemoteConfig) -> None:
        self.capacity = int(config.cache_gb * 1e9)
        self._config = config
        folder = config.cache_folder
        self._folder = Path(folder).expanduser() if folder else user_cache("shards")
        self._failures: dict[str, tuple[float, RemoteError]] = {}

    def version(self, url: str) -> Version:
        """The version that the server has now. Raises RemoteError."""

        def ask() -> Version:
            with open_remote(url, self._config.timeout) as remote:
                return remote.version

        return Version() if is_command(url) else self._try(url, ask)

    @contextmanager
    def opened(self, shard: Wanted, check: Check | None = None) -> Iterator[int]:
        """A file descriptor of the shard's copy, which is fetched if it isn't there.

        Raises:
            RemoteError: it cannot be had, is another version, or `check` refuses it.
            UserError: the folder cannot be written.
        """
        path = self._path(shard)
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
                break
            except (FileNotFoundError, NotADirectoryError):
                # Another process may have put it out again before it is opened: then once more.
                self._fetch(shard, check)
            except OSError as exc:
                raise UserError(f"the copy {path} of {shard.url} cannot be read: {exc.strerror}") from exc
        try:
            if time.time() - os.fstat(descriptor).st_mtime > _TOUCH_AFTER:
                os.utime(descriptor)  # by this time the oldest copies are found
            yield descriptor
        finally:
            os.close(descriptor)

    def fetch_ahead(self, shard: Wanted, check: Check) -> None:
        """Fetches a shard unless it is there, or another process fetches it now. Raises as `opened`."""
        with suppress(BlockingIOError):
            self._fetch(shard, check, wait=False)

    def _path(self, shard: Wanted) -> Path:
        return self._folder / shard.file_name

    def _fetch(self, shard: Wanted, check: Check | None, wait: bool = True) -> None:
        path = self._path(shard)
        if path.exists():
            return
        self._raise_recent_failure(shard.url)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # One of 256 locks, so that there aren't as many lock files as shards.
            with _locked(self._folder / f"{path.name[:2]}.lock", wait):
                if not path.exists():
                    self._fetch_locked(shard, path, check)
        except RemoteError as exc:
            self._failures[shard.url] = (time.monotonic(), exc)
            raise
        except BlockingIOError:
            raise
        except OSError as exc:
            raise UserError(
                f"a copy of {shard.url} cannot be written to {self._folder}: {exc.strerror or exc};"
                " data.remote.cache_folder names another folder"
            ) from exc

    def _fetch_locked(self, shard: Wanted, path: Path, check: Check | None) -> None:
        part = path.with_suffix(".part")

        def copy() -> None:
            self._copy(shard, part)
            if check:
                check(part)

        try:
            self._try(shard.url, copy)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        self._make_room(0, path)

    def _copy(self, shard: Wanted, part: Path) -> None:
        with open_remote(shard.url, self._config.timeout) as remote, part.open("wb") as file:
            if change := shard.version.difference(remote.version):
                raise RemoteError(f"the shard changed after it was indexed: {change}", permanent=True)
            size = shard.version.size if remote.version.size is None else remote.version.size
            self._make_room(size or 0, part)
            while chunk := remote.read(_CHUNK):
                file.write(chunk)
            if size not in (None, file.tell()):
                raise RemoteError(f"only {file.tell()} of {size} bytes came")

    def _make_room(self, size: int, kept: Path) -> None:
        """Deletes the copies that were read longest ago until `size` more bytes fit; never `kept`."""
        with _locked(self._folder / "room.lock"):
            copies = sorted(_files(self._folder), key=lambda entry: entry[1].st_mtime)
            total = sum(facts.st_size for _, facts in copies)
            now = time.time()
            for path, facts in copies:
                written = path.suffix == ".part" and now - facts.st_mtime < _ABANDONED_AFTER
                if total + size <= self.capacity:
                    break
                if path != kept and not written:
                    path.unlink(missing_ok=True)
                    total -= facts.st_size

    def _try(self, url: str, action: Callable[[], T]) -> T:
        pause = _PAUSE
        for attempt in range(1, self._config.attempts + 1):
            try:
                return action()
            except RemoteError as exc:
                if exc.permanent or attempt == self._config.attempts:
                    raise
                wait = pause * random.uniform(0.75, 1.25)
                _LOG.warning("%s: try %d of %d: %s; again in %.1f s", url, attempt, self._config.attempts, exc, wait)
                time.sleep(wait)
                pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("unreachable")

    def _raise_recent_failure(self, url: str) -> None:
        moment, failure = self._failures.get(url, (-_FAILURES_LAST, None))
        if failure and time.monotonic() - moment < _FAILURES_LAST:
            raise RemoteError(str(failure), failure.permanent)


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.iterdir():
        if path.suffix in (".tar", ".part"):
            with suppress(FileNotFoundError):
                yield path, path.stat()


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Holds the lock of that name against all processes and threads; without `wait`, or raises BlockingIOError."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        # Not left to close: a process forked meanwhile has the descriptor too.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
