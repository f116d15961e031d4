"""A trace of chosen steps, and Python's garbage collection at fixed steps."""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.profiler import ProfilerAction, profile


@contextmanager
def tracing(
    file: Path, steps: tuple[int, int] | None, finished: int, say: Callable[[str], None]
) -> Iterator[Callable[[], object]]:
    """Inside, torch's profiler records steps into a Chrome trace; call the function after each step.

    Args:
        file: to write; its folder is made.
        steps: the first and the last one, from 1 on; None records nothing.
        finished: steps before the first call.
        say: takes a line on the trace, or on a failure.
    """
    if steps is None or finished >= steps[1]:
        yield lambda: None
        return
    first, last = steps

    def action(count: int) -> ProfilerAction:
        step = finished + count + 1
        if first <= step <= last:
            return ProfilerAction.RECORD_AND_SAVE if step == last else ProfilerAction.RECORD
        return ProfilerAction.WARMUP if step == first - 1 else ProfilerAction.NONE

    def write(profiler: profile) -> None:
        try:
            file.parent.mkdir(exist_ok=True)
            # Written under another name first, so that nobody opens half a file.
            profiler.export_chrome_trace(str(file.with_suffix(".part")))
            file.with_suffix(".part").replace(file)
            say(f"traced steps {first} to {last}: {file}")
        except OSError as exc:  # the training goes on
            say(f"no trace: {exc}")

    with profile(schedule=action, on_trace_ready=write, profile_memory=True) as profiler:
        yield profiler.step


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
