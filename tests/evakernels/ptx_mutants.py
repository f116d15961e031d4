"""Mutants of nvcc's kernels (compute capability 8.0): the driver of tests/cuda must notice each changed instruction.

    python tests/evakernels/ptx_mutants.py

The driver's launches are recorded once, with the memory that they may access. A mutant is run on the recorded launches
that reach its instruction, the smallest first, until one reports a fault or writes other results.
"""

import ctypes
import gc
import hashlib
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parents[2]))

from op_suite import ROOT
from planted_faults import tags_in
from ptx_build import BUILD, budget, build_allocations

from ptx_interpreter import Faults, GlobalMemory, Kernel, Report, launch
from ptx_interpreter.memory import Interval, Shadow
from ptx_interpreter.mutants import Mutant, mutants_of, mutated, narrowest_access
from ptx_interpreter.runtime import Launches

MOST_LAUNCHES = 40
"""Launches on which a mutant is tried."""
LIST = ROOT / "tests/cuda/survivors.json"
"""By reason: kernel, kind, place and number of the mutants that nothing notices."""
ALL = 10_000
COMPLETE = {"barrier": ALL, "warp barrier": ALL, "wait": ALL}
SMALL = COMPLETE | {"factor": 8, "predicate": 24, "operands": 24, "address": 24}
LARGE = COMPLETE | {"factor": 40, "predicate": 150, "operands": 150, "address": 150}
"""Mutants that are tried, by kind."""

Memory = list[tuple[int, bytes]]
"""Contents by address."""


@dataclass
class Recorded:
    """A launch: its inputs, and memory before and after it."""

    kernel: Kernel
    sizes: tuple[Any, Any]
    params: bytes
    shared: int
    before: Memory
    after: Memory
    runs: Counter[int]
    work: int

    def difference(self, kernel: Kernel) -> str:
        """The fault that `kernel` has in place of the recorded one, "result" for other results, "" for none."""
        for address, data in self.before:
            ctypes.memmove(address, data, len(data))
        cell = narrowest_access(kernel.parsed)
        memory = GlobalMemory(
            intervals=[
                Interval(at, at + len(data), hex(at), shadow=Shadow.of(len(data), cell, written=True))
                for at, data in self.before
            ]
        )
        grid, block = self.sizes
        try:
            launch(kernel, grid, block, self.params, memory, self.shared, count=False, hasty=True)
        except Faults as error:
            return error.faults[0].kind
        except NotImplementedError:
            return "unsupported"
        return "" if all(ctypes.string_at(at, len(data)) == data for at, data in self.after) else "result"


class Recorder(Launches):
    """Records the launches that it runs. Needs ALLOCATIONS_STAY, which keeps freed memory."""

    def __init__(self, library: str) -> None:
        super().__init__(library, 80, count=False, watch=False)
        self.recorded: list[Recorded] = []
        self.reports: list[Report] = []
        self._known: dict[bytes, bytes] = {}

    def _launch(self, kernel: Kernel, sizes: tuple[Any, Any], params: bytes, shared: int) -> str:
        self._memory.refresh()
        before = self._contents()
        error = super()._launch(kernel, sizes, params, shared)
        (report,) = self.reports
        self.reports.clear()
        instructions = sum(len(block.instructions) for block in kernel.parsed.blocks if report.blocks[block.number])
        work = report.instructions // 1000 + instructions
        made = Recorded(kernel, sizes, params, shared, before, self._contents(), report.blocks, work)
        self.recorded.append(made)
        return error

    def _contents(self) -> Memory:
        pairs = [(at.start, ctypes.string_at(at.start, at.end - at.start)) for at in self._memory.intervals]
        return [(start, self._known.setdefault(data, data)) for start, data in pairs]


class Outcome(NamedTuple):
    """A mutant, and what noticed it: the kind of a fault, "result", or "" for nothing.

    `kernel` is the template's name; `place` is a tag of its source lines, else their file; `number` counts the mutants
    of the same kernel, kind and place.
    """

    kernel: str
    kind: str
    place: str
    number: int
    noticed: str = ""


@dataclass
class Trial:
    """One mutant in every instance of a template: the launches that reach it, the smallest first."""

    mutant: Outcome
    choices: list[tuple[Recorded, Mutant]]

    @property
    def key(self) -> str:
        """Sort key of the sample."""
        return hashlib.sha256(repr(self.mutant[:4]).encode()).hexdigest()

    def run(self) -> str:
        tried = (launch.difference(mutated(launch.kernel, mutant)) for launch, mutant in self.choices[:MOST_LAUNCHES])
        return next(filter(None, tried), "")


