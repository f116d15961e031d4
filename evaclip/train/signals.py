"""Ctrl-C and SIGTERM as a request to stop after the present step."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

INSISTING = 2.0
"""Seconds from a signal to a Ctrl-C that is meant: torchrun sends on at once what a terminal has sent to all."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def unwinding_on_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises SystemExit(143), so that what was taken is given back, instead of ending the process."""
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
    """While active, the first signal is remembered, and the last checkpoint can be written in peace.

    Launchers and schedulers repeat their signals, and send them to all processes: that changes nothing. Only a second
    Ctrl-C, some seconds after the first signal, ends the process at once.
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
