"""What everything costs: ours in CUDA and Triton beside the references, plain PyTorch, its compiler, and the peers.

Ops come first, each shape of bfloat16; a unit is given a few seconds at a time, so that the first shapes of all ops are
measured before the last of any. Then whole steps, other people's models, and what is slow to compile.
"""

import importlib
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks import machine as machines
from benchmarks.audit.prediction import prediction
from benchmarks.candidates import Candidate, candidates
from benchmarks.gpu_check import steps
from benchmarks.gpu_check.stage import Failure, Refusal, Session, Settings, Unit
from benchmarks.gpu_state import notes as gpu_notes
from benchmarks.gpu_state import read_state
from benchmarks.measure import Case, measure
from benchmarks.operation import Operation, get_operation, operations, suite_operations
from benchmarks.results import Machine, Row
from benchmarks.suite import DTYPES, timer_for
from evaclip.machine import version_of

SECONDS = 280
_MACHINE = ("machine", "ceilings")
_LARGE_LOSSES = ("eva02-b16@224 b32768", "eva02-bige14@224 b131072")
_LOSSES = ("clip_loss", "siglip_loss")
_SLOW_PEERS = ("torch.compile", "FlexAttention")
"""They compile anew for each shape."""
_SHORT_SHAPES = 2
"""Of dtypes after the first."""
_TINY = dict.fromkeys(("channels", "head_dim", "hidden", "width"), 64)
_TINY |= {"batch": 2, "captions": 2, "patches": 8, "kept": 4, "heads": 1}
_REHEARSED = ("layer_norm", "rope_attention", "clip_loss", "lamb_step")


def units(settings: Settings) -> list[Unit]:
    """Named `WHAT: OPERATION`, with what else there is to know behind it."""
    importlib.import_module("benchmarks.cases")
    first, *others = settings.dtypes
    models = [op.name for op in operations().values() if op.baseline.package != "torch" and not op.by_request]
    ops = [op.name for op in suite_operations() if op.name not in models]
    if settings.rehearsal:
        others, models, ops = [], [], [name for name in ops if name in _REHEARSED]
    unit = partial(Unit, "timing", limit=120)
    found = [unit(_MACHINE[0], value=69)]
    found += [unit(f"op: {op}: {first}", seconds=12, value=60) for op in ops]
    found += [unit(f"step: {steps.name_of(*step)}", seconds=30, value=58) for step in _steps(settings)]
    if settings.rehearsal:
        return found
    dropin = get_operation("dropin")
    found += [unit(f"dropin: {shape}: {first}", seconds=20, value=56) for shape in dropin.shapes["cuda"]]
    found += [unit(f"large: {op}: {first}", seconds=20, value=54) for op in _LOSSES]
    found += [unit(f"op: {op}: {first}", seconds=30, value=50) for op in models]
    found += [unit(f"compiled: {op}: {first}", seconds=45, value=48) for op in ops]
    found += [unit(f"op: {op}: {dtype}", seconds=12, value=44) for dtype in others for op in ops]
    found += [unit(f"compiled dropin: {shape}: {first}", limit=300, value=40) for shape in dropin.shapes["cuda"]]
    return found


def _steps(settings: Settings) -> Sequence[tuple[str, int, float]]:
    return steps.REHEARSED if settings.rehearsal else steps.STEPS


def run(unit: Unit, session: Session) -> None:
    settings = session.settings
    if unit.name == _MACHINE[0]:
        session.case(_MACHINE[1], partial(_describe, settings))
        return
    what, name, *rest = unit.name.split(": ")
    if what == "step":
        chosen = {steps.name_of(*step): step for step in _steps(settings)}[name]
        session.case(name, partial(steps.measure, *chosen, settings))
        return
    importlib.import_module("benchmarks.cases")
    machine = Machine(**(session.earlier("timing", *_MACHINE) or _describe(settings)))
    op = get_operation("dropin" if "dropin" in what else name)
    shapes = (name,) if "dropin" in what else _shapes(op, what, rest[0], settings)
    for shape in shapes:
        for mode in op.modes:
            case = Case(op, op.shape(shape), mode, DTYPES[rest[0]], torch.device(settings.device))
            slow = what.startswith("compiled")
            session.case(case.title, partial(rows_of, case, machine, settings, slow=slow))


def _describe(settings: Settings) -> dict[str, Any]:
    dtypes = [DTYPES[name] for name in settings.dtypes]
    return asdict(machines.describe(torch.device(settings.device), dtypes, ("timm", "transformers", "open_clip_torch")))


def _shapes(op: Operation, what: str, dtype: str, settings: Settings) -> Sequence[str]:
    if settings.rehearsal:
        sizes = [_TINY.get(size, 4) for size in op.raw_sizes]
        return ("x".join(map(str, sizes)),)
    if what == "large":
        return _LARGE_LOSSES
    shapes = [shape for shape in op.shapes["cuda"] if op.name not in _LOSSES or shape not in _LARGE_LOSSES]
    if what == "compiled":
        return shapes[:1]
    return shapes if dtype == settings.dtypes[0] else shapes[:_SHORT_SHAPES]


def rows_of(case: Case, machine: Machine, settings: Settings, *, slow: bool) -> dict[str, Any]:
    """The rows of one case.

    Args:
        slow: measures those who compile for each shape, and nobody else.

    Raises:
        Failure: one of ours is wrong or fails; or plain PyTorch does, so that nothing is known of the others.
        Refusal: plain PyTorch's model isn't installed.
    """
    package = _package_of(case)
    if version_of(package) is None:
        raise Refusal(f"{package}, the baseline, isn't installed")
    contestants, absent = _contestants(case, slow)
    device, former = case.device, list(machine.notes)
    before = read_state(device)
    measure(case, contestants, machine, timer_for(device), 0.001 if settings.rehearsal else 0.15)
    after = read_state(device)
    rows = list(case.rows.values())
    data = {
        "rows": [asdict(row) for row in rows],
        "absent": {f"{case.op.name}: {name}": why for name, why in absent.items()},
        "notes": [note for note in machine.notes if note not in former] + gpu_notes(before, after) + _unchecked(case),
        "clocks": after.clocks if after else {},
        "predicted": prediction(settings.bundle, case),
    }
    if failures := [f"{row.candidate}: {row.failure}" for row in rows if _is_failure(row)]:
        raise Failure("; ".join(failures), data)
    return data


def _package_of(case: Case) -> str:
    """The distribution that the baseline comes from."""
    library, _, model = case.shape.name.partition("/")
    if not model:
        return case.op.baseline.package
    return "open_clip_torch" if library == "open_clip" else library


def _contestants(case: Case, slow: bool) -> tuple[list[Candidate], dict[str, str]]:
    whole = case.op.name == "dropin"
    found, absent = candidates(case.op, case.device.type, (case.device.type,) if whole else ())
    return [one for one in found if (one.name in _SLOW_PEERS) == slow], absent


def _unchecked(case: Case) -> list[str]:
    names = [row.candidate for row in case.rows.values() if row.kind == "ours" and row.error is None]
    return [f"{case.title}: no error is known of {', '.join(names)}"] if names else []


def _is_failure(row: Row) -> bool:
    """Whether a row's failure is one of this library's; who needs more memory than there is has lost, no more."""
    if row.failure is None or row.kind == "peer":
        return False
    return row.kind == "ours" and not (row.candidate.endswith("reference") and "OutOfMemory" in row.failure)
