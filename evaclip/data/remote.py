"""Remote shards: HTTP, the output of commands and fsspec's file systems (s3://, gs://, hf://), read from local copies.

HTTP is read by urllib: fsspec's needs aiohttp. The copies are bounded in bytes, shared by all processes of a machine
and compared with the index before use, unlike fsspec's caches.
"""

import hashlib
import logging
import os
import random
import re
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from evaclip.atomic import locked
from evaclip.data.config import RemoteConfig
from evaclip.data.tar_index import TarIndex, build_index
from evaclip.errors import UserError
from evaclip.machine import user_cache

if TYPE_CHECKING:
    from evaclip.data.index_cache import Shard

_LOG = logging.getLogger("evaclip.data")

_COMMAND = "pipe:"
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_TAR_NAME = re.compile(r"[^\s/?#'\"=]+\.tar(?![\w.])")
_WORTH_ANOTHER_TRY = {408, 425, 429}
_NOT_RUNNABLE = {126, 127}
_BLOCK = 16 * 2**20
# Names of a file's version in fsspec's file systems, the most exact one first.
_TAGS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "updated", "mtime")

_CHUNK = 2**20
_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
"""Seconds before the second try; each further pause is twice as long."""
_FAILURES_LAST = 300.0
"""Seconds after a failed fetch in which a shard is not fetched again."""
_TOUCH_AFTER = 10.0
_ABANDONED_AFTER = 3600.0

T = TypeVar("T")
Check = Callable[["RemoteShard", Path], None]
"""Looks at a copy before anybody else sees it, and raises RemoteError to refuse it."""


class RemoteError(Exception):
    """A fetch failed; `permanent` if another try would fail too."""

    def __init__(self, reason: str, permanent: bool = False) -> None:
        super().__init__(reason)
        self.permanent = permanent


@dataclass(frozen=True)
class Version:
    """The version of a remote file, as far as its server gives one.

    Attributes:
        size: in bytes; None if unknown.
        tag: the ETag or the time of the last change; empty if unknown.
    """

    size: int | None = None
    tag: str = ""

    def difference(self, found: "Version") -> str:
        """How `found` differs, in words; empty if all that both versions know is equal."""
        if None not in (self.size, found.size) and self.size != found.size:
            return f"it has {found.size} bytes and had {self.size}"
        if self.tag and found.tag and self.tag != found.tag:
            return f"its version is {found.tag} and was {self.tag}"
        return ""


class RemoteFile(NamedTuple):
    """An open stream.

    Attributes:
        version: of the file, when it was opened.
        read: up to that many bytes; none at the end. Raises RemoteError.
    """

    version: Version
    read: Callable[[int], bytes]


def is_command(path: str) -> bool:
    """Whether a path is a command that the shell runs for its output."""
    return path.startswith(_COMMAND)


def is_remote(path: str) -> bool:
    """Whether a path is a URL or a command and not a local file."""
    return is_command(path) or bool(_SCHEME.match(path))


def local_name(path: Path) -> str:
    """The path as text; absolute where `is_remote` would take it for a command, such as a file called 'pipe:x.tar'."""
    return str(path.absolute()) if is_remote(str(path)) else str(path)


def file_name(url: str) -> str:
    """The name of the tar in a URL or a command, as '00001.tar'; all of it where there is none."""
    found = _TAR_NAME.findall(url)
    return found[-1] if found else url


def open_remote(url: str, timeout: float) -> AbstractContextManager[RemoteFile]:
    """Opens a URL or starts a command.

    Args:
        url: 'https://...', 'pipe:COMMAND', or of any other scheme that fsspec has a file system for.
        timeout: seconds without a byte after which reading fails.

    Raises:
        RemoteError: it cannot be opened; in the block, `read` raises it too.
        UserError: there is no file system for that scheme.
    """
    if is_command(url):
        return _command(url.removeprefix(_COMMAND), timeout)
    if url.startswith(("http://", "https://")):
        return _http(url, timeout)
    return _file_system(url)


