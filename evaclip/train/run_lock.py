"""The lock on a run's folder: one process trains into it at a time, on whatever machines the folder is mounted.

RUN/lock exists while a run goes on and says who holds it. It appears with a hard link, which one process alone can
make, and its time of change is renewed every few seconds. A holder on this machine is alive if its process is; one on
another machine if that time changes while it is watched, so that no two clocks need to agree.
"""

import errno
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
"""Seconds from one sign of life to the next."""
STALE = 60.0
"""Seconds without one after which a holder on another machine counts as dead."""

CLAIM = 2.0
"""Seconds that removing a lock may take another process."""

_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class RunTaken(UserError):
    """Another process has taken the run over."""


@dataclass(frozen=True)
class Holder:
    """A process that holds, or held, the lock.

    Attributes:
        id: at random; no two holders have the same.
        since: when it took the lock, by its own clock (UTC).
        machine: in which process numbers mean the same: the boot of a kernel and the container; "" if unknown.
        born: when the process started, by the kernel's count, as numbers are given out again; "" if unknown.
    """

    id: str
    host: str
    pid: int
    since: str
    machine: str
    born: str

    @classmethod
    def of_this_process(cls) -> Self:
        since = datetime.now(UTC).isoformat(" ", "seconds").removesuffix("+00:00")
        return cls(uuid.uuid4().hex, socket.gethostname(), os.getpid(), since, _machine(), _born(os.getpid()) or "")

    def is_dead(self) -> bool | None:
        """Whether its process has ended; None if it is one of another machine, of which nothing is known."""
        if (self.host, self.machine) != (socket.gethostname(), _machine()):
            return None
        born = _born(self.pid)
        return born is None or ("" not in (born, self.born) and born != self.born)

    def __str__(self) -> str:
        if not self.id:
            return "a process that nothing is known of"
        return f"process {self.pid} on {self.host} (since {self.since} UTC)"


_NOBODY_KNOWN = Holder("", "", 0, "", "", "")


