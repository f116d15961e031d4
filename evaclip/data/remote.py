"""Bytes from elsewhere, as a stream: HTTP, the output of a command, and whatever fsspec knows (s3://, gs://, hf://)."""

import os
import re
import select
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from evaclip.errors import UserError

COMMAND = "pipe:"
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")
_TAR_NAME = re.compile(r"[^\s/?#'\"=]+\.tar(?![\w.])")
_WORTH_ANOTHER_TRY = {408, 425, 429}
_NOT_RUNNABLE = {126, 127}
_BLOCK = 16 * 2**20
# What file systems call that by which a changed file is known, the most exact one first.
_TAGS = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "updated", "mtime")


class RemoteError(Exception):
    """Bytes could not be had. `permanent` says that another try would end the same way."""

    def __init__(self, reason: str, permanent: bool = False) -> None:
        super().__init__(reason)
        self.permanent = permanent


@dataclass(frozen=True)
class Version:
    """By what a changed file is known, as far as its server tells.

    Attributes:
        size: in bytes; None where it isn't told.
        tag: the ETag or the time of the last change; empty where there is neither.
    """

    size: int | None = None
    tag: str = ""

    def difference(self, found: "Version") -> str:
        """How `found` differs, in words; empty where nothing that both tell does."""
        if None not in (self.size, found.size) and self.size != found.size:
            return f"it has {found.size} bytes and had {self.size}"
        if self.tag and found.tag and self.tag != found.tag:
            return f"its version is {found.tag} and was {self.tag}"
        return ""


@dataclass(frozen=True)
class RemoteFile:
    """An open stream.

    Attributes:
        version: of the file, as told when it was opened.
        read: up to that many bytes; none at the end. Raises RemoteError.
    """

    version: Version
    read: Callable[[int], bytes]


def is_command(path: str) -> bool:
    """Whether a path is a command that the shell runs for its output."""
    return path.startswith(COMMAND)


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


@contextmanager
def open_remote(url: str, timeout: float) -> Iterator[RemoteFile]:
    """Opens a URL or starts a command.

    Args:
        url: 'https://...', 'pipe:COMMAND', or of any other scheme that fsspec has a file system for.
        timeout: seconds without a byte after which reading fails.

    Raises:
        RemoteError: it cannot be opened; in the block, `read` raises it too.
        UserError: there is no file system for that scheme.
    """
    if is_command(url):
        opened = _command(url.removeprefix(COMMAND), timeout)
    elif url.startswith(("http://", "https://")):
        opened = _http(url, timeout)
    else:
        opened = _file_system(url)
    with opened as file:
        yield file


@contextmanager
def _http(url: str, timeout: float) -> Iterator[RemoteFile]:
    request = Request(url, headers={"Accept-Encoding": "identity", "User-Agent": "evaclip"})
    with _translated():
        response = urlopen(request, timeout=timeout)
    with response:
        size, tag = response.headers["Content-Length"], response.headers["ETag"] or response.headers["Last-Modified"]
        yield RemoteFile(Version(int(size) if size else None, tag or ""), _translating(response.read))


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
        yield RemoteFile(Version(facts.get("size"), tag), _translating(stream.read))


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


def _translating(read: Callable[[int], bytes]) -> Callable[[int], bytes]:
    def translated(size: int) -> bytes:
        with _translated():
            return read(size)

    return translated


@contextmanager
def _translated() -> Iterator[None]:
    """Turns what servers and libraries raise into RemoteError."""
    try:
        yield
    except HTTPError as exc:
        exc.close()
        permanent = 400 <= exc.code < 500 and exc.code not in _WORTH_ANOTHER_TRY
        raise RemoteError(f"HTTP {exc.code} {exc.reason}", permanent) from exc
    except (FileNotFoundError, PermissionError) as exc:
        raise RemoteError(_words(exc), permanent=True) from exc
    except Exception as exc:  # the clients of object stores have exceptions of their own, without a common base
        raise RemoteError(_words(exc)) from exc


def _words(exc: Any) -> str:
    return f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
