"""Counting faults: by kind, named in the log without flooding it, and as a share of the samples."""

import logging
from collections import Counter
from collections.abc import Iterable

from evaclip.data.samples import Fault, FaultKind

_LOG = logging.getLogger("evaclip.data")
_NAMED_PER_KIND = 20
_SUMMARY_EVERY = 1000
_MIN_WINDOW, _MAX_WINDOW = 1_000, 10_000_000


class FaultLog:
    """Names the first faults of each kind in the log "evaclip.data"; from then on it only counts them."""

    def __init__(self) -> None:
        self.counts: Counter[FaultKind] = Counter()

    def add(self, faults: Iterable[Fault]) -> None:
        """Counts and logs faults."""
        for fault in faults:
            self.counts[fault.kind] += 1
            count = self.counts[fault.kind]
            if count < _NAMED_PER_KIND:
                _LOG.warning("%s", fault)
            elif count == _NAMED_PER_KIND:
                _LOG.warning("%s; more of this kind are only counted, `evaclip data check` lists them", fault)
            elif count % _SUMMARY_EVERY == 0:
                _LOG.warning("%d samples with %s so far, the last: %s", count, fault.kind, fault.name)


class BadShare:
    """The share of bad samples that a training reads, in windows of one epoch each.

    The windows follow one another from where counting begins. One has 1,000 to 10,000,000 samples, so that neither a
    handful of samples nor one bad shard of many is taken for the whole data set.

    Args:
        epoch: samples of the data set.
        allowed: share of bad samples among all that are read.
        samples, bad: where counting begins: the samples used so far, and the bad ones that were replaced.
    """

    def __init__(self, epoch: int, allowed: float, samples: int, bad: int) -> None:
        self._window = min(max(epoch, _MIN_WINDOW), _MAX_WINDOW)
        self._allowed = allowed
        self._samples, self._bad = samples, bad

    def excess(self, samples: int, bad: int) -> tuple[int, int] | None:
        """The window's bad samples and all that it read, if more are bad than a whole window may have; else None."""
        used, found = samples - self._samples, bad - self._bad
        if found > self._allowed * (max(used, self._window) + found):
            return found, used + found
        if used >= self._window:
            self._samples, self._bad = samples, bad
        return None
