"""Mutants of nvcc's kernels (compute capability 8.0): which of them the driver program of tests/cuda would not notice.

    python tests/evakernels/ptx_mutants.py [--write] [KIND=COUNT ...]

The program's launches are recorded once, with the memory that they may touch. A mutant is run on the recorded launches
that reach its instruction, the smallest first, until one has a fault or other results.
"""

import argparse
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
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).parents[2]))

from op_suite import ROOT
from ptx_build import BUILD, budget, build_allocations

from ptx_interpreter import Faults, GlobalMemory, Kernel, Report, launch
from ptx_interpreter.memory import Interval, Shadow
from ptx_interpreter.mutants import KINDS, Mutant, mutants_of, mutated, narrowest_access
from ptx_interpreter.runtime import Launches

MOST_LAUNCHES = 40
"""That a mutant survives at most before it is taken to survive all."""
SHORT = 30
"""Characters of a line that doesn't tell where it is."""
LIST = ROOT / "tests/cuda/survivors.json"
BY_CHANCE = "By chance: "
"""So begins the reason why some runs notice a mutant and others don't."""
ALL = 10_000
COMPLETE = {"barrier": ALL, "warp barrier": ALL, "wait": ALL}
SMALL = COMPLETE | {"factor": 8, "predicate": 24, "operands": 24, "address": 24}
LARGE = COMPLETE | {"factor": 40, "predicate": 150, "operands": 150, "address": 150}
"""How many of a kind are tried."""

Memory = list[tuple[int, bytes]]
"""What lies at which address."""


@dataclass
class Recorded:
    """A launch: everything that it depends on, and what memory held when it had ended."""

    kernel: Kernel
    sizes: tuple[Any, Any]
    params: bytes
    shared: int
    before: Memory
    after: Memory
    runs: Counter[int]
    work: int

    def said_of(self, kernel: Kernel) -> str:
        """Which fault another kernel has in its place, or that it has other results; "" if there is no difference."""
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
    """Keeps the launches that it serves. Memory that is freed must stay as it is: ALLOCATIONS_STAY."""

    def __init__(self, library: str) -> None:
        super().__init__(library, 80, count=False, watch=False)
        self.recorded: list[Recorded] = []
        self.reports: list[Report] = []
        self._known: dict[bytes, bytes] = {}

    def _launch(self, kernel: Kernel, sizes: tuple[Any, Any], params: bytes, shared: int) -> str:
        self._memory.refresh()
        before = self._contents()
        said = super()._launch(kernel, sizes, params, shared)
        (report,) = self.reports
        self.reports.clear()
        instructions = sum(len(block.instructions) for block in kernel.parsed.blocks if report.blocks[block.number])
        work = report.instructions // 1000 + instructions
        made = Recorded(kernel, sizes, params, shared, before, self._contents(), report.blocks, work)
        self.recorded.append(made)
        return said

    def _contents(self) -> Memory:
        pairs = [(at.start, ctypes.string_at(at.start, at.end - at.start)) for at in self._memory.intervals]
        return [(start, self._known.setdefault(data, data)) for start, data in pairs]


class Outcome(NamedTuple):
    """Of one mutant: the fault that it had, "result" if that was another one, or "" if nothing noticed it.

    `kernel` is without its template's arguments; `number` counts what these, kind and lines have in common.
    """

    kernel: str
    kind: str
    file: str
    source: str
    caller: str
    number: int
    said: str = ""


@dataclass
class Trial:
    """One mutant, in all kernels that a template was compiled to: the launches that reach it, the smallest first."""

    mutant: Outcome
    choices: list[tuple[Recorded, Mutant]]

    @property
    def key(self) -> str:
        """By which samples are drawn."""
        return hashlib.sha256(repr(self.mutant[:6]).encode()).hexdigest()

    def run(self) -> str:
        said = (launch.said_of(mutated(launch.kernel, mutant)) for launch, mutant in self.choices[:MOST_LAUNCHES])
        return next(filter(None, said), "")


