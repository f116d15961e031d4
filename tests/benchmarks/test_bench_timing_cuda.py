"""Captures, replays and times of the GPU's timer on a fake GPU with a clock."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import timing
from benchmarks.timing import CudaTimer, Rotation


class FakeGraph:
    """Keeps the launches of its capture."""

    def __init__(self, gpu: "FakeCuda") -> None:
        self.gpu, self.work, self.live = gpu, [], True
        gpu.graphs.append(self)

    def replay(self) -> None:
        assert self.live
        self.gpu.now += sum(self.work)

    def reset(self) -> None:
        self.live = False


class FakeEvent:
    """A moment of the fake GPU."""

    def __init__(self, gpu: "FakeCuda") -> None:
        self.gpu, self.at = gpu, 0.0

    def record(self) -> None:
        self.at = self.gpu.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "FakeEvent") -> float:
        return end.at - self.at


class FakeCuda:
    """The used part of torch.cuda: streams, events, graphs, and the mode that forbids waiting."""

    def __init__(self) -> None:
        self.now = 0.0
        self.graphs: list[FakeGraph] = []
        self.capturing: FakeGraph | None = None
        self.mode: int | str = 0
        self.current: Any = SimpleNamespace(wait_stream=lambda other: None)
        self.device = nullcontext
        self.CUDAGraph = lambda: FakeGraph(self)
        self.Event = lambda enable_timing: FakeEvent(self)
        self.Stream = lambda device: SimpleNamespace(wait_stream=lambda other: None)
        self.current_stream = lambda: self.current
        self.get_sync_debug_mode = lambda: self.mode
        self.synchronize = lambda device: None
        self.graph_pool_handle = object

    def launch(self, milliseconds: float) -> None:
        """A kernel."""
        if self.capturing is not None:
            self.capturing.work.append(milliseconds)
        else:
            self.now += milliseconds

    def wait(self) -> None:
        """An op of PyTorch that waits for the GPU."""
        if self.mode == "error":
            raise RuntimeError("called a synchronizing operation")

    def wait_unseen(self) -> None:
        """Another library's op that waits for the GPU."""
        if self.capturing is not None:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        former, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = former

    @contextmanager
    def graph(self, graph: FakeGraph, pool: object, stream: Any) -> Iterator[None]:
        assert self.current is stream  # warmed up on the stream of the capture
        self.capturing = graph
        try:
            yield
        finally:
            self.capturing = None

    def set_sync_debug_mode(self, mode: int | str) -> None:
        self.mode = mode


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A fake GPU in the place of torch.cuda."""
    cuda = FakeCuda()
    monkeypatch.setattr(timing, "torch", SimpleNamespace(cuda=cuda))
    return cuda


def rotation(gpu: FakeCuda, *milliseconds: float, also: Callable[[], None] = lambda: None) -> Rotation:
    """A candidate with these times on its sets of inputs; its calls also run `also`."""

    def call(duration: float) -> None:
        gpu.launch(duration)
        also()

    return Rotation([lambda duration=duration: call(duration) for duration in milliseconds])


def test_sample_is_the_time_of_one_call(gpu: FakeCuda) -> None:
    timer = CudaTimer("cuda")
    samples = timer.rounds([rotation(gpu, 0.1, 0.1, 0.4), rotation(gpu, 3.0)], seconds=0.1)
    assert timer.launched == {}
    assert [{round(value, 9) for value in values} for values in samples] == [{0.2}, {3.0}]
    assert len(samples[0]) == len(samples[1]) == round(100 / 3)
    assert [graph.work for graph in gpu.graphs] == [[0.1, 0.1, 0.4], [3.0]]
    assert not any(graph.live for graph in gpu.graphs)


@pytest.mark.parametrize("kind", ["wait", "wait_unseen"])
def test_failed_capture_is_launched_and_named(gpu: FakeCuda, kind: str) -> None:
    timer = CudaTimer("cuda")
    samples = timer.rounds([rotation(gpu, 0.5, 1.5, also=getattr(gpu, kind)), rotation(gpu, 2.0)], seconds=0.01)
    assert set(samples[0]) == {1.0}
    assert set(samples[1]) == {2.0}
    assert list(timer.launched) == [0]
    assert timer.launched[0].startswith("RuntimeError: ")
    assert "\n" not in timer.launched[0]
    assert gpu.mode == 0
    timer.rounds([rotation(gpu, 2.0)], seconds=0.01)
    assert timer.launched == {}


def test_capture_is_in_the_candidates_context(gpu: FakeCuda) -> None:
    inside = []

    @contextmanager
    def backend() -> Iterator[None]:
        inside.append(True)
        yield
        inside.pop()

    seen: list[bool] = []
    captured = rotation(gpu, 1.0, also=lambda: seen.append(bool(inside)))
    CudaTimer("cuda").rounds([Rotation(captured.calls, backend)], seconds=0.01)
    assert seen
    assert all(seen)
