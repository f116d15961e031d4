"""Counts faults by kind and names them in the log, without flooding it."""

import logging
from collections import Counter
from collections.abc import Iterable

from evaclip.data.samples import Fault, FaultKind

_LOG = logging.getLogger("evaclip.data")
_NAMED_PER_KIND = 20
_SUMMARY_EVERY = 1000


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
