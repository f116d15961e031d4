"""What a step does, seen while a run goes on: a trace by request, and the garbage collector's pauses at fixed steps."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

REQUEST = "want_trace"
"""A file of this name in a run's folder asks for a trace, and is taken away when that begins.

It holds the number of a process, or nothing for the main one.
"""
TRACES = "traces"
STEPS = 3
_ALLOCATIONS = 200_000


class Tracer:
    """Records some steps of this process when it is asked to, by torch's profiler; on a GPU memory too.

    Args:
        folder: of the run.
        say: takes a line on what was written, or couldn't be.
        rank, size: this process's number, of how many.
        every: steps from one look for a request to the next; all processes look.
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

    @property
    def is_on(self) -> bool:
        """Whether steps are recorded: there can't be two profilers at a time."""
        return self._profiler is not None

    def between(self, step: int) -> None:
        """Call it before the first step and after each step; `step` counts finished steps."""
        try:
            if self._profiler is None:
                if step % self._every == 0 and self._is_asked():
                    self._begin()
                return
            self._left -= 1
            if self._left == 0:
                try:
                    self._end(step)
                finally:
                    self._forget()
        except OSError as exc:  # The training is none the worse for it.
            self._say(f"no trace: {exc}")

    def _is_asked(self) -> bool:
        """Takes the request away if it is for this process, and the main one if it is for none."""
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

    def close(self) -> None:
        """Ends a trace for which no steps are left."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None
            self._say(f"no trace: the run ended within the {STEPS} steps that it takes")
        self._forget()

    def _forget(self) -> None:
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        if self._on_gpu:
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        self._profiler, self._left = profile(activities=activities, profile_memory=True), STEPS
        self._profiler.start()

    def _end(self, step: int) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        if self._on_gpu:
            torch.cuda.synchronize()
        profiler.stop()
        folder = self._folder / TRACES
        folder.mkdir(exist_ok=True)
        file = folder / f"step_{step:08d}{f'-rank{self._rank}' if self._rank else ''}.json"
        # Written under another name first, so that nobody opens half a file.
        profiler.export_chrome_trace(str(file.with_suffix(".part")))
        file.with_suffix(".part").replace(file)
        if self._on_gpu:
            torch.cuda.memory._dump_snapshot(str(file.with_suffix(".pickle")))
        self._say(f"traced the last {STEPS} steps: {file}")


@contextmanager
def collecting(every: int | None) -> Iterator[Callable[[int], None]]:
    """Inside, Python's garbage collector runs when the number of steps that is given is a multiple of `every`.

    Left to itself it stops each process at another step, and the others wait for that one. What there is at the
    beginning is never looked through again. None leaves it to itself.
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
