"""Runs units in processes of their own, kills those that hang, starts again those that die, and stops in time."""

import json
import os
import signal
import subprocess
import sys
import time
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmarks.gpu_check.child import DISK_FULL, UNFINISHED
from benchmarks.gpu_check.records import Journal, JournalFull, Record
from benchmarks.gpu_check.stage import RESTART, Settings, Unit
from benchmarks.origin import ROOT

BUDGET = 540.0
"""Seconds that the stages' shares add up to."""
MAX_DEATHS = 8
"""Of a unit, before the rest of its cases is given up."""
_BESIDE = max(1, (os.cpu_count() or 1) // 4)
"""Units that run at once where none is alone."""
_POLL, _GRACE, _TAIL = 0.05, 3.0, 2000
_IMPORTS = 120.0
"""Seconds until a unit's process must be ready."""
_LATER = 5.0
"""What a unit whose turn is over loses in value: the first turns of others come before its second."""


@dataclass
class Child:
    """A unit's process, which waits until it is told its deadline."""

    unit: Unit
    process: subprocess.Popen[str]
    log: Path
    started: float = 0.0
    active: float = 0.0
    limit: float = 0.0
    case: str | None = None
    ended: int = 0

    @property
    def key(self) -> tuple[str, str]:
        return (self.unit.stage, self.unit.name)

    def go(self, end: float) -> None:
        """Lets the process begin; its turn is over at `end`, on the monotonic clock, at the latest."""
        self.started = self.active = time.monotonic()
        self.limit = _IMPORTS
        deadline = min(end, self.started + self.unit.seconds)
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has died of its imports, which the next look tells
            print(deadline, file=self.process.stdin, flush=True)

    def kill(self) -> None:
        """Ends the process and all that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # what hangs in the driver may not even die
            self.process.wait(timeout=5)
        if self.process.stdin is not None:
            self.process.stdin.close()

    def tail(self) -> str:
        """The end of what it has printed."""
        return self.log.read_bytes()[-_TAIL:].decode(errors="replace")


@dataclass
class Supervisor:
    """Runs units until all are done or the time is over.

    Attributes:
        journal: with its header, and with the records of earlier calls.
        shares: seconds of each stage in a budget of `BUDGET`.
        environment: of the processes.
        tell: is given a line now and then.
    """

    settings: Settings
    journal: Journal
    shares: Mapping[str, float]
    environment: Mapping[str, str]
    tell: Callable[[str], None] = print
    stopped: str = ""
    _queue: list[Unit] = field(default_factory=list)
    _running: list[Child] = field(default_factory=list)
    _waiting: Child | None = None
    _spent: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _deaths: Counter[tuple[str, str]] = field(default_factory=Counter)
    _seen: int = 0

    def run(self, units: Sequence[Unit], seconds: float) -> None:
        """Runs the units that aren't finished, the most valuable first, for so many seconds.

        Raises:
            JournalFull: the journal can't grow.
        """
        records = self.journal.read()
        _, self._seen = self.journal.read_from(0)
        finished = {(r["stage"], r["unit"]) for r in records if r["record"] == "unit" and r["status"] != "incomplete"}
        self._queue = [unit for unit in units if (unit.stage, unit.name) not in finished]
        self._queue.sort(key=_by_value)
        end = time.monotonic() + seconds
        try:
            while (self._queue or self._waiting or self._running) and not self.stopped:
                if time.monotonic() >= end and not self._running:
                    break
                self._start(end, seconds)
                time.sleep(_POLL)
                self._look(end)
        finally:
            for child in [*self._running, *filter(None, [self._waiting])]:
                child.kill()

    def stop(self, reason: str) -> None:
        """Ends `run` at its next look; what is running is tried again with --resume."""
        self.stopped = reason

    # --- starting -----------------------------------------------------------------------------------------------------

    def _start(self, end: float, seconds: float) -> None:
        if time.monotonic() >= end:
            return
        if self._waiting is None and self._queue:
            self._waiting = self._spawn(self._next(seconds / BUDGET))
        if self._waiting is not None and self._may_begin(self._waiting.unit):
            child, self._waiting = self._waiting, None
            child.go(end)
            self._running.append(child)
            self.tell(f"{child.unit.stage}: {child.unit.name}")

    def _next(self, scale: float) -> Unit:
        """The most valuable unit whose stage has time left; without any, the most valuable."""
        for index, unit in enumerate(self._queue):
            if self._spent[unit.stage] < self.shares.get(unit.stage, 0) * scale:
                return self._queue.pop(index)
        return self._queue.pop(0)

    def _may_begin(self, unit: Unit) -> bool:
        if not self._running:
            return True
        alone = unit.alone or any(child.unit.alone for child in self._running)
        return not alone and len(self._running) < _BESIDE

    def _spawn(self, unit: Unit) -> Child:
        """Its imports take seconds, which pass while another unit runs."""
        logs = self.journal.path.with_suffix(".logs")
        logs.mkdir(exist_ok=True)
        log = logs / f"{unit.stage}-{unit.name}.log".replace("/", "_").replace(" ", "_")
        what = [self.settings.to_json(), json.dumps(asdict(unit)), str(self.journal.path.resolve())]
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu_check.child", "run", *what],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                text=True,
                cwd=ROOT,
                env=dict(self.environment),
                start_new_session=True,
            )
        return Child(unit, process, log)

    # --- watching -----------------------------------------------------------------------------------------------------

    def _look(self, end: float) -> None:
        self._follow()
        for child in list(self._running):
            now = time.monotonic()
            status = child.process.poll()
            if status is not None:
                self._follow()  # what it has written since
                self._ended(child, status)
            elif now > end + _GRACE:
                self._leave(child, "incomplete")
            elif now - child.active > child.limit:
                self._die(child, f"killed after {child.limit:g} s")

    def _follow(self) -> None:
        """Takes notice of the records that came: a unit that makes any isn't hanging."""
        records, self._seen = self.journal.read_from(self._seen)
        for record in records:
            for child in self._running:
                if child.key == (record.get("stage"), record.get("unit")):
                    self._notice(child, record)

    def _notice(self, child: Child, record: Record) -> None:
        child.active, child.limit = time.monotonic(), child.unit.limit
        child.case = record["case"] if record["record"] == "begin" else None
        child.ended += record["record"] == "end"
        if record.get("status") == "failed":
            self.tell(f"FAILED {child.unit.stage}: {child.unit.name}: {record['case']}: {record['error'][:200]}")

    def _ended(self, child: Child, status: int) -> None:
        if status == DISK_FULL:
            raise JournalFull(child.tail().strip().splitlines()[-1])
        if status == 0:
            self._leave(child, "done")
        elif status == UNFINISHED:
            self._leave(child, "incomplete")
        elif status == RESTART and child.case is None and child.ended:
            self._again(child)  # the case is recorded, and its context is gone
        else:
            self._die(child, f"died of {_signal(-status)}" if status < 0 else f"ended with status {status}")

    def _leave(self, child: Child, status: str) -> None:
        self._drop(child)
        seconds = round(time.monotonic() - child.started, 1)
        self.journal.append("unit", stage=child.unit.stage, unit=child.unit.name, status=status, seconds=seconds)
        if status == "incomplete" and child.ended:
            insort(self._queue, replace(child.unit, value=child.unit.value - _LATER), key=_by_value)

    def _die(self, child: Child, error: str) -> None:
        process, case = child.process, child.case
        status = process.poll()
        self._drop(child)
        ending = {"signal": -status if status is not None and status < 0 else None, "exit": status}
        text = {"error": error, "stderr": child.tail()}
        self.journal.append("died", stage=child.unit.stage, unit=child.unit.name, case=case, **ending, **text)
        self.tell(f"DIED {child.unit.stage}: {child.unit.name}: {case or 'outside of a case'}: {error}")
        if case is None:  # it would die again
            self._leave(child, "died")
        else:
            self._again(child)

    def _again(self, child: Child) -> None:
        self._drop(child)
        self._deaths[child.key] += 1
        if self._deaths[child.key] < MAX_DEATHS:
            self._queue.insert(0, child.unit)
        else:
            self._leave(child, "died")

    def _drop(self, child: Child) -> None:
        child.kill()
        if child in self._running:
            self._running.remove(child)
            self._spent[child.unit.stage] += time.monotonic() - child.started


def _by_value(unit: Unit) -> float:
    return -unit.value


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
