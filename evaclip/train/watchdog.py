"""A watchdog of hanging ranks; Ctrl-C and SIGTERM as a request to stop after the step."""

import faulthandler
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, NamedTuple, Self

EXIT_CODE = os.EX_TEMPFAIL
"""Of a process that the watchdog ended, as of other interrupted runs."""
INSISTING = 2.0
"""Seconds from a signal to a Ctrl-C that ends the process: torchrun passes a terminal's signal on to all at once."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class _Phase(NamedTuple):
    name: str
    began: float
    limit: float
    abort: bool


class Watchdog:
    """Prints the stacks of all threads if a phase of the training (data, a step, saving) takes too long.

    Every rank has one. Other ranks wait for a hanging one in a step, so the rank that reports another phase hangs.

    Args:
        rank: of this process.
        seconds: maximum duration of a phase without a limit of its own; None watches nothing.
        abort: end the process then, with `EXIT_CODE`, in every phase.
        record: called when a phase takes too long; returns another line of the report, or None.
    """

    def __init__(
        self, rank: int, seconds: float | None, abort: bool, record: Callable[[], str | None] | None = None
    ) -> None:
        self._rank = rank
        self._seconds = seconds
        self._abort = abort
        self._record = record
        self._phase: _Phase | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if seconds is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    @contextmanager
    def phase(self, name: str, *, limit: float | None = None, abort: bool = False) -> Iterator[None]:
        """Names the phase; `abort` ends the process if it takes more than `limit` seconds."""
        limit = self._seconds if limit is None else limit
        before, self._phase = self._phase, _Phase(name, time.monotonic(), limit or math.inf, abort or self._abort)
        try:
            yield
        finally:
            self._phase = before and before._replace(began=time.monotonic())

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        assert self._seconds is not None
        reported: _Phase | None = None
        while not self._closed.wait(self._seconds / 10):
            phase = self._phase
            if phase is None or phase is reported or time.monotonic() - phase.began < phase.limit:
                continue
            reported = phase
            print(
                f"watchdog: process {self._rank} ({socket.gethostname()}, pid {os.getpid()}) has been in "
                f"'{phase.name}' for {time.monotonic() - phase.began:.0f} s; where its threads are:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            if self._record and (line := self._record()):
                print(f"watchdog: process {self._rank}: {line}", file=sys.stderr, flush=True)
            if phase.abort:
                os._exit(EXIT_CODE)


@contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit(143) instead of ending the process, so that locks are released."""
    before = signal.getsignal(signal.SIGTERM)
    if before is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        if before is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, before)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


class StopSignals:
    """Remembers the first signal, so that the last checkpoint can be written.

    Repeated signals of launchers and schedulers have no effect. Only a second Ctrl-C, some seconds after the first
    signal, ends the process at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._before: dict[int, Any] = {}

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + (self.received or signal.SIGTERM)

    def __enter__(self) -> Self:
        for number in _SIGNALS:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since >= INSISTING:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
