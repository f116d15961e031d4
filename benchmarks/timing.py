"""Times of several candidates: interleaved, inputs rotated, many rounds.

On a CPU the clock on the wall measures a sample of some calls. On a GPU a CUDA graph holds one call on each set of
inputs, and events time its replays, which leaves the cost of launching out. A candidate that can't be captured, for
example because it waits for the GPU, is launched call by call.
"""

import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import cycle, islice

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Rotation:
    """One candidate: the same call on different sets of inputs, together larger than the cache.

    `context` makes the context manager of the calls, such as a chosen backend; its cost is not measured.
    """

    calls: Sequence[Call]
    context: Callable[[], AbstractContextManager[object]] = nullcontext


MIN_ROUNDS, MAX_ROUNDS = 8, 40
ROUNDS_OF_SECONDS = 5
"""Rounds where one call takes a second or more."""
_WINDOW_MS = {"cpu": 2.0, "cuda": 1.0}
"""Least duration of a sample: far above the clock's resolution and the loop's cost."""
_ESTIMATES = 3
"""Samples that estimate a call's time: a single one may have been interrupted."""
_SHORT_MS = 200.0
"""Calls up to this are preceded by one that isn't timed: threads of the candidate before may still spin."""
_WARM_UPS = 3
"""Calls before capture, on the same stream: libraries make their handles and workspaces for a stream at first use."""


class Timer:
    """Measures several candidates side by side on the CPU, with PyTorch's number of threads.

    Attributes:
        launched: candidates of the last `rounds` that are timed with their launches, with the reason.
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
        repeats, count = schedule(once, _WINDOW_MS["cpu"], seconds)

        def sample(index: int, current: int) -> float:
            if once[index] <= _SHORT_MS:
                _sample(rotations[index], 1, current)
            return _sample(rotations[index], repeats[index], current)

        return interleave(len(rotations), count, sample)


@contextmanager
def spinning(seconds: float = 1800) -> Iterator[None]:
    """Keep the processors busy with one spinning process each, which ends with the block or with this process.

    Args:
        seconds: longest life of a spinning process.

    Raises:
        RuntimeError: a spinning process ended before the block.
    """
    code = (
        f"import os, time; print(flush=True); end = time.monotonic() + {seconds}\n"
        f"while os.getppid() == {os.getpid()} and time.monotonic() < end: sum(range(100_000))"
    )
    command = [sys.executable, "-IS", "-c", code]
    spinners = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in os.sched_getaffinity(0)]
    try:
        for spinner in spinners:
            assert spinner.stdout is not None
            spinner.stdout.readline()  # it runs
        yield
        if any(spinner.poll() is not None for spinner in spinners):
            raise RuntimeError("a spinning process ended before the measurement")
    finally:
        for spinner in spinners:
            spinner.kill()
            spinner.communicate()


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
    """About how many milliseconds a call takes; a long one isn't repeated."""
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
                once = [min(_sample_on_gpu(*pair, 1) for _ in range(2)) for pair in pairs]
                repeats, count = schedule(once, _WINDOW_MS["cuda"], seconds)

                def sample(index: int, current: int) -> float:
                    calls = repeats[index] * len(rotations[index].calls)
                    return _sample_on_gpu(*pairs[index], repeats[index]) / calls

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
        # A failed capture leaves its stream current; this `stream` restores the former one in any case.
        with rotation.context(), torch.cuda.stream(self._stream):
            for call in islice(cycle(rotation.calls), _WARM_UPS):
                call()
            with _no_waiting():
                rotation.calls[0]()
            try:
                # Graphs of one pool share its memory: nobody reads the outputs of a replay later.
                with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
                    for call in rotation.calls:
                        call()
            except Exception:
                # The allocator keeps using this graph and its pool, so the graph must not be freed.
                self._broken.append(graph)
                self._pool = torch.cuda.graph_pool_handle()
                raise
        torch.cuda.current_stream().wait_stream(self._stream)
        return graph


def _sample_on_gpu(rotation: Rotation, graph: torch.cuda.CUDAGraph | None, repeats: int) -> float:
    """Milliseconds of `repeats` launches of a candidate, by its graph if there is one.

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
    """PyTorch's ops that wait for the GPU raise: most candidates that can't be captured fail before the capture."""
    former = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns that it may not find all of them
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(former)
