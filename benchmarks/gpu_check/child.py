"""The processes below the supervisor: one plans, and each of the others runs one unit.

    python -m benchmarks.gpu_check.child plan SETTINGS STAGE...      prints the machine and the units as JSON
    python -m benchmarks.gpu_check.child run SETTINGS UNIT JOURNAL   waits for a deadline on stdin, then begins

The GPU is touched and the kernels are loaded in these alone: whatever becomes of them, the supervisor lives on.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from benchmarks.gpu_check.records import Journal, JournalFull
from benchmarks.gpu_check.stage import Session, Settings, Unit

DISK_FULL, UNFINISHED = 74, 3
"""Exit statuses of `run`: the journal can't grow; the unit's time was over before its cases were."""
_REHEARSED = 90
"""The compute capability of which kernels are interpreted."""


def plan(settings: Settings, stages: Sequence[str]) -> dict[str, Any]:
    """The machine, the units, each stage's share of the budget, and the stages that can't be planned, with the reason.

    Args:
        settings: of the run.
        stages: their names; by default all that have a share.
    """
    from benchmarks.gpu_check.machine import describe

    found: dict[str, Any] = {"machine": describe(settings), "units": [], "shares": {}, "errors": {}}
    for name in stages or stage_names(settings):
        try:
            module = import_module(f"{settings.package}.{name}")
            if module.SECONDS or stages:
                found["shares"][name] = module.SECONDS
                found["units"] += [asdict(unit) for unit in module.units(settings)]
        except Exception as exc:
            found["errors"][name] = f"{type(exc).__name__}: {exc}"
    return found


def stage_names(settings: Settings) -> list[str]:
    """All stages that there are."""
    return [module.name for module in iter_modules(import_module(settings.package).__path__)]


def run(settings: Settings, unit: Unit, journal: Path) -> int:
    """Runs a unit, from the moment that its deadline comes; returns the exit status."""
    module = import_module(f"{settings.package}.{unit.stage}")
    deadline = sys.stdin.readline()
    if not deadline:
        return 0  # not needed after all
    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    try:
        session = Session(unit, settings, Journal(journal), float(deadline))
        session.start()
        module.run(unit, session)
    except JournalFull as exc:
        print(exc, file=sys.stderr)
        return DISK_FULL
    return 0 if session.complete else UNFINISHED


def _end_with_supervisor() -> None:
    """Nobody is left who would kill this process, should it hang on the GPU."""
    sys.stdin.read()
    os.killpg(0, signal.SIGKILL)


def main(argv: Sequence[str]) -> int:
    settings = Settings.from_json(argv[1])
    with _kernels_of(settings):
        if argv[0] == "plan":
            print(json.dumps(plan(settings, argv[2:])))
            return 0
        return run(settings, Unit(**json.loads(argv[2])), Path(argv[3]))


@contextmanager
def _kernels_of(settings: Settings) -> Iterator[None]:
    """In a rehearsal ptx_interpreter runs what nvcc and Triton made of the kernels, on CPU tensors, within the block.

    nvcc's are in the library of `tests/cuda/ptx.cmake`.
    """
    if not settings.rehearsal or settings.package != Settings.package:  # others' stages have no kernels
        yield
        return
    import evakernels.triton
    from evakernels import _native
    from ptx_interpreter.runtime import Launches
    from ptx_interpreter.triton_driver import Driver

    evakernels.triton.interpret()
    with ExitStack() as stack:
        stack.enter_context(Driver(_REHEARSED, count=False))
        if _native.runs_gpu_kernels("cpu"):
            library = Path(evakernels.__file__).with_name("_ops.so")
            stack.enter_context(Launches(library, _REHEARSED, count=False))
        yield


if __name__ == "__main__":
    sys.stdout.flush()
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # a context that hangs in its own end has cost whole runs
