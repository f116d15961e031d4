"""Measures cases, each an operation on a shape in a dtype and mode, with all candidates side by side.

Many cases are run in several passes, so that a disturbance of minutes falls on all of them alike.
"""

import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks import accuracy, memory
from benchmarks import machine as machines
from benchmarks.candidates import Candidate, candidates, check_names
from benchmarks.operation import Cost, Draw, Function, Inputs, Operation, peers_of
from benchmarks.results import WRONG, Machine, Results, Row
from benchmarks.shapes import Shape
from benchmarks.timing import Rotation, Timer
from evaclip.errors import UserError
from evakernels import keep_freed_memory

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEFAULT_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16",)}
Progress = Callable[[int, int, str], None]
"""Receives the measurements that are done, their total, and the title of the next one."""

_MAX_SETS = 64
_JUDGED_SEED = -1
"""Seed of the inputs that results are judged on; a candidate might cache those of its first call."""
_JUDGED = {"forward": "outputs", "training": "gradients"}
"""The tensors that have the errors of a mode."""


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
    def title(self) -> str:
        """One line that names it."""
        return f"{self.op.name}, {self.mode}, {self.shape.name}, {_name(self.dtype)}"

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies the case; see `Row.case`."""
        return (self.op.name, self.mode, self.shape.name, _name(self.dtype), self.device.type)

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

    The first pass also builds the candidates and takes first calls, memory and errors. A candidate that fails, or whose
    result is wrong, gets the reason as its row, is not timed and takes no part in later passes.
    """
    one_pass = max((len(row.samples_ms) for row in case.rows.values()), default=0)
    try:
        if not case.rows:
            _prepare(case, contestants, machine, timer)
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
    alive = [candidate for candidate in contestants if case.rows[candidate.name].failure is None]
    sets = _draw_sets(case, machine, first_seed)
    ready = []
    for candidate in alive:
        rotation = Rotation([make_call(case, candidate, inputs) for inputs in sets], candidate.context)
        if _guarded(case, candidate, partial(_touch, rotation)):
            ready.append((candidate, rotation))
    samples = timer.rounds([rotation for _, rotation in ready], seconds)
    for (candidate, _), values in zip(ready, samples, strict=True):
        case.rows[candidate.name].samples_ms.append(values)
    for index, reason in timer.launched.items():
        machine.notes.append(f"{case.title}: {ready[index][0].name} is timed with its launches ({reason})")


@dataclass(frozen=True)
class _Judge:
    """The standard by which results of a case are judged.

    Attributes:
        truth: outputs, and in training gradients, in float64, by the mode whose errors they tell; none where memory
            doesn't hold them: errors are then unknown.
        forms: of the outputs of plain PyTorch; None where it failed.
        errors: those of plain PyTorch.
    """

    truth: dict[str, list[Tensor]]
    forms: list[accuracy.Form] | None = None
    errors: dict[str, float] = field(default_factory=dict)


def _prepare(case: Case, contestants: Sequence[Candidate], machine: Machine, timer: Timer) -> None:
    case.rows = {candidate.name: _empty_row(case, candidate, machine) for candidate in contestants}
    judge = _appoint(case)
    for candidate in contestants:
        _guarded(case, candidate, partial(_first, case, candidate, timer, judge))


def _appoint(case: Case) -> _Judge:
    try:
        truth = dict(_results(case, case.op.eager, accuracy.as_double(case.draw(_JUDGED_SEED))))
    except torch.OutOfMemoryError:
        truth = {}
    try:
        (_, outputs), *gradients = _results(case, case.op.eager, case.draw(_JUDGED_SEED))
    except Exception:  # its own row will tell
        return _Judge(truth)
    found = dict([("forward", outputs), *gradients])
    errors = {mode: accuracy.relative_error(values, truth[mode]) for mode, values in found.items() if mode in truth}
    return _Judge(truth, accuracy.forms(outputs), errors)


def _first(case: Case, candidate: Candidate, timer: Timer, judge: _Judge) -> None:
    row = case.rows[candidate.name]
    function = case.functions[candidate.name] = candidate.build(case.shape)
    with candidate.context():
        seconds = timer.first_call(make_call(case, candidate, case.draw()))
        _check(row, _results(case, function, case.draw(_JUDGED_SEED)), judge)
        _take_memory(case, candidate, row)
    row.first_call_ms = 1e3 * seconds


def _check(row: Row, found: Iterable[tuple[str, list[Tensor]]], judge: _Judge) -> None:
    """Take the errors; raise `WrongResultError` for a wrong result."""
    for mode, values in found:
        if mode == "forward" and judge.forms is not None:
            accuracy.check_forms(accuracy.forms(values), judge.forms)
        if mode not in judge.truth:
            continue
        error, baseline = accuracy.relative_error(values, judge.truth[mode]), judge.errors.get(mode)
        if mode == row.mode:
            row.error, row.baseline_error = error, baseline
        least = accuracy.luck(values, getattr(torch, row.dtype))
        allowed, what = accuracy.allowed_error(row.kind, mode, baseline, least), _JUDGED[mode]
        if math.isnan(error):
            raise accuracy.WrongResultError(f"NaN among the {what}")
        if error > allowed:
            raise accuracy.WrongResultError(f"the {what} have an error of {error:.1e}, at most {allowed:.1e} is right")


