"""Says which process is stuck, where and since when; on request ends it, so that torchrun starts all anew."""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EXIT_CODE = 70
"""Of a process that the watchdog ended: EX_SOFTWARE."""


class Watchdog:
    """Watches that a phase of the training (fetching data, a step, saving) ends in time.

    Every process has one. When a process hangs, the others soon wait for it in a step, so that the one that reports
    another phase is the one to look at.

    Args:
        rank: of this process.
        seconds: a phase may take; None watches nothing.
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
        self._phase: tuple[str, float, bool] | None = None
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        if seconds is not None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    @contextmanager
    def phase(self, name: str, *, abort: bool = False) -> Iterator[None]:
        """Names the phase; `abort` ends the process if it takes too long."""
        before, self._phase = self._phase, (name, time.monotonic(), abort or self._abort)
        try:
            yield
        finally:
            self._phase = before and (before[0], time.monotonic(), before[2])

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self) -> None:
        assert self._seconds is not None
        reported: tuple[str, float, bool] | None = None
        while not self._closed.wait(self._seconds / 10):
            phase = self._phase
            if phase is None or phase is reported or time.monotonic() - phase[1] < self._seconds:
                continue
            reported = phase
            print(
                f"watchdog: process {self._rank} ({socket.gethostname()}, pid {os.getpid()}) has been in "
                f"'{phase[0]}' for {time.monotonic() - phase[1]:.0f} s; where its threads are:",
                file=sys.stderr,
                flush=True,
            )
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
            if self._record and (line := self._record()):
                print(f"watchdog: process {self._rank}: {line}", file=sys.stderr, flush=True)
            if phase[2]:
                os._exit(EXIT_CODE)