def trials_of(launches: Sequence[Recorded], kinds: Iterable[str]) -> list[Trial]:
    """All of these kinds."""
    by_kernel: dict[str, list[Recorded]] = defaultdict(list)
    for recorded in sorted(launches, key=lambda each: each.work):
        by_kernel[recorded.kernel.name].append(recorded)
    trials: dict[Outcome, Trial] = {}
    places = Places()
    for own, short in zip(by_kernel.values(), short_names(by_kernel), strict=True):
        numbers: Counter[tuple[str, ...]] = Counter()
        for mutant in mutants_of(own[0].kernel.parsed):
            if mutant.kind in kinds:
                site = (short, mutant.kind, *places.of(own[0].kernel, mutant))
                outcome = Outcome(*site, numbers[site])
                numbers[site] += 1
                trial = trials.setdefault(outcome, Trial(outcome, []))
                trial.choices += [(recorded, mutant) for recorded in own if recorded.runs[mutant.block]]
    for trial in trials.values():
        trial.choices.sort(key=lambda choice: choice[0].work)
    return [trials[key] for key in sorted(trials)]


def short_names(symbols: Iterable[str]) -> list[str]:
    """`norm_add_backward` of each mangled name."""
    return [name.partition("<")[0] for name in budget.readable(list(symbols))]


class Places:
    """Lines of sources."""

    def __init__(self) -> None:
        self._lines: dict[str, list[str]] = {}

    def of(self, kernel: Kernel, mutant: Mutant) -> tuple[str, str, str]:
        """The file in csrc/cuda that an instruction comes from, its line, and that of the call that was inlined."""
        files = kernel.module.files
        places = [(files.get(number, ""), line) for number, line in (mutant.changed.line, *mutant.changed.callers)]
        own = [(name, self._line(name, line)) for name, line in places if "csrc/cuda" in name]
        (name, source), (_, caller) = (*own, ("", ""), ("", ""))[:2]
        return Path(name).name, source, caller

    def _line(self, name: str, number: int) -> str:
        """Behind the one before, if it is too short to tell which one it is."""
        if name not in self._lines:
            self._lines[name] = Path(name).read_text().splitlines()
        line = self._lines[name][number - 1].strip()
        before = next((text.strip() for text in reversed(self._lines[name][: number - 1]) if text.strip()), "")
        return f"{before} {line}" if len(line) < SHORT else line


def chosen(trials: Iterable[Trial], kinds: Mapping[str, int]) -> list[Trial]:
    """Of each kind as many, by their hashes: of barriers and waits also those that no launch reaches."""
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
            raise RuntimeError("the driver has complaints of the kernels as they are")
    return recorder.recorded


def run(library: str, kinds: Mapping[str, int]) -> list[Outcome]:
    """Tries mutants of a driver's kernels."""
    trials = chosen(trials_of(record(library), kinds), kinds)
    for recorded in {id(trial.choices[0][0]): trial.choices[0][0] for trial in trials if trial.choices}.values():
        if said := recorded.said_of(recorded.kernel):
            raise RuntimeError(f"{recorded.kernel.name} as it is: {said}")
    return [trial.mutant._replace(said=trial.run()) for trial in trials]


def outcomes_of(library: Path, kinds: Mapping[str, int]) -> list[Outcome]:
    """The same in a process that knows its allocations."""
    with TemporaryDirectory() as folder:
        build_allocations(Path(folder))
        out = Path(folder) / "outcomes.json"
        environment = {"LD_PRELOAD": f"{folder}/allocations.so", "ALLOCATIONS_STAY": "1", "PYTHONPATH": str(ROOT)}
        call = [sys.executable, __file__, "--run", str(library), str(out), json.dumps(kinds)]
        result = subprocess.run(call, env=os.environ | environment, capture_output=True, text=True, check=False)
        if result.returncode:
            raise RuntimeError(result.stdout[-5000:] + result.stderr[-5000:])
        return [Outcome(*outcome) for outcome in json.loads(out.read_text())]