def _empty_row(case: Case, candidate: Candidate, machine: Machine) -> Row:
    work = case.op.work(case.shape, case.dtype.itemsize)
    passes = [work.forward] + ([work.backward] if case.mode == "training" and work.backward else [])
    return Row(
        op=case.op.name,
        mode=case.mode,
        shape=case.shape.name,
        dtype=_name(case.dtype),
        device=case.device.type,
        candidate=candidate.name,
        kind=candidate.kind,
        version=candidate.version,
        sizes={"batch": case.shape.batch, "tokens": case.shape.tokens},
        flops=sum(cost.flops for cost in passes),
        bytes=sum(cost.bytes for cost in passes),
        floor_ms=sum(floor_ms(cost, _name(case.dtype), machine) for cost in passes),
    )


def floor_ms(cost: Cost, dtype: str, machine: Machine) -> float:
    """The roofline: the longer of moving the bytes at the copy rate and multiplying at the matrix rate."""
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
            upstream.extend(_upstream(case, outputs))
        return torch.autograd.grad(outputs, leaves, upstream)

    return training


def _upstream(case: Case, outputs: Sequence[Tensor]) -> list[Tensor]:
    generator = torch.Generator(case.device).manual_seed(1)
    drawn = (torch.randn(output.shape, generator=generator, device=case.device) for output in outputs)
    # Rounded to the dtype first, so that float64 gets the very same gradients.
    return [values.to(case.dtype).to(output.dtype) for values, output in zip(drawn, outputs, strict=True)]


def _results(case: Case, function: Function, inputs: Inputs) -> Iterator[tuple[str, list[Tensor]]]:
    """Yield the outputs, and in training the gradients, each with the mode that has their errors."""
    if case.mode == "forward":
        yield "forward", accuracy.forward_outputs(function, inputs)
        return
    outputs = accuracy.tensors(function(**inputs))
    yield "forward", [output.detach() for output in outputs]
    leaves = accuracy.gradient_leaves(case.op, inputs)
    yield "training", list(torch.autograd.grad(outputs, leaves, _upstream(case, outputs)))


def _take_memory(case: Case, candidate: Candidate, row: Row) -> None:
    call = make_call(case, candidate, case.draw())
    call()  # the first call also draws the gradients of the outputs
    row.peak_bytes = memory.peak_bytes(call, case.device)
    if case.mode == "training":
        row.saved_bytes = memory.saved_bytes(partial(case.functions[candidate.name], **case.draw()), case.device)


def _draw_sets(case: Case, machine: Machine, first_seed: int) -> list[Inputs]:
    """Sets of inputs that are together twice as large as the cache."""
    first = case.draw(first_seed)
    size = sum(tensor.nbytes for value in first.values() for tensor in accuracy.tensors(value))
    count = min(_MAX_SETS, -(-2 * machine.cache_bytes // max(size, 1)))
    return [first, *(case.draw(first_seed + index) for index in range(1, count))]


def _touch(rotation: Rotation) -> None:
    with rotation.context():
        for call in rotation.calls:
            call()


def _guarded(case: Case, candidate: Candidate, action: Callable[[], Any]) -> bool:
    """Runs `action`; a failure is written into the candidate's row. Tells whether it went well."""
    try:
        action()
    except Exception as exc:
        _fail(case, candidate, exc)
        return False
    return True


def _fail(case: Case, candidate: Candidate, exc: Exception) -> None:
    text = " ".join(str(exc).split())
    what = WRONG if isinstance(exc, accuracy.WrongResultError) else f"{type(exc).__name__}: "
    case.rows[candidate.name].failure = f"{what}{text}"[:300]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- many cases in several passes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Cases and candidates to measure, and the time to spend.

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

    Ctrl-C ends it with the results so far.

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
    """The cases of a plan, in order; a case that is named twice is measured once."""
    cases = (
        Case(op, shape, mode, DTYPES[dtype], torch.device(plan.device))
        for op in operations
        for shape in map(op.shape, plan.shapes or _default_shapes(op, plan))
        for dtype in plan.dtypes or DEFAULT_DTYPES[plan.device]
        for mode in op.modes
        if not plan.modes or mode in plan.modes
    )
    return list({case.key: case for case in cases}.values())


def _default_shapes(op: Operation, plan: Plan) -> Sequence[str]:
    if plan.device not in op.shapes:
        raise UserError(f"{op.name} has no shapes for {plan.device}; expected --shape NAME")
    return op.shapes[plan.device][: plan.first or None]


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
