"""The lock on a run's folder: one process trains into it at a time.

RUN/lock names its owner as JSON, and the owner holds an `flock` on it. The kernel releases the flock when the process
ends, so a killed run restarts at once. Some file systems keep flocks within one machine or have none: there a
heartbeat, the file's time of change, shows that an owner on another machine is alive.
"""

import errno
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from evaclip.errors import UserError
from evaclip.run_files import LOCK_FILE

HEARTBEAT = 5.0
"""Seconds between two heartbeats."""
STALE = 60.0
"""Seconds without a heartbeat after which an owner on another machine counts as dead."""
RETRIES = 20
"""Attempts, a tenth of a second apart: workers of a killed process may hold its flock for a moment."""

_NO_FLOCK = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class RunTaken(UserError):
    """Another process has taken the run over."""


@dataclass(frozen=True)
class Owner:
    """A process that holds, or held, the lock.

    Attributes:
        id: random and unique.
        since: when it acquired the lock, by its own clock (UTC).
        machine: identifies the boot of a machine; "" if unknown.
    """

    id: str
    host: str
    pid: int
    since: str
    machine: str

    @classmethod
    def of_this_process(cls) -> Self:
        since = datetime.now(UTC).isoformat(" ", "seconds").removesuffix("+00:00")
        return cls(uuid.uuid4().hex, socket.gethostname(), os.getpid(), since, _machine())

    @property
    def is_local(self) -> bool:
        """Whether it runs, or ran, on this machine."""
        return bool(self.machine) and self.machine == _machine()

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} (since {self.since} UTC)" if self.id else "an unknown process"


_UNKNOWN = Owner("", "", 0, "", "")


class RunLock:
    """The lock of one folder, held by this process until `release`; a context manager.

    Attributes:
        taken_from: the owner before, if it didn't release the lock.
        thief: the process that took the lock from this one, or None.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_FILE
        self._owner = Owner.of_this_process()
        self._new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
        self._file = -1
        self.taken_from: Owner | None = None
        self.thief: Owner | None = None
        self._last_beat = time.monotonic()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="run lock", daemon=True)
        # A forked worker must not keep the flock after this process.
        os.register_at_fork(after_in_child=self._close)

    @property
    def id(self) -> str:
        """Identifies this lock."""
        return self._owner.id

    @classmethod
    def acquire(cls, folder: Path, *, steal: bool = False, say: Callable[[str], None]) -> Self:
        """Acquires the lock; waits up to `STALE` seconds for a heartbeat of an owner on another machine.

        Args:
            folder: of the run; is created if necessary.
            steal: also take the lock from a living owner, which then stops at its next step.
            say: called with a line before each wait.

        Raises:
            UserError: a living process holds it.
            OSError: the folder can't be written.
        """
        lock = cls(folder)
        folder.mkdir(parents=True, exist_ok=True)
        before = read_lock(lock._path)
        for _ in range(RETRIES):
            if lock._replace() if steal and before else lock._open():
                break
            time.sleep(0.1)
        else:
            raise UserError(_refusal(lock._path))
        if not steal:
            before = read_lock(lock._path) if os.fstat(lock._file).st_size else None
        if before is not None:
            lock.taken_from = before[0]
            if not steal and not before[0].is_local and _is_alive(lock._path, *before, say):
                lock._close()
                raise UserError(_refusal(lock._path))
        lock._write()
        lock._thread.start()
        if steal and lock.taken_from:
            say(f"took the run from {lock.taken_from}; waiting {2 * HEARTBEAT:.0f} s for it to notice")
            time.sleep(2 * HEARTBEAT)
        return lock

    def check(self) -> None:
        """Raises RunTaken if another process took the lock."""
        self._beat()
        if self.thief is not None:
            raise RunTaken(
                f"the run {str(self._path.parent)!r} was taken over by {self.thief}: this process stops and leaves "
                "the checkpoints to it"
            )

    def release(self) -> None:
        """Releases the lock, unless another process took it, and removes the folders that contain nothing else."""
        self._released.set()
        if self._thread.ident is not None:
            self._thread.join()
        with suppress(OSError):
            if self._is_current():
                self._path.unlink()
            for folder in self._new_folders:
                folder.rmdir()
        self._close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _open(self) -> bool:
        """Opens the file and locks it; False if another process of this machine holds it."""
        self._file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        # The owner removes the file when it releases the lock: one that is gone from the folder locks nothing.
        if _flock(self._file, fcntl.LOCK_EX) and self._is_current():
            return True
        self._close()
        return False

    def _replace(self) -> bool:
        """Puts a locked file in the place of another owner's, which at no time finds none."""
        path, self._path = self._path, self._path.with_name(f".{LOCK_FILE}.{self.id}")
        try:
            self._open()
            self._write()
            self._path.replace(path)
        finally:
            self._path.unlink(missing_ok=True)
            self._path = path
        return True

    def _write(self) -> None:
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(asdict(self._owner)).encode() + b"\n", 0)

    def _is_current(self) -> bool:
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._file))
        except OSError:
            return False

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _keep_alive(self) -> None:
        while not self._released.wait(HEARTBEAT):
            self._beat()

    def _beat(self) -> None:
        # A file system that is away for a moment says nothing about the lock; the next heartbeat is soon enough.
        with suppress(OSError):
            found = read_lock(self._path)
            # Somebody may have deleted it. After a long sleep, though, others may have trained in between.
            if found is None and time.monotonic() - self._last_beat < STALE:
                self._close()
                if self._open():
                    self._write()
                found = read_lock(self._path)
            owner = found[0] if found else _UNKNOWN
            if owner.id != self._owner.id:
                self.thief = owner
                return
            os.utime(self._path)
            self._last_beat = time.monotonic()


