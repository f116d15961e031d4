"""Time, samples, tokens and the share of waiting between two log records."""

import time
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

Item = TypeVar("Item")


class Interval(NamedTuple):
    """What was done since the last reading.

    Attributes:
        samples: over all processes.
        tokens: of this process.
        seconds: that it took, above 0.
        waited: seconds of these, spent waiting for data.
    """

    samples: int
    tokens: int
    seconds: float
    waited: float


class Meter:
    """Intervals are those of training only: `restart` after anything that is not, such as saving.

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
        self._tokens = 0

    def fetch(self, batches: Iterator[Item]) -> Item:
        """The next batch; the time that it takes counts as waiting."""
        before = time.monotonic()
        batch = next(batches)
        self._waited += time.monotonic() - before
        return batch

    def count(self, samples: int, tokens: int) -> None:
        self._samples += samples
        self._tokens += tokens

    def read(self) -> Interval:
        """The interval, which ends here."""
        elapsed = max(time.monotonic() - self._start, 1e-9)
        interval = Interval(self._samples, self._tokens, elapsed, self._waited)
        self.restart()
        return interval

    @property
    def seconds(self) -> float:
        """That the run has taken so far."""
        return time.monotonic() - self._begin
