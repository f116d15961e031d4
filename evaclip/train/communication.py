"""What share of a step goes by while the processes exchange tensors: torch's profiler looks at one step of many."""

import math
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from evaclip.train.distributed import World

Span = tuple[float, float]
"""Start and end, in nanoseconds."""

_OPERATORS = ("aten::", "evakernels::", "Torch-Compiled Region")


class Shares(NamedTuple):
    """Of a step's time: in which a collective ran, and in which nothing else ran beside it."""

    running: float
    exposed: float


UNKNOWN = Shares(math.nan, math.nan)


class CommunicationSampler:
    """Profiles single steps, in all processes the same ones, or else the others would wait for those that do.

    What counts is every collective, those of `fully_shard`, of the loss and of the trainer alike: NCCL's kernels on
    a GPU, gloo's work on a CPU. A collective that waits for another process runs.

    Args:
        every: records from one sample to the next; None takes none.
    """

    def __init__(self, world: World, every: int | None) -> None:
        self._device = world.device
        self._every = every if world.size > 1 else None
        self._nothing = Shares(0.0, 0.0) if world.size == 1 else UNKNOWN
        self._shares = self._nothing

    def is_due(self, step: int, log_every: int) -> bool:
        """Whether the step that follows `step` steps is one to look at: the first after a record."""
        records, rest = divmod(step, log_every)
        # The very first steps are unlike the others.
        return self._every is not None and step > 0 and rest == 0 and (records - 1) % self._every == 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Looks at what is done inside."""
        # Otherwise the profiler writes two lines a sample to the terminal.
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        activity = ProfilerActivity.CUDA if self._device.type == "cuda" else ProfilerActivity.CPU
        self._wait()
        with profile(activities=[activity]) as profiler:
            start = time.perf_counter()
            yield
            self._wait()
            seconds = time.perf_counter() - start
        # As they were recorded: `profiler.events()` would take ten times as long to put them into a tree.
        recorded: Any = profiler.profiler
        self._shares = shares_of(recorded.kineto_results.events(), seconds)

    def take(self) -> Shares:
        """What the last sample found, once; `UNKNOWN` if there was none. In one process there is nothing to find."""
        shares, self._shares = self._shares, self._nothing
        return shares

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def shares_of(events: Iterable[Any], seconds: float) -> Shares:
    """The shares of a step that took `seconds`, from the profiler's events; `UNKNOWN` if it has seen nothing."""
    collectives: list[Span] = []
    others: list[Span] = []
    for event in events:
        name, span = event.name(), (event.start_ns(), event.end_ns())
        # On a GPU every event of the device is a kernel or a copy, but for the ranges that code gave a name to.
        is_kernel = event.device_type() != DeviceType.CPU and not event.is_user_annotation()
        if name.startswith("gloo:") or (is_kernel and name.startswith("nccl")):
            collectives.append(span)
        elif is_kernel or name.startswith(_OPERATORS):
            others.append(span)
    if not (collectives or others) or seconds <= 0:
        return UNKNOWN
    running, busy = _length(collectives), _length([*collectives, *others])
    exposed = busy - _length(others)
    return Shares(min(1.0, running / seconds / 1e9), min(1.0, exposed / seconds / 1e9))


def _length(spans: list[Span]) -> float:
    """The time in which one of them runs at least."""
    total, covered = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return total
