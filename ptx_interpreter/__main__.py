"""python -m ptx_interpreter FILE.py [ARGS...]: runs the Triton kernels of a Python file on the CPU and checks them.

The file sees a GPU: torch's `cuda` devices are the CPU, and each launch of a Triton kernel runs the PTX that Triton
compiles for the GPU in the interpreter. README.md shows reports.
"""

import argparse
import gc
import linecache
import os
import runpy
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import triton

from ptx_interpreter import Fault, GlobalMemory, Kernel, Report, Traffic, Unsupported
from ptx_interpreter.gpus import GPUS, Gpu
from ptx_interpreter.report import NEARLY_EQUAL
from ptx_interpreter.stand_in import Tensors, gpu
from ptx_interpreter.traffic import SECTOR
from ptx_interpreter.triton_driver import Driver

TRITON = str(Path(triton.__file__).parent)
NO_KERNEL = 3
"""Exit status of a file that launched no kernel."""
Place = tuple[str, int]
"""A source file, and a line of it."""


def shown(place: Place) -> str:
    """The place and the text of the line; the path as it is imported."""
    path, line = place
    folder = max((folder for folder in sys.path if path.startswith(f"{folder}{os.sep}")), key=len, default="")
    return f"{path[len(folder) :].lstrip(os.sep) if folder else path}:{line}: {linecache.getline(path, line).strip()}"


@dataclass
class Finding:
    """Faults of one kind at a line of a kernel's source.

    `callers`: the lines that call the function of that line, the last one first. `first`: the first fault, by a thread
    of `program`.
    """

    kernel: str
    kind: str
    place: Place
    callers: list[Place]
    first: Fault
    program: tuple[int, int, int]
    accesses: int = 0

    def __str__(self) -> str:
        lines = [f"{self.kind} in {self.kernel}: {self.first.detail}", shown(self.place)]
        lines += [f"called from {shown(caller)}" for caller in self.callers]
        who = f"thread {self.first.thread} of program {self.program}"
        return "\n    ".join([*lines, f"{self.accesses} accesses, the first by {who}: {self.first.instruction}"])


class Checker(Driver):
    """Runs launches and collects what they do.

    Args:
        capability: the GPU's compute capability times ten.
        multiprocessors: how many the GPU has; None: as `gpu`.
        gpu: the GPU whose sizes the file sees; None: the one of GPUS with that capability.

    Attributes:
        findings: a Finding for each kind and line of a kernel, in the order in which they were found.
        kernels: how many launches there were, by name.
        traffic: by line and space.
        unsupported: messages about kernels that couldn't be run.
    """

    def __init__(self, capability: int = 80, multiprocessors: int | None = None, gpu: Gpu | None = None) -> None:
        super().__init__(capability, multiprocessors, gpu)
        self._memory.anywhere, self._memory.poisoned = False, True
        self.tensors = Tensors()
        self.findings: dict[tuple[str, str, Place], Finding] = {}
        self.kernels: Counter[str] = Counter()
        self.traffic: dict[tuple[Place, str], Traffic] = {}
        self.unsupported: list[str] = []

    def prepare_memory(self, memory: GlobalMemory, arguments: dict[str, Any]) -> None:
        self.tensors.prepare(memory, arguments)

    def _launch(self, kernel: Kernel, *arguments: Any) -> None:
        try:
            super()._launch(kernel, *arguments)
        except Unsupported as error:  # which a library may catch
            self.unsupported.append(f"{kernel.name}: {error}")
            raise

    def handle(self, report: Report) -> None:
        self.kernels[report.kernel] += 1
        body, (x, y, _) = report.entry.parsed, report.grid
        places = {}
        for instruction in (i for block in body.blocks for i in block.instructions):
            lines = [(body.files.get(file, ""), line) for file, line in (instruction.line, *instruction.callers)]
            outside_triton = [place for place in lines if not place[0].startswith(TRITON)]
            places[body.where(instruction.line), instruction.text] = outside_triton or lines
        for fault in report.faults:
            if fault.detail == NEARLY_EQUAL:
                continue  # Threads that hold copies of a sum, which Triton's fma rounds in several ways.
            place, *callers = places[fault.where, fault.instruction]
            program = fault.block % x, fault.block // x % y, fault.block // (x * y)
            finding = Finding(report.kernel, fault.kind, place, callers, fault, program)
            self.findings.setdefault((report.kernel, fault.kind, place), finding).accesses += fault.count
        for (space, where, text), traffic in report.traffic.items():
            self.traffic.setdefault((places[where, text][0], space), Traffic()).add(traffic)

    def print(self) -> None:
        """Prints what each line asked of memory, the findings, and how many kernels and findings there were."""
        print(f"\n{'memory':14}{'requests':>10}{'sectors or cycles each':>24}{'at least':>10}  line")
        for (place, space), t in sorted(self.traffic.items()):
            if t.requests:
                each = t.sectors / t.requests
                least = max(1, t.bytes / (SECTOR * t.requests)) if space.startswith("global") else t.least / t.requests
                print(f"{space:14}{t.requests:10}{each:24.1f}{min(each, least):10.1f}  {shown(place)}")
        print("", *self.findings.values(), *(f"unsupported: {message}" for message in self.unsupported), sep="\n")
        kernels = ", ".join(f"{name} ({count})" for name, count in self.kernels.items())
        print(f"{len(self.findings)} findings in {sum(self.kernels.values())} launches: {kernels or 'no kernels'}")


def run_file(checker: Checker, path: str, arguments: Sequence[str] = ()) -> None:
    """Run a Python file as `python FILE.py ARGUMENTS` does, with `checker` as its GPU.

    Triton's shared cache ignores the paths of files: kernels from it may name the files of another checkout.

    Raises:
        Unsupported: names an instruction that the interpreter doesn't know. Errors of the file are raised as they are.
    """
    folders = [str(Path(path).resolve().parent), *sys.path]
    with (
        tempfile.TemporaryDirectory() as cache,
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache),
        mock.patch.multiple(sys, argv=[path, *arguments], path=folders),
        gpu(checker, checker.tensors),
    ):
        runpy.run_path(path, run_name="__main__")
        gc.collect()  # Triton unloads kernels from the driver that is active.


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m ptx_interpreter", description=__doc__)
    parser.add_argument("--gpu", choices=GPUS, help="the GPU whose sizes the file sees; default: the one of --sm")
    parser.add_argument("--sm", type=int, choices=(80, 90), default=80, help="compute capability times ten of the PTX")
    parser.add_argument("--multiprocessors", type=int, metavar="N", help="how many the GPU has that the file sees")
    parser.add_argument("file")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the file")
    options = parser.parse_args()
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # It would compile for the CPU.
    checker = Checker(options.sm, options.multiprocessors, GPUS.get(options.gpu))
    try:
        run_file(checker, options.file, options.arguments)
    except Unsupported as error:
        checker.unsupported = checker.unsupported or [str(error)]
    except SystemExit as end:
        if end.code:
            raise
    finally:
        checker.print()
    if not checker.unsupported and not checker.kernels:
        return NO_KERNEL
    return 2 if checker.unsupported else int(bool(checker.findings))


if __name__ == "__main__":
    sys.exit(main())