def read_lock(path: Path) -> tuple[Owner, int] | None:
    """The owner of the lock and its last heartbeat, in ns by the clock of the file system; None if nobody holds it."""
    try:
        # Opening a file makes NFS ask the server, which `stat` alone does not.
        with path.open(encoding="utf-8") as file:
            text, beat = file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    except OSError as exc:
        if exc.errno == errno.ESTALE:
            return None
        raise
    try:
        return Owner(**json.loads(text)), beat
    except (ValueError, TypeError):
        return _UNKNOWN, beat


def is_held(path: Path) -> bool:
    """Whether a living process holds the lock; an owner on another machine by the age of its last heartbeat."""
    found = read_lock(path)
    if found is None:
        return False
    owner, beat = found
    if owner.is_local:
        with suppress(OSError), path.open("rb") as file:
            return not _flock(file.fileno(), fcntl.LOCK_SH)
    return time.time() - beat / 1e9 < STALE


def _is_alive(path: Path, owner: Owner, beat: int, say: Callable[[str], None]) -> bool:
    """Waits for a heartbeat of an owner on another machine. No two clocks need to agree."""
    say(f"{owner} holds the run {str(path.parent)!r}: waiting up to {STALE:.0f} s for a sign of life")
    for _ in range(round(STALE)):
        time.sleep(1)
        found = read_lock(path)
        if found is None or found[0] != owner:
            return found is not None
        if found[1] != beat:
            return True
    return False


def _refusal(path: Path) -> str:
    owner, beat = read_lock(path) or (_UNKNOWN, time.time_ns())
    age = max(0.0, time.time() - beat / 1e9)
    return (
        f"{owner} trains the run {str(path.parent)!r}, its last sign of life was {age:.0f} s ago: wait for its end, "
        "choose another by --set name=NAME, or stop it and take the run over with --steal"
    )


def _flock(file: int, kind: int) -> bool:
    """Locks an open file without waiting; False if another process has it. True where flocks don't exist."""
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as exc:
        if exc.errno not in _NO_FLOCK:
            raise
    return True


def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return ""
