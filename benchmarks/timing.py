"""Time on a CPU: candidates interleaved, inputs rotated, many rounds."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

Call = Callable[[], object]


@dataclass(frozen=True)
class Rotation:
    """One candidate: the same call on different sets of inputs, together larger than the cache.

    `context` makes the surroundings that the calls need, such as a chosen backend; its cost is not measured.
    """

    calls: Sequence[Call]
    context: Callable[[], AbstractContextManager[object]] = nullcontext


MIN_ROUNDS, MAX_ROUNDS = 8, 40
ROUNDS_OF_SECONDS = 5
"""Rounds where one call takes a second or more."""
_WINDOW_MS = 2.0
"""Least duration of a sample: far above the clock's resolution and the loop's own cost."""
_ESTIMATES = 3
"""Samples from which a call's time is estimated: a single one may have been interrupted."""


class Timer:
    """Measures several candidates side by side by the clock on the wall; the threads are those that PyTorch is set to.

    Attributes:
        launched: candidates of the last `rounds` whose time includes launching, with the reason.
    """

    def __init__(self) -> None:
        self.launched: dict[int, str] = {}

    def first_call(self, call: Call) -> float:
        """Seconds of one call, waiting for the device."""
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    def rounds(self, rotations: Sequence[Rotation], seconds: float) -> list[list[float]]:
        """Milliseconds of one call, for each candidate a list of one value a round.

        Args:
            rotations: the candidates, each already called once on each of its inputs.
            seconds: about how long to spend on each candidate.
        """
        once = [_estimate(rotation) for rotation in rotations]
        repeats, count = schedule(once, _WINDOW_MS, seconds)
        return interleave(
            len(rotations), count, lambda index, current: _sample(rotations[index], repeats[index], current)
        )


def schedule(once_ms: Sequence[float], window_ms: float, seconds: float) -> tuple[list[int], int]:
    """How many calls make a sample of each candidate, and how many rounds fit into `seconds` for the slowest.

    Args:
        once_ms: about how long one call of each candidate takes.
        window_ms: least duration of a sample.
        seconds: for each candidate.
    """
    repeats = [max(1, math.ceil(window_ms / max(once, 1e-4))) for once in once_ms]
    slowest = max((count * once for count, once in zip(repeats, once_ms, strict=True)), default=1.0)
    least = ROUNDS_OF_SECONDS if slowest >= 1e3 else MIN_ROUNDS
    return repeats, min(MAX_ROUNDS, max(least, round(1e3 * seconds / max(slowest, 1e-4))))


def interleave(candidates: int, rounds: int, sample: Callable[[int, int], float]) -> list[list[float]]:
    """For each candidate `sample(candidate, round)` of every round; each round starts with another candidate."""
    samples: list[list[float]] = [[] for _ in range(candidates)]
    for current in range(rounds):
        for step in range(candidates):
            index = (current + step) % candidates
            samples[index].append(sample(index, current))
    return samples


def _estimate(rotation: Rotation) -> float:
    """About how many milliseconds a call takes; a long one is believed at once."""
    times = [_sample(rotation, 1, 0)]
    while len(times) < _ESTIMATES and sum(times) < 1e3:
        times.append(_sample(rotation, 1, len(times)))
    return min(times)


def _sample(rotation: Rotation, repeats: int, offset: int) -> float:
    """Milliseconds of a call, the mean of `repeats` calls on the next sets of inputs."""
    count = len(rotation.calls)
    calls = [rotation.calls[(offset * repeats + index) % count] for index in range(repeats)]
    with rotation.context():
        start = time.perf_counter()
        for call in calls:
            call()
        return 1e3 * (time.perf_counter() - start) / repeats