class RunLock:
    """The lock of one folder, held by this process until `release`; a context manager.

    Attributes:
        taken_from: who held it before and didn't release it, or None.
        robber: who took it from this process, or None.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_FILE
        self._holder = Holder.of_this_process()
        # What this process makes for the lock alone goes with it.
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self.taken_from: Holder | None = None
        self.robber: Holder | None = None
        self._last_beat = time.monotonic()
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._keep_alive, name="run lock", daemon=True)

    @property
    def id(self) -> str:
        """What no other lock has."""
        return self._holder.id

    @classmethod
    def acquire(cls, folder: Path, *, steal: bool = False, say: Callable[[str], None]) -> Self:
        """Takes the lock; waits up to `STALE` seconds to see whether a holder on another machine is alive.

        Args:
            folder: of the run; is made if it isn't there.
            steal: take the lock from a living holder too, who stops at its next step.
            say: told what is waited for.

        Raises:
            UserError: a living process holds it.
            OSError: the folder can't be written.
        """
        lock = cls(folder)
        folder.mkdir(parents=True, exist_ok=True)
        while not lock._create():
            if (found := read_lock(lock._path)) is not None:
                holder, beat = found
                if not steal and _lives(lock._path, holder, beat, say):
                    raise UserError(_refusal(folder, holder, beat))
                _remove(lock._path, holder)
                lock.taken_from = holder
        lock._thread.start()
        if steal and lock.taken_from and not lock.taken_from.is_dead():
            say(f"took the run from {lock.taken_from}; waiting {2 * HEARTBEAT:.0f} s for it to notice")
            time.sleep(2 * HEARTBEAT)
        return lock

    def check(self) -> None:
        """Looks whether the lock is still this process's.

        Raises:
            RunTaken: it isn't.
        """
        self._look()
        if self.robber is not None:
            raise RunTaken(
                f"the run {str(self._path.parent)!r} was taken over by {self.robber}: this process stops and leaves "
                "the checkpoints to it"
            )

    def release(self) -> None:
        """Gives the lock up, unless somebody took it, and removes the folders that hold nothing else."""
        self._released.set()
        if self._thread.ident is not None:
            self._thread.join()
        with suppress(OSError):
            _remove(self._path, self._holder)
            for folder in self._made:
                folder.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _create(self) -> bool:
        mine = self._path.with_name(f".{LOCK_FILE}.{self._holder.id}")
        try:
            mine.write_text(json.dumps(asdict(self._holder)) + "\n", encoding="utf-8")
            return _appear(mine, self._path)
        finally:
            mine.unlink(missing_ok=True)

    def _keep_alive(self) -> None:
        while not self._released.wait(HEARTBEAT):
            self._look()

    def _look(self) -> None:
        # A file system that is away for a moment says nothing about the lock; the next look is soon enough.
        with suppress(OSError):
            found = read_lock(self._path)
            # Somebody may have deleted it. After a long sleep, though, others may have trained in between.
            if found is None and time.monotonic() - self._last_beat < STALE:
                self._create()
                found = read_lock(self._path)
            holder = found[0] if found else _NOBODY_KNOWN
            if holder.id != self._holder.id:
                self.robber = holder
                return
            os.utime(self._path)
            self._last_beat = time.monotonic()


def read_lock(path: Path) -> tuple[Holder, int] | None:
    """Who holds the lock and when it last showed a sign of life, in ns by the clock of the file system.

    None if nobody holds it.
    """
    try:
        # Opening a file makes NFS ask the server, which looking at it alone does not.
        with path.open(encoding="utf-8") as file:
            text, beat = file.read(), os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
    except OSError as exc:
        if exc.errno == errno.ESTALE:
            return None
        raise
    try:
        return Holder(**json.loads(text)), beat
    except (ValueError, TypeError):
        return _NOBODY_KNOWN, beat


def _lives(path: Path, holder: Holder, beat: int, say: Callable[[str], None]) -> bool:
    """Whether a holder of the lock shows a sign of life; waits for one if it is not on this machine."""
    dead = holder.is_dead()
    if dead is not None:
        return not dead
    say(f"{holder} holds the run {str(path.parent)!r}: waiting up to {STALE:.0f} s for a sign of life")
    for _ in range(round(STALE)):
        time.sleep(1)
        found = read_lock(path)
        if found is None or found[0] != holder:
            return False
        if found[1] != beat:
            return True
    return False


def _refusal(folder: Path, holder: Holder, beat: int) -> str:
    age = 0.0 if holder.is_dead() is None else max(0.0, time.time() - beat / 1e9)
    return (
        f"{holder} trains the run {str(folder)!r}, its last sign of life was {age:.0f} s ago: wait for its end, choose "
        "another by --set name=NAME, or stop it and take the run over with --steal"
    )


def _appear(source: Path, path: Path) -> bool:
    """Lets `path` appear with the contents of `source`, for one process alone; false if it is there already."""
    try:
        os.link(source, path)
    except FileExistsError:
        # A network may lose the answer and ask again, when the link is there.
        return source.stat().st_nlink > 1
    except OSError as exc:
        if exc.errno not in _NO_LINKS:
            raise
        text = source.read_text(encoding="utf-8")
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            return False
    return True


def _remove(path: Path, holder: Holder) -> None:
    """Removes the lock of this holder, and of no other one that may have taken its place meanwhile."""
    claim = path.with_name(f".{LOCK_FILE}.claim.{holder.id}")
    _claim(claim)
    try:
        found = read_lock(path)
        if found is None or found[0] != holder:
            return
        aside = path.with_name(f".{LOCK_FILE}.{uuid.uuid4().hex}")
        try:
            path.rename(aside)
        except FileNotFoundError:
            return
        found = read_lock(aside)
        if found is not None and found[0] != holder:
            _appear(aside, path)
        aside.unlink()
    finally:
        claim.unlink(missing_ok=True)


def _claim(claim: Path) -> None:
    """Waits to be the one who may remove a lock: another could take away the lock that was made in its place.

    Who made the claim may have died since, so the wait has an end.
    """
    end = time.monotonic() + CLAIM
    while time.monotonic() < end:
        try:
            claim.touch(exist_ok=False)
            return
        except FileExistsError:
            time.sleep(0.01)


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""


def _born(pid: int) -> str | None:
    """When a process of this machine started; None if it has ended, "" if the system doesn't say."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it is another user's
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return ""
    return None if state in "ZX" else rest[18]