def trials_of(launches: Sequence[Recorded], kinds: Iterable[str]) -> list[Trial]:
    """All mutants of these kinds."""
    by_kernel: dict[str, list[Recorded]] = defaultdict(list)
    for recorded in sorted(launches, key=lambda each: each.work):
        by_kernel[recorded.kernel.name].append(recorded)
    trials: dict[Outcome, Trial] = {}
    for own, name in zip(by_kernel.values(), budget.readable(list(by_kernel)), strict=True):
        numbers: Counter[tuple[str, ...]] = Counter()
        for mutant in mutants_of(own[0].kernel.parsed):
            if mutant.kind in kinds:
                site = (name.partition("<")[0], mutant.kind, place_of(own[0].kernel, mutant))
                outcome = Outcome(*site, numbers[site])
                numbers[site] += 1
                trial = trials.setdefault(outcome, Trial(outcome, []))
                trial.choices += [(recorded, mutant) for recorded in own if recorded.runs[mutant.block]]
    for trial in trials.values():
        trial.choices.sort(key=lambda choice: choice[0].work)
    return [trials[key] for key in sorted(trials)]


def place_of(kernel: Kernel, mutant: Mutant) -> str:
    """The tag of the instruction's line in csrc/cuda or of a call that was inlined, else the file."""
    places = [
        (kernel.module.files.get(number, ""), line) for number, line in (mutant.changed.line, *mutant.changed.callers)
    ]
    own = [(file, line) for file, line in places if "csrc/cuda" in file]
    tags = (tags_of(file).get(line - 1) for file, line in own)
    return next(filter(None, tags), Path(own[0][0]).name if own else "")


@cache
def tags_of(file: str) -> dict[int, str]:
    return tags_in(Path(file).read_text().splitlines())


def chosen(trials: Iterable[Trial], kinds: Mapping[str, int]) -> list[Trial]:
    """A sample of each kind; all barriers and waits, also those that no launch reaches."""
    found = []
    for kind, count in kinds.items():
        own = [trial for trial in trials if trial.mutant.kind == kind and (trial.choices or kind in COMPLETE)]
        found += sorted(own, key=lambda trial: trial.key)[:count]
    return found


def record(library: str) -> list[Recorded]:
    """The driver's launches."""
    with Recorder(library) as recorder:
        name = library.encode()
        if ctypes.CDLL(library).main(1, (ctypes.c_char_p * 1)(name)):
            raise RuntimeError("the driver fails without a mutant")
    return recorder.recorded


def run(library: str, kinds: Mapping[str, int]) -> list[Outcome]:
    """Tries mutants of a driver's kernels."""
    trials = chosen(trials_of(record(library), kinds), kinds)
    for recorded in {id(trial.choices[0][0]): trial.choices[0][0] for trial in trials if trial.choices}.values():
        if difference := recorded.difference(recorded.kernel):
            raise RuntimeError(f"{recorded.kernel.name} without a change: {difference}")
    return [trial.mutant._replace(noticed=trial.run()) for trial in trials]


def outcomes_of(library: Path, kinds: Mapping[str, int]) -> list[Outcome]:
    """`run` in a process that tracks its allocations."""
    with TemporaryDirectory() as folder:
        build_allocations(Path(folder))
        out = Path(folder) / "outcomes.json"
        environment = {"LD_PRELOAD": f"{folder}/allocations.so", "ALLOCATIONS_STAY": "1", "PYTHONPATH": str(ROOT)}
        call = [sys.executable, __file__, "--run", str(library), str(out), json.dumps(kinds)]
        result = subprocess.run(call, env=os.environ | environment, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(result.stdout[-5000:] + result.stderr[-5000:])
        return [Outcome(*outcome) for outcome in json.loads(out.read_text())]


# --- survivors ---


def listed() -> dict[str, list[tuple[str, str, str, int]]]:
    """By reason: kernel, kind, place and number of the survivors."""
    return {
        reason: [(k, kind, place, n) for k, kind, place, n in rows]
        for reason, rows in json.loads(LIST.read_text()).items()
    }


def unexpected(outcomes: Iterable[Outcome]) -> list[tuple[object, ...]]:
    """Places with more survivors than the list explains, or with fewer where every mutant is tried."""
    allowed: Counter[tuple[str, ...]] = Counter()
    for rows in listed().values():
        for *place, number in rows:
            allowed[tuple(map(str, place))] += number
    found = Counter(outcome[:3] for outcome in outcomes if not outcome.noticed)
    return [
        (*place, f"{found[place]} survive, {allowed[place]} are listed")
        for place in sorted(allowed | found)
        if found[place] > allowed[place] or (place[1] in COMPLETE and found[place] < allowed[place])
    ]


def table(outcomes: Iterable[Outcome]) -> str:
    """Mutants by kind and by what noticed them."""
    columns = ("mutants", "fault", "result", "survives")
    counts = Counter(
        (o.kind, column)
        for o in outcomes
        for column in ("mutants", o.noticed if o.noticed == "result" else "fault" if o.noticed else "survives")
    )
    lines = [f"{'kind':14}" + "".join(f"{column:>9}" for column in columns)]
    kinds = dict.fromkeys(kind for kind, _ in counts)
    lines += [f"{kind:14}" + "".join(f"{counts[kind, column]:9}" for column in columns) for kind in kinds]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        gc.disable()
        Path(sys.argv[3]).write_text(json.dumps(run(sys.argv[2], json.loads(sys.argv[4]))))
    else:
        budget.build("ptx")
        found = outcomes_of(BUILD / "ptx/drive.so", LARGE)
        print(table(found), *unexpected(found), sep="\n")
