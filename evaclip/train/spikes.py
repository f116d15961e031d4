"""Loss spikes, judged by the losses before them."""

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

_SCALE = 1.4826
"""Times the median absolute deviation, an estimate of the standard deviation."""


class SpikeDetector:
    """Detects a loss far above its earlier level for several records in a row.

    Far above is more than `deviations` standard deviations over the median of the last `window` ordinary records;
    both estimates are robust, so that a spike doesn't move the measure that it is judged by.

    Args:
        deviations: that are still ordinary; None finds no spikes.
        patience: records in a row that make a spike.
        window: ordinary records that are remembered. Nothing is judged before half of them are there.
    """

    def __init__(self, deviations: float | None, patience: int, window: int) -> None:
        self._deviations = deviations
        self._patience = patience
        self._window = window
        self._ordinary: deque[float] = deque(maxlen=window)
        self.suspicious = 0

    @property
    def is_calm(self) -> bool:
        """Whether the last record was ordinary."""
        return self.suspicious == 0

    def state_dict(self) -> dict[str, Any]:
        """The losses that it judges by, as a checkpoint holds them."""
        return {"ordinary": list(self._ordinary), "suspicious": self.suspicious}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`; without one, as of an earlier version, nothing is remembered."""
        self._ordinary = deque(state.get("ordinary", ()), maxlen=self._window)
        self.suspicious = state.get("suspicious", 0)

    def saw(self, loss: float) -> bool:
        """Takes the loss of the next record; true if a spike is complete, which is then forgotten."""
        if self._deviations is None or not math.isfinite(loss):
            return False
        if not self._is_high(loss, self._deviations):
            self._ordinary.append(loss)
            self.suspicious = 0
            return False
        self.suspicious += 1
        if self.suspicious < self._patience:
            return False
        self.suspicious = 0
        return True

    def _is_high(self, loss: float, deviations: float) -> bool:
        if 2 * len(self._ordinary) < self._window:
            return False
        middle = median(self._ordinary)
        deviation = _SCALE * median(abs(value - middle) for value in self._ordinary)
        return loss > middle + deviations * deviation