# --- the list of survivors -----------------------------------------------------------------------------------------


def listed() -> dict[Outcome, str]:
    """Why nothing notices these."""
    reasons = json.loads(LIST.read_text()) if LIST.exists() else {}
    return {
        Outcome(*site, number): reason
        for reason, sites in reasons.items()
        for *site, numbers in sites
        for number in map(int, numbers.split())
    }


def write_list(reasons: Mapping[Outcome, str]) -> None:
    """By reason a line for each place: kernel, kind, file, source, caller, and the numbers of the mutants there."""
    entries: dict[str, dict[tuple[Any, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
    for outcome in sorted(reasons):
        entries[reasons[outcome]][outcome[:5]].append(outcome.number)
    made = []
    for reason, places in entries.items():
        lines = ([*place, " ".join(map(str, numbers))] for place, numbers in places.items())
        rows = ",\n".join(f"    {json.dumps(line, ensure_ascii=False)}" for line in lines)
        made.append(f"  {json.dumps(reason, ensure_ascii=False)}: [\n{rows}\n  ]")
    LIST.write_text("{\n" + ",\n".join(made) + "\n}\n")


def compared(outcomes: Iterable[Outcome]) -> tuple[list[Outcome], list[Outcome]]:
    """Survivors that the list doesn't explain; and what it names that was noticed, or that there isn't any more."""
    reasons, tried = listed(), {outcome._replace(said=""): outcome.said for outcome in outcomes}
    unexplained = [outcome for outcome, said in tried.items() if not said and not reasons.get(outcome)]
    complete = COMPLETE.keys() & {outcome.kind for outcome in tried}
    fixed = [outcome for outcome, reason in reasons.items() if not reason.startswith(BY_CHANCE)]
    outdated = [outcome for outcome in fixed if tried.get(outcome, "missing" if outcome.kind in complete else "")]
    return unexplained, outdated


def table(outcomes: Iterable[Outcome]) -> str:
    """How many of each kind there are, and what noticed them."""
    counts = Counter((o.kind, "result" if o.said == "result" else "fault" if o.said else "survives") for o in outcomes)
    lines = [f"{'kind':14}{'mutants':>9}{'fault':>9}{'result':>9}{'survives':>9}"]
    for kind in dict.fromkeys(kind for kind, _ in counts):
        own = [counts[kind, how] for how in ("fault", "result", "survives")]
        lines.append(f"{kind:14}" + "".join(f"{count:9}" for count in (sum(own), *own)))
    return "\n".join(lines)


def kind_and_count(text: str) -> tuple[str, int]:
    kind, _, count = text.partition("=")
    if kind not in KINDS or not count.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} isn't KIND=COUNT with one of the kinds {', '.join(KINDS)}")
    return kind, int(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told = "; ".join(f"{kind}: {what}" for kind, what in KINDS.items())
    parser.add_argument("kinds", nargs="*", type=kind_and_count, metavar="KIND=COUNT", help=f"default: {LARGE}. {told}")
    parser.add_argument("--write", action="store_true", help=f"brings {LIST.name} up to date; reasons are yours to add")
    arguments = parser.parse_args()
    kinds = dict(arguments.kinds) or LARGE
    budget.build("ptx")
    outcomes = outcomes_of(BUILD / "ptx/drive.so", kinds)
    unexplained, outdated = compared(outcomes)
    print(table(outcomes))
    for what, found in (("isn't explained", unexplained), ("is outdated", outdated)):
        for outcome in found:
            print(f"{what}: {outcome}")
    if arguments.write:
        kept = {outcome: reason for outcome, reason in listed().items() if outcome not in outdated}
        write_list(kept | dict.fromkeys(unexplained, ""))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        gc.disable()
        Path(sys.argv[3]).write_text(json.dumps(run(sys.argv[2], json.loads(sys.argv[4]))))
    else:
        main()
