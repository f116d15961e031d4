"""The lock on a run's folder: one process trains into it at a time.

RUN/lock names its owner as JSON, and the owner holds an exclusive `flock` on it. The kernel releases the flock when the
process ends, so a killed run restarts at once. On a file system without flock the file itself is the lock: one process
creates it and deletes it at its end. If its owner was killed, the next start takes the lock if it runs on the same
machine and sees that the owner is gone; otherwise with `--overwrite-lock`.
"""

import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from evaclip.atomic import flock
from evaclip.errors import UserError
from evaclip.runs.files import LOCK_FILE

RETRIES = 20
"""Attempts, a tenth of a second apart: workers of a killed process may hold its flock for a moment."""
SETTLE = 1.0
"""Seconds after which the last of several processes that replaced a dead owner's file has its lock."""


@dataclass(frozen=True)
class Owner:
    """A process that holds, or held, the lock.

    Attributes:
        start: when it acquired the lock, by its own clock (UTC).
        machine: identifies the boot of a machine and the namespace of its process ids; "" if unknown.
        ticks: start of the process, in clock ticks since the boot.
    """

    host: str
    pid: int
    start: str
    machine: str
    ticks: str

    @classmethod
    def of_this_process(cls) -> Self:
        start = datetime.now(UTC).isoformat(" ").removesuffix("+00:00")
        return cls(socket.gethostname(), os.getpid(), start, _machine(), _start_of(os.getpid()))

    @property
    def is_running(self) -> bool | None:
        """Whether the process lives; None if this machine can't tell."""
        if not self.machine or self.machine != _machine():
            return None
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:  # another user's, which /proc may hide
            return True
        return _start_of(self.pid) == self.ticks

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.start[:19]} UTC)" if self.pid else "an unknown process"


_UNKNOWN = Owner("", 0, "", "", "")


class RunLock:
    """The lock of one folder, held by this process until `release`; a context manager.

    Args:
        folder: of the run; is created if necessary.
        overwrite: take the lock from an owner that is not known to run, such as one on a machine that crashed.

    Attributes:
        owner: this process.
        taken_from: the owner before, if it ended without releasing the lock.

    Raises:
        UserError: another process holds the lock.
        OSError: the folder can't be written.
    """

    def __init__(self, folder: Path, *, overwrite: bool = False) -> None:
        self._path = folder / LOCK_FILE
        self._new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
        self._file = -1
        self.owner = Owner.of_this_process()
        self.taken_from: Owner | None = None
        folder.mkdir(parents=True, exist_ok=True)
        # A forked worker must not keep the flock after this process.
        os.register_at_fork(after_in_child=self._close)
        for _ in range(RETRIES):
            with suppress(FileNotFoundError):
                if self._take(overwrite):
                    return
            time.sleep(0.1)
        self._close()
        owner = read_lock(self._path) or _UNKNOWN
        way_on = "" if owner.is_running else "; if that process is gone, --overwrite-lock takes its lock"
        raise UserError(
            f"{owner} trains the run {str(folder)!r}: wait for its end, or choose another by --set name=NAME{way_on}"
        )

    def check(self) -> None:
        """Raises UserError if the file was deleted or replaced, so that another process may train here."""
        with suppress(OSError):  # a file system that is away for a moment says nothing about the lock
            if (holder := read_lock(self._path)) != self.owner:
                raise UserError(
                    f"the lock {str(self._path)!r} must stay while a run goes on, got "
                    f"{holder or 'no file'} in its place: this process stops; --resume auto goes on"
                )

    def release(self) -> None:
        """Deletes the file, unless it is another process's, and the folders that contain nothing else."""
        with suppress(OSError):
            if read_lock(self._path) == self.owner:
                self._path.unlink()
            for folder in self._new_folders:
                folder.rmdir()
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _take(self, overwrite: bool) -> bool:
        """One attempt to get the lock; raises FileNotFoundError if another process deletes the file meanwhile."""
        self._close()
        before: Owner | None = None
        try:
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            self._file = os.open(self._path, os.O_RDWR)
            before = read_lock(self._path)
        try:
            has_flock = flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = before is not None and not has_flock
        except BlockingIOError:
            has_flock = is_held = True
        if is_held:
            is_dead = before is not None and before.is_running is False and not has_flock
            if before and self.taken_from is None and (is_dead or (overwrite and not before.is_running)):
                self.taken_from = before
                self._path.unlink()
            return False
        if not os.path.samestat(self._path.stat(), os.fstat(self._file)):
            return False
        self.taken_from = self.taken_from or before
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(asdict(self.owner)).encode() + b"\n", 0)
        if not has_flock:
            time.sleep(SETTLE)
        return has_flock or read_lock(self._path) == self.owner

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


def read_lock(path: Path) -> Owner | None:
    """The process that a lock names; None if there is no file."""
    try:
        # Opening a file makes NFS ask the server, which `stat` alone does not.
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return Owner(**json.loads(text))
    except (ValueError, TypeError):
        return _UNKNOWN


def is_held(path: Path) -> bool:
    """Whether a process holds the lock, as far as this machine can tell."""
    owner = read_lock(path)
    if owner is None:
        return False
    with suppress(OSError), path.open("rb") as file:
        if flock(file.fileno(), fcntl.LOCK_SH | fcntl.LOCK_NB):
            return False
    return owner.is_running is not False


def _machine() -> str:
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    return ""


def _start_of(pid: int) -> str:
    """Start of a process in clock ticks since the boot; "" if it has ended, or without /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]
