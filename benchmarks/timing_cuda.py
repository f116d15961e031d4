"""Time on a GPU: CUDA graphs, replayed interleaved and timed by events, so that the cost of launching stays out.

A graph holds one call on each set of inputs. A candidate that can't be captured, say because it waits for the GPU, is
launched call by call instead; its time then includes launching, and `CudaTimer.launched` names it.
"""

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import cycle, islice

import torch

from benchmarks.timing import Call, Rotation, Timer, interleave, schedule

_WINDOW_MS = 1.0
"""What one sample lasts at least: a thousand times the resolution of events."""
_WARM_UPS = 3
"""Calls before capture, on the same stream: libraries make their handles and workspaces for a stream at first use."""


@dataclass(frozen=True)
class _Work:
    """What one replay does: `calls` calls of a candidate, to be launched within `context`."""

    launch: Callable[[], object]
    calls: int
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    graph: torch.cuda.CUDAGraph | None = None


class CudaTimer(Timer):
    """Times on one GPU; `launched` are those that were not captured."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._broken: list[torch.cuda.CUDAGraph] = []

    def first_call(self, call: Call) -> float:
        """Seconds of one call until the GPU is done."""
        torch.cuda.synchronize(self._device)
        start = time.perf_counter()
        call()
        torch.cuda.synchronize(self._device)
        return time.perf_counter() - start

    def rounds(self, rotations: Sequence[Rotation], seconds: float) -> list[list[float]]:
        """See `Timer.rounds`."""
        self.launched = {}
        works: list[_Work] = []
        with torch.cuda.device(self._device):
            try:
                works.extend(self._prepare(index, rotation) for index, rotation in enumerate(rotations))
                return self._interleave(works, seconds)
            finally:
                torch.cuda.synchronize(self._device)
                for work in works:
                    if work.graph is not None:
                        work.graph.reset()
                self._pool = torch.cuda.graph_pool_handle()

    def _interleave(self, works: Sequence[_Work], seconds: float) -> list[list[float]]:
        once = [min(self._sample(work, 1) for _ in range(2)) for work in works]
        repeats, count = schedule(once, _WINDOW_MS, seconds)

        def sample(index: int, current: int) -> float:
            return self._sample(works[index], repeats[index]) / (repeats[index] * works[index].calls)

        return interleave(len(works), count, sample)

    def _sample(self, work: _Work, repeats: int) -> float:
        """Milliseconds of several replays; one more goes ahead, so that the GPU has work while they are queued."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with work.context():
            work.launch()
            start.record()
            for _ in range(repeats):
                work.launch()
            end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    def _prepare(self, index: int, rotation: Rotation) -> _Work:
        try:
            graph = self._capture(rotation)
        except Exception as exc:
            self.launched[index] = f"{type(exc).__name__}: {' '.join(str(exc).split())}"[:300]

            def launch() -> None:
                for call in rotation.calls:
                    call()

            return _Work(launch, len(rotation.calls), rotation.context)
        return _Work(graph.replay, len(rotation.calls), graph=graph)

    def _capture(self, rotation: Rotation) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        self._stream.wait_stream(torch.cuda.current_stream())
        # A capture that fails leaves its stream current; this `stream` brings the former one back in any case.
        with rotation.context(), torch.cuda.stream(self._stream):
            for call in islice(cycle(rotation.calls), _WARM_UPS):
                call()
            with _no_waiting():
                rotation.calls[0]()
            try:
                # Graphs of the same pool share its memory. They may: nothing that a replay computes is read later.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                    for call in rotation.calls:
                        call()
            except Exception:
                # The allocator goes on asking this graph whose memory is whose, so it must not be freed, and takes
                # its pool for busy.
                self._broken.append(graph)
                self._pool = torch.cuda.graph_pool_handle()
                raise
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Makes PyTorch's ops that wait for the GPU raise: most of what can't be captured shows before a capture breaks."""
    former = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that it may not find all of them
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(former)
