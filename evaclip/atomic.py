"""Files that appear complete or not at all."""

import errno
import fcntl
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from evaclip.errors import UserError

_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path next to `path` to write to, which replaces it if the block succeeds."""
    # Machines that share a folder may have processes of the same number.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def flock(descriptor: int, kind: int) -> bool:
    """Locks an open file or folder; False where the file system has no such locks.

    Args:
        kind: flags of `fcntl.flock`.

    Raises:
        BlockingIOError: with LOCK_NB, another process or thread holds it.
    """
    try:
        fcntl.flock(descriptor, kind)
    except OSError as exc:
        if exc.errno not in _NO_FLOCK:
            raise
        return False
    return True


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Holds the lock of a file, made if it is missing, or of a folder against all processes and threads.

    Raises:
        BlockingIOError: without `wait`, another process or thread holds it.
        OSError: the file system has no such locks.
    """
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB)):
            raise OSError(errno.ENOLCK, "its file system has no flock", str(path))
        yield
    finally:
        # Not left to close: a process forked meanwhile has the descriptor too.
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file that appears complete or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file that appears complete or not at all, and its folder. Raises UserError if it can't."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError into a UserError: it is about a file or folder that the user named."""
    try:
        yield
    except OSError as exc:
        cause = Path(exc.filename) if isinstance(exc.filename, str) else path
        where = f": {cause}" if cause in path.parents else ""
        # An existing folder is not an error; a file in its place is.
        reason = os.strerror(errno.ENOTDIR) if isinstance(exc, FileExistsError) else exc.strerror or exc
        raise UserError(f"cannot write {path}: {reason}{where}") from exc


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turns what a missing or damaged file raises into a UserError that names it."""
    try:
        yield
    except (OSError, ValueError, EOFError) as exc:
        raise UserError(f"{path} can't be read: {getattr(exc, 'strerror', None) or exc}") from exc


def require_space(path: Path, size: int) -> None:
    """Raises UserError now where `size` bytes don't fit on the disk of `path`: torch ends the process on a full one."""
    free = shutil.disk_usage(path.parent).free
    if size > free:
        raise UserError(f"cannot write {path}: it takes {size / 1e6:,.1f} MB, and its disk has {free / 1e6:,.1f} free")


def require_writable(path: Path, *, make_folder: bool = True) -> None:
    """Raises UserError now, before the work, where a file could not be written after it.

    Args:
        make_folder: make the file's folder where there is none; else that is an error too.
    """
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; give the file to write")
    if not make_folder and not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {str(path.parent)!r}")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
