"""Traces of a running training on request, and Python's garbage collection at fixed steps."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

REQUEST = "want_trace"
"""A file of this name in a run's folder requests a trace; it holds a rank, or nothing for rank 0."""
TRACES = "traces"
STEPS = 3
_ALLOCATIONS = 200_000


class Tracer:
    """Records some steps of this rank on request, by torch's profiler; on a GPU memory too.

    Args:
        folder: of the run.
        say: takes a line on the trace, or on a failure.
        rank, size: this rank's number, and the number of ranks.
        every: steps between looks for a request; all ranks look.
    """

    def __init__(
        self,
        folder: Path,
        device: torch.device,
        say: Callable[[str], None],
        rank: int = 0,
        size: int = 1,
        every: int = 1,
    ) -> None:
        self._folder = folder
        self._on_gpu = device.type == "cuda"
        self._say = say
        self._rank = rank
        self._size = size
        self._every = every
        self._profiler: profile | None = None
        self._left = 0

    def between(self, step: int) -> None:
        """Call it before the first step and after each step; `step` counts finished steps."""
        try:
            if self._profiler is None:
                if step % self._every == 0 and self._is_asked():
                    self._begin()
                return
            self._left -= 1
            if self._left == 0:
                self._write(self._stop(), step)
        except OSError as exc:  # the training goes on
            self._say(f"no trace: {exc}")

    def close(self) -> None:
        """Ends a trace for which no steps are left."""
        if self._profiler is not None:
            self._stop()
            self._end_memory_history()
            self._say(f"no trace: the run ended within the {STEPS} steps that it takes")

    def _is_asked(self) -> bool:
        """Deletes the request if it is for this rank; the main rank also deletes one for no rank."""
        request = self._folder / REQUEST
        try:
            asked = request.read_text(encoding="utf-8").strip() or "0"
        except FileNotFoundError:
            return False
        is_known = asked.isdecimal() and int(asked) < self._size
        if self._rank == (int(asked) if is_known else 0):
            request.unlink()
            if is_known:
                return True
            self._say(f"no trace: {REQUEST} names process {asked!r}; expected 0 to {self._size - 1}")
        return False

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        self._profiler, self._left = profile(activities=activities, profile_memory=True), STEPS
        self._profiler.start()

    def _stop(self) -> profile:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        if self._on_gpu:
            torch.cuda.synchronize()
        profiler.stop()
        return profiler

    def _write(self, profiler: profile, step: int) -> None:
        folder = self._folder / TRACES
        file = folder / f"step_{step:08d}{f'-rank{self._rank}' if self._rank else ''}.json"
        try:
            folder.mkdir(exist_ok=True)
            # Written under another name first, so that nobody opens half a file.
            profiler.export_chrome_trace(str(file.with_suffix(".part")))
            file.with_suffix(".part").replace(file)
            if self._on_gpu:
                torch.cuda.memory._dump_snapshot(str(file.with_suffix(".pickle")))
        finally:
            self._end_memory_history()
        self._say(f"traced the last {STEPS} steps: {file}")

    def _end_memory_history(self) -> None:
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)


@contextmanager
def collecting(every: int | None) -> Iterator[Callable[[int], None]]:
    """Inside, Python's garbage collector runs when the function gets a step that is a multiple of `every`.

    Otherwise it would stop each rank at another step, and the others would wait. Objects from before are never looked
    through again. None leaves the collector alone.
    """
    if every is None:
        yield lambda step: None
        return

    def step_done(step: int) -> None:
        if step % every == 0:
            gc.collect()

    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield step_done
    finally:
        gc.enable()
        gc.unfreeze()
