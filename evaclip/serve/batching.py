"""Dynamic micro-batching: requests that wait at the same time are computed together, by one thread."""

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

Compute = Callable[[list[Any]], Sequence[Any]]


class QueueFull(Exception):
    """More waits already than is worth to wait behind."""


@dataclass
class _Job:
    item: Any
    future: Future[Any] = field(default_factory=Future)
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """Collects items of some kinds, each from any thread, and computes those of a kind together.

    The kind with the oldest waiting item comes first. Items with a future that is cancelled before their turn
    are never computed.

    Args:
        compute: of each kind the function of a list of items that gives a result for each, in order; all are called
            by the same thread.
        size: items of a batch at most.
        delay: seconds that an item waits at most for others to come, while nothing else is computed.
        depth: items that may wait.
        observe: called with the kind and number of items of each batch.

    Example:
        ```python
        batcher = Batcher({"text": encoder.texts}, size=32, delay=0.002, depth=256)
        embedding = batcher.submit("text", ["a cat"])[0].result()
        ```
    """

    def __init__(
        self,
        compute: Mapping[str, Compute],
        *,
        size: int,
        delay: float,
        depth: int,
        observe: Callable[[str, int], None] = lambda kind, count: None,
    ) -> None:
        self._compute, self._observe = compute, observe
        self._size, self._delay, self._depth = size, delay, depth
        self._waiting: dict[str, deque[_Job]] = {kind: deque() for kind in compute}
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="evaclip-batches", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether items are computed."""
        return self._thread.is_alive()

    def waiting(self) -> int:
        """Waiting items."""
        with self._changed:
            return self._count()

    def submit(self, kind: str, items: Sequence[Any]) -> list[Future[Any]]:
        """The results of items, once there are some. Raises QueueFull if there isn't room for all."""
        jobs = [_Job(item) for item in items]
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            if self._count() + len(jobs) > self._depth:
                raise QueueFull
            self._waiting[kind] += jobs
            self._changed.notify()
        return [job.future for job in jobs]

    def close(self) -> None:
        """Ends the thread after the batch that it computes; what waits is cancelled."""
        with self._changed:
            self._closed = True
            for jobs in self._waiting.values():
                for job in jobs:
                    job.future.cancel()
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            kind, jobs = taken
            jobs = [job for job in jobs if job.future.set_running_or_notify_cancel()]
            if jobs:
                self._observe(kind, len(jobs))
                self._finish(self._compute[kind], jobs)

    def _take(self) -> tuple[str, list[_Job]] | None:
        with self._changed:
            while not self._closed and not any(self._waiting.values()):
                self._changed.wait()
            if self._closed:
                return None
            since, kind = min((jobs[0].since, kind) for kind, jobs in self._waiting.items() if jobs)
            end = since + self._delay
            while len(self._waiting[kind]) < self._size and not self._closed and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            self._count()
            jobs = self._waiting[kind]
            return kind, [jobs.popleft() for _ in range(min(self._size, len(jobs)))]

    def _count(self) -> int:
        """How many wait, once those are gone for which nobody waits any more."""
        for kind, jobs in self._waiting.items():
            self._waiting[kind] = deque(job for job in jobs if not job.future.cancelled())
        return sum(map(len, self._waiting.values()))

    def _finish(self, compute: Compute, jobs: list[_Job]) -> None:
        try:
            for job, result in zip(jobs, compute([job.item for job in jobs]), strict=True):
                job.future.set_result(result)
        except Exception as exc:
            if len(jobs) == 1:
                jobs[0].future.set_exception(exc)
                return
            # One bad item must not fail the others of its batch.
            for job in jobs:
                if not job.future.done():
                    self._finish(compute, [job])
