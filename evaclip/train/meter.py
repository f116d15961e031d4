"""Time, samples and the share of waiting between two log records."""

import time
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class Rates(NamedTuple):
    """Since the last reading: samples per second, and the share of the time spent waiting for data."""

    samples_per_second: float
    data_wait: float


class Meter:
    """Rates are those of training only: `restart` after anything that is not, such as saving.

    Args:
        seconds: that the run took before this process went on with it.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self._begin = time.monotonic() - seconds
        self.restart()

    def restart(self) -> None:
        """Forgets the present interval."""
        self._start = time.monotonic()
        self._waited = 0.0
        self._samples = 0

    def fetch(self, batches: Iterator[Item]) -> Item:
        """The next batch; the time that it takes counts as waiting."""
        before = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - before
        return batch

    def count(self, samples: int) -> None:
        self._samples += samples

    def read(self) -> Rates:
        """The rates of the interval, which ends here."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        rates = Rates(self._samples / elapsed, self._waited / elapsed)
        self.restart()
        return rates

    @property
    def seconds(self) -> float:
        """That the run has taken so far."""
        return time.monotonic() - self._begin