@contextmanager
def _http(url: str, timeout: float) -> Iterator[RemoteFile]:
    request = Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "evaclip"})
    with _translated():
        response = urlopen(request, timeout=timeout)
    with response:
        size, tag = response.headers["Content-Length"], response.headers["ETag"] or response.headers["Last-Modified"]
        yield RemoteFile(Version(int(size) if size else None, tag or ""), _translated()(response.read))


@contextmanager
def _file_system(url: str) -> Iterator[RemoteFile]:
    import fsspec

    try:
        files, path = fsspec.url_to_fs(url)
    except ImportError as exc:
        raise UserError(f"{url} cannot be read: {exc}; `pip install 'evakernels[remote]'` brings S3") from exc
    except ValueError as exc:
        raise UserError(f"{url} cannot be read: {exc}") from exc
    with _translated():
        facts = files.info(path)
        stream = files.open(path, "rb", block_size=_BLOCK, cache_type="readahead")
    with stream:
        tag = next((str(facts[name]) for name in _TAGS if facts.get(name)), "")
        yield RemoteFile(Version(facts.get("size"), tag), _translated()(stream.read))


@contextmanager
def _command(command: str, timeout: float) -> Iterator[RemoteFile]:
    with (
        tempfile.TemporaryFile() as messages,
        # If this process is killed, the pipe breaks and the command ends too.
        subprocess.Popen(
            command,
            shell=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=messages,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdout is not None
        descriptor = process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor)

        def read(size: int) -> bytes:
            if not poll.poll(1000 * timeout):
                raise RemoteError(f"no byte for {timeout:g} s")
            if data := os.read(descriptor, size):
                return data
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                raise RemoteError(f"the command closed its output and still runs after {timeout:g} s") from None
            if code:
                messages.seek(0)
                last = messages.read().decode(errors="replace").strip().rpartition("\n")[2]
                raise RemoteError(f"the command ended with exit code {code}: {last}", code in _NOT_RUNNABLE)
            return b""

        try:
            yield RemoteFile(Version(), read)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def _translated() -> Iterator[None]:
    """Turns exceptions of servers and libraries into RemoteError."""
    try:
        yield
    except HTTPError as exc:
        exc.close()
        permanent = 400 <= exc.code < 500 and exc.code not in _WORTH_ANOTHER_TRY
        raise RemoteError(f"HTTP {exc.code} {exc.reason}", permanent) from exc
    except (FileNotFoundError, PermissionError) as exc:
        raise RemoteError(f"{type(exc).__name__}: {exc}", permanent=True) from exc
    except Exception as exc:  # the clients of object stores have exceptions of their own, without a common base
        raise RemoteError(f"{type(exc).__name__}: {exc}") from exc


class RemoteShard:
    """A tar elsewhere.

    Args:
        url: as `open_remote` takes it.
        cache: holds the copy that is read.
        version: as which the shard was indexed; None asks the server when it is needed.
        size: in bytes, nearly.
        check: of each new copy; None accepts all.
        patience: seconds for which failed fetches are repeated, beyond `RemoteConfig.attempts`.
    """

    path = None

    def __init__(
        self,
        url: str,
        cache: "ShardCache",
        version: Version | None = None,
        size: int = 0,
        check: Check | None = None,
        patience: float = 0.0,
    ) -> None:
        self.url = url
        self.identity = os.fsencode(url)
        self.cache = cache
        self.size = size
        self.check = check
        self.patience = patience
        self._version = version

    def __str__(self) -> str:
        return self.url

    @property
    def version(self) -> Version:
        """Raises RemoteError."""
        if self._version is None:
            self._version = self.cache.version(self.url)
        return self._version

    @cached_property
    def file_name(self) -> str:
        """The name of its copy. Raises RemoteError."""
        name = f"{self.url}\0{self.version.size}\0{self.version.tag}"
        return f"{hashlib.sha256(os.fsencode(name)).hexdigest()[:32]}.tar"

    @property
    def capacity(self) -> int:
        """Bytes that the copies of shards may take together."""
        return self.cache.capacity

    def fetch_ahead(self) -> None:
        """Fetches a copy, unless another process does. Raises BlockingIOError, RemoteError and UserError."""
        self.cache.fetch(self, wait=False)

    def stamp(self) -> tuple[int, int]:
        with self._readable():
            size, tag = self.version.size, self.version.tag
        return -1 if size is None else size, int.from_bytes(hashlib.sha256(tag.encode()).digest()[:7])

    def has_headers_of(self, index: TarIndex) -> bool:
        """True: the stamp has the version."""
        return True

    def index(self) -> TarIndex:
        """Fetches the shard, if there is no copy, and reads the headers. Raises UserError as `build_index` does."""
        with self._readable(), self.cache.opened(self) as descriptor:
            return build_index(Path(f"/proc/self/fd/{descriptor}"), self.url)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except RemoteError as exc:
            raise UserError(f"cannot read the shard {self.url}: {exc}") from exc


class ShardCache:
    """Fetches whole shards, once for all processes of a machine, and deletes the copies that were read longest ago.

    A copy appears complete or not at all. It is written under a lock that the kernel takes from a process that is
    killed. A shard that outlasted its patience is not tried again for five minutes, and then without patience.

    Attributes:
        capacity: bytes that the copies may take together; those being written come on top.
        patience: see `RemoteConfig`.
    """

    def __init__(self, config: RemoteConfig) -> None:
        self.capacity = int(config.cache_gb * 1e9)
        self.patience = config.patience
        self._config = config
        folder = config.cache_folder
        self._folder = Path(folder).expanduser() if folder else user_cache("shards")
        self._failures: dict[str, tuple[float, RemoteError]] = {}

    def version(self, url: str) -> Version:
        """The version that the server has now; unknown for a command. Raises RemoteError."""

        def ask() -> Version:
            with open_remote(url, self._config.timeout) as remote:
                return remote.version

        return Version() if is_command(url) else self._try(url, ask)

    @contextmanager
    def opened(self, shard: RemoteShard) -> Iterator[int]:
        """A file descriptor of the shard's copy, which is fetched if it isn't there.

        Raises:
            RemoteError: the fetch fails, the shard has another version, or its check refuses it.
            UserError: the folder cannot be written.
        """
        path = self._folder / shard.file_name
        while True:
            try:
                descriptor = os.open(path, os.O_RDONLY)
                break
            except (FileNotFoundError, NotADirectoryError):
                # Another process may have put it out again before it is opened: then once more.
                self.fetch(shard)
            except OSError as exc:
                raise UserError(f"the copy {path} of {shard.url} cannot be read: {exc.strerror}") from exc
        try:
            if time.time() - os.fstat(descriptor).st_mtime > _TOUCH_AFTER:
                os.utime(descriptor)  # by this time the oldest copies are found
            yield descriptor
        finally:
            os.close(descriptor)

    def fetch(self, shard: RemoteShard, wait: bool = True) -> None:
        """Fetches a shard unless it is there.

        Args:
            wait: have the shard's patience, and wait for another process or thread that fetches it.

        Raises:
            BlockingIOError: without `wait`, another process or thread fetches it.
            RemoteError, UserError: as `opened`.
        """
        path = self._folder / shard.file_name
        if path.exists():
            return
        moment, failure = self._failures.get(shard.url, (-_FAILURES_LAST, None))
        if failure and time.monotonic() - moment < _FAILURES_LAST:
            raise RemoteError(str(failure), failure.permanent)
        until = time.monotonic() + (shard.patience if wait and not failure else 0.0)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # One of 256 locks, so that there aren't as many lock files as shards.
            with locked(self._folder / f"{path.name[:2]}.lock", wait):
                if not path.exists():
                    self._fetch_locked(shard, path, until)
            self._failures.pop(shard.url, None)
        except RemoteError as exc:
            if wait or exc.permanent:
                self._failures[shard.url] = (time.monotonic(), exc)
            raise
        except BlockingIOError:
            raise
        except OSError as exc:
            raise UserError(
                f"a copy of {shard.url} cannot be written to {self._folder}: {exc.strerror or exc};"
                " data.remote.cache_folder names another folder"
            ) from exc

    def _fetch_locked(self, shard: RemoteShard, path: Path, until: float) -> None:
        part = path.with_suffix(".part")
        try:
            self._try(shard.url, partial(self._copy, shard, part), until)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        self._make_room(0, path)

    def _copy(self, shard: RemoteShard, part: Path) -> None:
        with open_remote(shard.url, self._config.timeout) as remote, part.open("wb") as file:
            if change := shard.version.difference(remote.version):
                raise RemoteError(f"the shard changed after it was indexed: {change}", permanent=True)
            size = shard.version.size if remote.version.size is None else remote.version.size
            self._make_room(size or 0, part)
            while chunk := remote.read(_CHUNK):
                file.write(chunk)
            if size not in (None, file.tell()):
                raise RemoteError(f"only {file.tell()} of {size} bytes came")
        if shard.check:
            shard.check(shard, part)

    def _make_room(self, size: int, kept: Path) -> None:
        """Deletes the copies that were read longest ago until `size` more bytes fit; never `kept`."""
        with locked(self._folder / "room.lock"):
            copies = list[tuple[Path, os.stat_result]]()
            for path in self._folder.iterdir():
                if path.suffix in (".tar", ".part"):
                    with suppress(FileNotFoundError):
                        copies.append((path, path.stat()))
            total = sum(facts.st_size for _, facts in copies)
            now = time.time()
            for path, facts in sorted(copies, key=lambda entry: entry[1].st_mtime):
                written = path.suffix == ".part" and now - facts.st_mtime < _ABANDONED_AFTER
                if total + size <= self.capacity:
                    break
                if path != kept and not written:
                    path.unlink(missing_ok=True)
                    total -= facts.st_size

    def _try(self, url: str, action: Callable[[], T], until: float = 0.0) -> T:
        """The result of an action, repeated with growing pauses until a time, and `attempts` times at least."""
        pause = _PAUSE
        for attempt in count(1):
            try:
                return action()
            except RemoteError as exc:
                wait = pause * random.uniform(0.75, 1.25)
                if exc.permanent or (attempt >= self._config.attempts and time.monotonic() + wait > until):
                    raise
                _LOG.warning("%s: try %d: %s; again in %.1f s", url, attempt, exc, wait)
                time.sleep(wait)
                pause = min(2 * pause, _LONGEST_PAUSE)
        raise AssertionError("unreachable")


class Prefetcher:
    """One thread of each process that reads, started when it is first needed.

    Processes share the work: a shard that another process is fetching is left to it.
    """

    def __init__(self) -> None:
        self._process = os.getpid()
        self._shards: Sequence[Shard] = []
        self._news = threading.Event()
        self._thread: threading.Thread | None = None

    def want(self, shards: Sequence["Shard"]) -> None:
        """Fetches these in the background, in order and as many as fit, instead of those of the last call."""
        if self._process != os.getpid():
            self.__init__()  # type: ignore[misc]  # a thread isn't forked
        totals = accumulate(shard.size for shard in shards)
        self._shards = [s for s, total in zip(shards, totals, strict=True) if total <= s.capacity]
        if not self._shards:
            return
        self._news.set()
        if self._thread is None:
            # A daemon: a worker that ends doesn't wait for its fetch.
            self._thread = threading.Thread(target=self._run, name="evaclip-prefetch", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        ahead = set[bytes]()  # local shards that have been read ahead and are still wanted
        while True:
            self._news.wait()
            self._news.clear()
            ahead &= {shard.identity for shard in self._shards}
            for shard in self._shards:
                if shard.identity in ahead:
                    continue
                try:
                    shard.fetch_ahead()
                    if shard.path is not None:
                        ahead.add(shard.identity)
                except (RemoteError, UserError, OSError) as exc:  # the reader of the shard gets the error
                    _LOG.debug("%s is not prefetched: %s", shard, exc)
                if self._news.is_set():
                    break

    def __reduce__(self) -> Any:
        return Prefetcher, ()
