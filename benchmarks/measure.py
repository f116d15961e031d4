"""Measures cases, each an operation on a shape in a dtype and mode, with all candidates side by side.

Many cases are run in several passes, so that a disturbance of minutes falls on all of them alike.
"""

import math
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from benchmarks import accuracy
from benchmarks import machine as machines
from benchmarks.candidates import Candidate, candidates, check_names
from benchmarks.operation import Cost, Draw, Function, Inputs, Operation, peers_of
from benchmarks.results import WRONG, Machine, Results, Row
from benchmarks.shapes import Shape
from benchmarks.timing import CudaTimer, Rotation, Timer, spinning
from evaclip.errors import UserError
from evakernels import keep_freed_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
Progress = Callable[[int, int, str], None]
"""Receives the measurements that are done, their total, and the title of the next one."""

_MAX_SETS = 64
_JUDGED_SEED = -1
"""Seed of the inputs of the error; a candidate might cache the results of its first call."""
_JUDGED = {"forward": "outputs", "training": "gradients"}
"""The tensors that have the errors of a mode."""

# The profiler otherwise announces its start and stop on stderr, once for every row.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


@dataclass
class Case:
    """An operation on a shape, in one dtype and mode, on one device.

    It keeps its rows and the built functions, so that it can be measured again in later passes over the suite.
    """

    op: Operation
    shape: Shape
    mode: str
    dtype: torch.dtype
    device: torch.device
    rows: dict[str, Row] = field(default_factory=dict)
    functions: dict[str, Function] = field(default_factory=dict)

    @property
    def dtype_name(self) -> str:
        """`float32`, not `torch.float32`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def title(self) -> str:
        """One line that names it."""
        return f"{self.op.name}, {self.mode}, {self.shape.name}, {self.dtype_name}"

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        """Identifies the case; see `Row.case`."""
        return (self.op.name, self.mode, self.shape.name, self.dtype_name, self.device.type)

    def draw(self, seed: int = 0) -> Inputs:
        """A set of inputs: the same for the same seed."""
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(f"{self.title} {seed}".encode()))
        inputs = self.op.inputs(self.shape, Draw(self.dtype, self.device, generator))
        if self.mode == "training":
            for leaf in accuracy.gradient_leaves(self.op, inputs):
                leaf.requires_grad_()
        return inputs


def measure(case: Case, contestants: Sequence[Candidate], machine: Machine, timer: Timer, seconds: float) -> None:
    """One pass: measures every candidate of the case, interleaved, and adds to its rows.

    The first pass also builds the candidates and takes first calls, memory and errors. A candidate that fails, or has a
    wrong result, gets the reason as its row, is not timed and takes no part in later passes.
    """
    one_pass = max((len(row.samples_ms) for row in case.rows.values()), default=0)
    try:
        if not case.rows:
            case.rows = {candidate.name: _empty_row(case, candidate, machine) for candidate in contestants}
            judge = _appoint_judge(case)
            for candidate in contestants:
                _guard(case, candidate, partial(_measure_once, case, candidate, timer, judge))
        _time(case, contestants, machine, timer, seconds, first_seed=one_pass * _MAX_SETS)
    except Exception as exc:  # of the inputs, the truth or the timer, which all share
        if not case.rows:  # the formula of the cost fails
            raise
        for candidate in contestants:
            if case.rows[candidate.name].failure is None:
                _fail(case, candidate, exc)


def _time(
    case: Case, contestants: Sequence[Candidate], machine: Machine, timer: Timer, seconds: float, first_seed: int
) -> None:
    sets = _draw_sets(case, machine, first_seed)
    ready = []
    for candidate in contestants:
        if case.rows[candidate.name].failure is None:
            rotation = Rotation([make_call(case, candidate, inputs) for inputs in sets], candidate.context)
            if _guard(case, candidate, partial(_call_each, rotation)):
                ready.append((candidate, rotation))
    with spinning() if machine.busy else nullcontext():
        samples = timer.rounds([rotation for _, rotation in ready], seconds)
    for (candidate, _), values in zip(ready, samples, strict=True):
        case.rows[candidate.name].samples_ms.append(values)
    for index, reason in timer.launched.items():
        machine.notes.append(f"{case.title}: {ready[index][0].name} is timed with its launches ({reason})")


def _draw_sets(case: Case, machine: Machine, first_seed: int) -> list[Inputs]:
    """Sets of inputs that are together twice as large as the cache."""
    first = case.draw(first_seed)
    size = sum(tensor.nbytes for value in first.values() for tensor in accuracy.tensors(value))
    count = min(_MAX_SETS, -(-2 * machine.cache_bytes // max(size, 1)))
    return [first, *(case.draw(first_seed + index) for index in range(1, count))]


def _call_each(rotation: Rotation) -> None:
    with rotation.context():
        for call in rotation.calls:
            call()


@dataclass(frozen=True)
class _Judge:
    """The standard for the results of a case.

    Attributes:
        truth: outputs, and in training gradients, in float64, by the mode of their error; empty where memory doesn't
            hold them: errors are then unknown.
        forms: of the outputs of plain PyTorch; None where it failed.
        errors: errors of plain PyTorch, by mode.
    """

    truth: dict[str, list[Tensor]]
    forms: list[accuracy.Form] | None = None
    errors: dict[str, float] = field(default_factory=dict)


def _appoint_judge(case: Case) -> _Judge:
    try:
        truth = dict(_results(case, case.op.eager, accuracy.as_double(case.draw(_JUDGED_SEED))))
    except torch.OutOfMemoryError:
        truth = {}
    try:
        found = dict(_results(case, case.op.eager, case.draw(_JUDGED_SEED)))
    except Exception:  # its row gets the reason
        return _Judge(truth)
    errors = {mode: accuracy.relative_error(values, truth[mode]) for mode, values in found.items() if mode in truth}
    return _Judge(truth, accuracy.forms(found["forward"]), errors)


def _measure_once(case: Case, candidate: Candidate, timer: Timer, judge: _Judge) -> None:
    row = case.rows[candidate.name]
    function = case.functions[candidate.name] = candidate.build(case.shape)
    with candidate.context():
        seconds = timer.first_call(make_call(case, candidate, case.draw()))
        for mode, values in _results(case, function, case.draw(_JUDGED_SEED)):
            _check(row, mode, values, judge)
        call = make_call(case, candidate, case.draw())
        call()  # the first call also draws the gradients of the outputs
        row.peak_bytes = peak_bytes(call, case.device)
        if case.mode == "training":
            row.saved_bytes = saved_bytes(partial(function, **case.draw()), case.device)
    row.first_call_ms = 1e3 * seconds


def _check(row: Row, mode: str, values: list[Tensor], judge: _Judge) -> None:
    """Take the error; raise `WrongResultError` for a wrong result."""
    if mode == "forward" and judge.forms is not None:
        accuracy.check_forms(accuracy.forms(values), judge.forms)
    if mode not in judge.truth:
        return
    error, baseline = accuracy.relative_error(values, judge.truth[mode]), judge.errors.get(mode)
    if mode == row.mode:
        row.error, row.baseline_error = error, baseline
    least = accuracy.luck(values, getattr(torch, row.dtype))
    allowed, tensors = accuracy.allowed_error(row.kind, mode, baseline, least), _JUDGED[mode]
    if math.isnan(error):
        raise accuracy.WrongResultError(f"NaN among the {tensors}")
    if error > allowed:
        raise accuracy.WrongResultError(f"the {tensors} have an error of {error:.1e}, at most {allowed:.1e} is right")


def _empty_row(case: Case, candidate: Candidate, machine: Machine) -> Row:
    work = case.op.work(case.shape, case.dtype.itemsize)
    passes = [work.forward] + ([work.backward] if case.mode == "training" and work.backward else [])
    return Row(
        *case.key,
        candidate.name,
        candidate.kind,
        candidate.version,
        sizes={"batch": case.shape.batch, "tokens": case.shape.tokens},
        flops=sum(cost.flops for cost in passes),
        bytes=sum(cost.bytes for cost in passes),
        floor_ms=sum(floor_ms(cost, case.dtype_name, machine) for cost in passes),
    )


def floor_ms(cost: Cost, dtype: str, machine: Machine) -> float:
    """The roofline: the longer of moving the bytes at the copy rate and multiplying at the matmul rate."""
    moving = cost.bytes / (machine.copy_gbps * 1e9)
    multiplying = cost.flops / (machine.matmul_tflops[dtype] * 1e12)
    return 1e3 * max(moving, multiplying)


def make_call(case: Case, candidate: Candidate, inputs: Inputs) -> Callable[[], object]:
    """One call of a candidate that was built, on a set of inputs; to be made in the candidate's context."""
    function = case.functions[candidate.name]
    if case.mode == "forward":

        def forward() -> object:
            with torch.no_grad():
                return function(**inputs)

        return forward
    leaves = accuracy.gradient_leaves(case.op, inputs)
    upstream: list[Tensor] = []

    def training() -> object:
        outputs = accuracy.tensors(function(**inputs))
        if not upstream:
            upstream.extend(_draw_upstream(case, outputs))
        return torch.autograd.grad(outputs, leaves, upstream)

    return training


