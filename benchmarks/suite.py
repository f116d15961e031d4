"""Runs many cases in several passes, so that a disturbance of minutes falls on all of them alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from benchmarks import machine as machines
from benchmarks.candidates import candidates, check_names
from benchmarks.measure import Case, measure
from benchmarks.operation import Operation, peers_of
from benchmarks.results import Results
from benchmarks.timing import Timer
from evaclip.errors import UserError
from evakernels import keep_freed_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
Progress = Callable[[int, int, str], None]
"""Is told how many measurements are done, how many there are, and which comes next."""


@dataclass(frozen=True)
class Plan:
    """What to measure and how long.

    Attributes:
        device: `cpu` or `cuda`.
        shapes: names of shapes; by default those of each operation.
        first: so many of an operation's own shapes; 0 is all of them.
        dtypes, modes, backends, peers: by default all that make sense on the device.
        passes: how often the whole suite is gone through.
        seconds: time for each candidate in each pass.
    """

    device: str = "cpu"
    shapes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    backends: tuple[str, ...] = ()
    peers: tuple[str, ...] = ()
    passes: int = 3
    seconds: float = 0.15
    first: int = 0


def run(operations: Sequence[Operation], plan: Plan, progress: Progress = lambda done, total, title: None) -> Results:
    """Measures the operations by the plan; the machine's ceilings before and after.

    Ctrl-C ends it with what was measured until then.

    Raises:
        UserError: a shape, dtype, backend or peer is unknown, or the device isn't there.
    """
    check_names(operations, plan.device, plan.backends, plan.peers)
    device = device_of(plan.device)
    keep_freed_memory()
    timer = timer_for(device)
    cases = list_cases(operations, plan)
    packages = {peer.package for op in operations for peer in peers_of(op.name) if peer.package}
    machine = machines.describe(device, dict.fromkeys(case.dtype for case in cases), packages)
    watch = machines.Watch(machine, device)
    contestants = {op.name: candidates(op, plan.device, plan.backends, plan.peers) for op in operations}
    total, done = len(cases) * plan.passes, 0
    try:
        for done in range(total):
            case = cases[done % len(cases)]
            progress(done, total, case.title)
            measure(case, contestants[case.op.name][0], machine, timer, plan.seconds)
        progress(total, total, "")
        interrupted = False
    except KeyboardInterrupt:
        if not done:
            raise
        machine.notes.append(f"interrupted: {done} of {total} measurements were made")
        interrupted = True
    machine.notes += watch.notes()
    absent = {f"{op}: {name}": why for op, (_, missing) in contestants.items() for name, why in missing.items()}
    rows = [row for case in cases for row in case.rows.values() if row.samples_ms or row.failure]
    return Results(machine, rows, absent, interrupted)


def list_cases(operations: Sequence[Operation], plan: Plan) -> list[Case]:
    """The cases of a plan, in order; what is named twice is measured once."""
    cases = (
        Case(op, shape, mode, DTYPES[dtype], torch.device(plan.device))
        for op in operations
        for shape in map(op.shape, plan.shapes or op.shapes[plan.device][: plan.first or None])
        for dtype in plan.dtypes or DEFAULT_DTYPES[plan.device]
        for mode in op.modes
        if not plan.modes or mode in plan.modes
    )
    return list({case.key: case for case in cases}.values())


def device_of(name: str) -> torch.device:
    """The device of a type. Raises `UserError` where there is no GPU."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU here: torch.cuda.is_available() is False; --device cpu measures the processor")
    return torch.device(name)


def timer_for(device: torch.device) -> Timer:
    if device.type == "cuda":
        from benchmarks.timing_cuda import CudaTimer

        return CudaTimer(device)
    return Timer()
