"""Time on a GPU: CUDA graphs, replayed interleaved and timed by events, so that the cost of launching stays out.

A graph holds one call on each set of inputs. A candidate that can't be captured, say because it waits for the GPU, is
launched call by call instead; its time then includes launching, and `CudaTimer.launched` names it.
"""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import cycle, islice

import torch

from benchmarks.timing import Call, Rotation, Timer, interleave, schedule

_WINDOW_MS = 1.0
"""Least duration of a sample: a thousand times the resolution of events."""
_WARM_UPS = 3
"""Calls before capture, on the same stream: libraries make their handles and workspaces for a stream at first use."""


class CudaTimer(Timer):
    """Times on one GPU; `launched` names the candidates that were not captured."""

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
        graphs: list[torch.cuda.CUDAGraph | None] = []
        with torch.cuda.device(self._device):
            try:
                graphs.extend(self._capture_or_none(index, rotation) for index, rotation in enumerate(rotations))
                pairs = list(zip(rotations, graphs, strict=True))
                once = [min(_sample(*pair, 1) for _ in range(2)) for pair in pairs]
                repeats, count = schedule(once, _WINDOW_MS, seconds)

                def sample(index: int, current: int) -> float:
                    return _sample(*pairs[index], repeats[index]) / (repeats[index] * len(rotations[index].calls))

                return interleave(len(rotations), count, sample)
            finally:
                torch.cuda.synchronize(self._device)
                for graph in filter(None, graphs):
                    graph.reset()
                self._pool = torch.cuda.graph_pool_handle()

    def _capture_or_none(self, index: int, rotation: Rotation) -> torch.cuda.CUDAGraph | None:
        try:
            return self._capture(rotation)
        except Exception as exc:
            self.launched[index] = f"{type(exc).__name__}: {' '.join(str(exc).split())}"[:300]
            return None

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


def _sample(rotation: Rotation, graph: torch.cuda.CUDAGraph | None, repeats: int) -> float:
    """Milliseconds of launching a candidate so often, by its graph if there is one.

    One more launch goes first, so that the GPU has work while the others are queued.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    calls: Sequence[Call] = rotation.calls if graph is None else (graph.replay,)
    with rotation.context() if graph is None else nullcontext():
        for call in calls:
            call()
        start.record()
        for _ in range(repeats):
            for call in calls:
                call()
        end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


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