def _draw_upstream(case: Case, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of the outputs."""
    generator = torch.Generator(case.device).manual_seed(1)
    drawn = (torch.randn(output.shape, generator=generator, device=case.device) for output in outputs)
    # Rounded to the dtype first, so that float64 gets the very same gradients.
    return [values.to(case.dtype).to(output.dtype) for values, output in zip(drawn, outputs, strict=True)]


def _results(case: Case, function: Function, inputs: Inputs) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield the outputs, and in training the gradients, each with the mode of their error."""
    if case.mode == "forward":
        yield "forward", accuracy.forward_outputs(function, inputs)
        return
    outputs = accuracy.tensors(function(**inputs))
    yield "forward", [output.detach() for output in outputs]
    leaves = accuracy.gradient_leaves(case.op, inputs)
    yield "training", list(torch.autograd.grad(outputs, leaves, _draw_upstream(case, outputs)))


def _guard(case: Case, candidate: Candidate, action: Callable[[], Any]) -> bool:
    """Runs `action` and returns whether it succeeded; an error becomes the failure of the candidate's row."""
    try:
        action()
    except Exception as exc:
        _fail(case, candidate, exc)
        return False
    return True


def _fail(case: Case, candidate: Candidate, exc: Exception) -> None:
    prefix = WRONG if isinstance(exc, accuracy.WrongResultError) else f"{type(exc).__name__}: "
    case.rows[candidate.name].failure = f"{prefix}{' '.join(str(exc).split())}"[:300]


# --- memory ---------------------------------------------------------------------------------------------------------


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a call held at once beyond the memory before it, outputs included.

    On a GPU the allocator counts them. On a CPU the profiler's record of every allocation is added up.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    held = peak = 0
    for change in _allocations(call):
        held += change
        peak = max(peak, held)
    return peak


def saved_bytes(forward: Callable[[], object], device: torch.device) -> int:
    """The bytes saved for backward: memory that only autograd's graph holds after `forward`, without inputs.

    Allocations are counted, not saved tensors: a recomputation policy may save tensors elsewhere.
    """

    def graph() -> list[object]:
        return [output.grad_fn for output in accuracy.tensors(forward())]

    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        held = graph()
        after = torch.cuda.memory_allocated(device)
        del held
        return int(after - before)
    return sum(_allocations(graph))


def _allocations(call: Callable[[], object]) -> list[int]:
    """Bytes allocated, and freed as negative numbers, on the CPU until the end of `call`, in order."""
    # torch.profiler, which wraps this one, imports torch's compiler.
    with profile(profile_memory=True, acc_events=True) as profiler:
        result = call()
    del result
    events: Any = profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return [int(change) for _, change in changes]


# --- many cases in several passes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Cases and candidates to measure, and the time to spend.

    Attributes:
        device: `cpu` or `cuda`.
        shapes: names of shapes; by default those of each operation.
        first: number of an operation's default shapes to measure; 0 for all.
        dtypes, modes, backends, peers: by default all that make sense on the device.
        passes: passes over the whole suite.
        seconds: time for each candidate in each pass.
        busy: a process spins on each core while candidates are timed.
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
    busy: bool = False


def run(operations: Sequence[Operation], plan: Plan, progress: Progress = lambda done, total, title: None) -> Results:
    """Measures the operations by the plan; the machine's ceilings before and after.

    Ctrl-C ends it with the results so far.

    Raises:
        UserError: a shape, dtype, backend or peer is unknown, or the device isn't there.
    """
    check_names(operations, plan.device, plan.backends, plan.peers)
    if plan.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU here: torch.cuda.is_available() is False; --device cpu measures the processor")
    device = torch.device(plan.device)
    keep_freed_memory()
    timer = CudaTimer(device) if plan.device == "cuda" else Timer()
    cases = list_cases(operations, plan)
    packages = {peer.package for op in operations for peer in peers_of(op.name) if peer.package}
    machine = machines.describe(device, dict.fromkeys(case.dtype for case in cases), packages)
    machine.busy = plan.busy
    watch = machines.Watch(machine, device)
    contestants = {op.name: candidates(op, plan.device, plan.backends, plan.peers) for op in operations}
    total, done, interrupted = len(cases) * plan.passes, 0, False
    try:
        for done in range(total):
            case = cases[done % len(cases)]
            progress(done, total, case.title)
            measure(case, contestants[case.op.name][0], machine, timer, plan.seconds)
        progress(total, total, "")
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
    """The cases of a plan, in order; a case that is named twice is measured once."""
    cases = (
        Case(op, shape, mode, DTYPES[dtype], torch.device(plan.device))
        for op in operations
        for shape in map(op.shape, plan.shapes or _default_shapes(op, plan))
        for dtype in plan.dtypes or op.dtypes or DEFAULT_DTYPES[plan.device]
        for mode in op.modes
        if not plan.modes or mode in plan.modes
    )
    return list({case.key: case for case in cases}.values())


def _default_shapes(op: Operation, plan: Plan) -> Sequence[str]:
    if plan.device not in op.shapes:
        raise UserError(f"{op.name} has no shapes for {plan.device}; expected --shape NAME")
    return op.shapes[plan.device][: plan.first or None]
