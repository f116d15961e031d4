"""Search for launch configurations: steepest descent from the shipped one."""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError
from triton.runtime.jit import JITFunction
from triton.testing import do_bench

from .. import backends
from ..triton import launcher as find_launcher
from . import clear_caches, forced, gpu_file, table
from .calls import Draw, calls

Config = dict[str, int]
Measure = Callable[[Config], float | None]
"""Returns the time of a configuration in any unit; None for an unusable one."""

GAIN = 0.99
"""Largest ratio of times that counts as faster; the rest is noise."""

MOST = {"num_warps": 16, "num_stages": 5}

GPU_BACKENDS = ("cuda", "triton")


def neighbours(config: Config) -> Iterator[Config]:
    """Configurations that differ in one value, or in one value and the number of warps, by a step up or down."""
    steps: dict[str, list[int]] = {}
    for name, value in config.items():
        up, down = (value + 1, value - 1) if name == "num_stages" else (2 * value, value // 2)
        steps[name] = [v for v in (up, down) if 1 <= v <= MOST.get(name, v)]
    for name, values in steps.items():
        for value in values:
            yield config | {name: value}
            if name != "num_warps":
                yield from (config | {name: value, "num_warps": warps} for warps in steps["num_warps"])


def search(start: Config, measure: Measure) -> Config:
    """The result of steepest descent from `start`. Raises `ValueError` if `start` is unusable."""
    best, shortest = start, measure(start)
    if shortest is None:
        raise ValueError(f"the configuration to start from can't be used: {start}")
    tried = [start]
    while True:
        candidates = [candidate for candidate in neighbours(best) if candidate not in tried]
        tried += candidates
        times = [(time, i) for i, candidate in enumerate(candidates) if (time := measure(candidate)) is not None]
        if not times or min(times)[0] >= GAIN * shortest:
            return best
        shortest, best = min(times)[0], candidates[min(times)[1]]


def tuned(op: str, entries: list[dict[str, Any]], timer: Callable[[Callable[[], Any]], float]) -> list[dict[str, Any]]:
    """The entries of an op with the fastest configurations on this GPU."""
    launcher, result = find_launcher(op), []
    for entry in entries:
        arguments = _draw_call(op, entry)

        def measure(config: Config, arguments: tuple[Any, ...] = arguments) -> float | None:
            with forced(op, config):
                try:
                    if any(kernel.n_spills > 0 for kernel in record_kernels(launcher, arguments)):
                        return None
                    return timer(lambda: launcher(*arguments))
                except (CompilationError, OutOfResources, PTXASError):
                    return None

        result.append({"shape": entry["shape"], "config": search(entry["config"], measure)})
    return result


def timed(op: str, entries: list[Any], timer: Callable[[Callable[[], Any]], float]) -> list[dict[str, float]]:
    """Microseconds of the GPU backends at the sizes of each entry."""
    result = []
    for entry in entries:
        arguments = _draw_call(op, entry)
        times = {}
        for backend in GPU_BACKENDS:
            if not backends.unsupported_reasons(op, backend, *arguments):
                with backends.use_backend(backend):
                    function = backends.select(op, arguments).function
                times[backend] = 1000 * timer(partial(function, *arguments))
        result.append(times)
    return result


def _draw_call(op: str, entry: dict[str, Any]) -> tuple[Any, ...]:
    dtype = {2: torch.bfloat16, 4: torch.float32}[entry["shape"].get("itemsize", 2)]
    return next(calls(op, entry["shape"], Draw("cuda", dtype)))


def order(times: Sequence[Mapping[str, float]]) -> list[str]:
    """The backends by the geometric mean of their times, over the sizes that all of them support."""
    compared = [entry for entry in times if len(entry) == max(map(len, times))]
    return sorted(compared[0], key=lambda backend: math.prod(entry[backend] for entry in compared))


def median_time(call: Callable[[], Any]) -> float:
    """Milliseconds on the GPU with a cold L2 cache."""
    time: float = do_bench(call, return_mode="median")
    return time


def record_kernels(
    launcher: Callable[..., Any], arguments: tuple[Any, ...], *, compile_only: bool = False
) -> list[Any]:
    """The compiled kernels of a call of the launcher, which only compiles them with `compile_only`."""
    kernels = []

    def recorded(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.append(run(self, *args, grid=grid, warmup=warmup or compile_only, **options))
        return kernels[-1]

    run, JITFunction.run = JITFunction.run, recorded
    try:
        launcher(*arguments)
    finally:
        JITFunction.run = run
    return kernels


def write(gpu: str, measured: Mapping[str, list[Any]], capability: int) -> Path:
    """Replaces the file of a GPU atomically: measured lists of entries or backends, and the unchanged others."""
    path = gpu_file(gpu)
    lines = []
    for key, entries in (table(gpu, capability) | dict(measured)).items():
        lines.append(f'  "{key}": [\n' + ",\n".join(f"    {json.dumps(entry)}" for entry in entries) + "\n  ]")
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    draft.replace(path)
    clear_caches()
    return path
