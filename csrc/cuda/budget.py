"""What the GPU kernels take of a multiprocessor: registers and shared memory, as nvcc reports them.

    python csrc/cuda/budget.py     builds the library and writes budget.json

A kernel that takes more than before runs in fewer copies at a time and is slower, which no test of its results shows;
one that spills registers reads and writes memory that it should not. tests/evakernels/test_cuda_budget.py compares.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
BUILD = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
REPORTS = "CMakeFiles/cuda_kernels.dir/csrc/cuda/*.cu.o.usage"
BUDGET = FOLDER / "budget.json"
ARCHS = ("sm_80", "sm_90", "sm_100")

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


class Usage(NamedTuple):
    """Of one kernel on one architecture, in registers a thread and bytes."""

    registers: int
    shared: int
    stack: int
    spilled: int


def readable(symbols: list[str]) -> list[str]:
    """`norm_add_backward<BFloat16, BFloat16, 8, 4>` for each mangled name."""
    names = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    result = []
    for name in names.splitlines():
        short = re.sub(r"\(anonymous namespace\)::|evakernels::(cuda::)?", "", name)
        short = re.sub(r"Layout<(\d+), (\d+), \d+> ?", r"\1, \2", short)
        result.append(re.sub(r"^void |_kernel(?=<)|\(.*\)$", "", short))
    return result


def usages_in(report: str) -> dict[str, dict[str, Usage]]:
    """The usage by architecture and kernel that nvcc tells of for a source file."""
    found = list(KERNEL.finditer(report))
    usages: dict[str, dict[str, Usage]] = {arch: {} for arch in ARCHS}
    for name, match in zip(readable([m["name"] for m in found]), found, strict=True):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        spilled = int(match["stores"]) + int(match["loads"])
        usage = Usage(int(match["registers"]), int(shared[1]) if shared else 0, int(match["stack"]), spilled)
        usages[match["arch"]][name] = usage
    return usages


def measure() -> dict[str, dict[str, Usage]]:
    """The usage by architecture and kernel, in the library as setup.py builds it for the usual GPUs."""
    for path in BUILD.glob(REPORTS):
        if not (FOLDER / path.name.removesuffix(".o.usage")).exists():
            path.unlink()
    build = [sys.executable, "setup.py", "build_ext"]
    chosen = {"EVAKERNELS_NATIVE": "on", "EVAKERNELS_CUDA": "on", "EVAKERNELS_CUDA_ARCHS": ""}
    done = subprocess.run(build, cwd=ROOT, env=os.environ | chosen, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    usages: dict[str, dict[str, Usage]] = {arch: {} for arch in ARCHS}
    for path in sorted(BUILD.glob(REPORTS)):
        for arch, found in usages_in(path.read_text()).items():
            # Kernels of headers may be in several files, with other types that have the same name.
            usages[arch] |= {f"{path.name.removesuffix('.cu.o.usage')}: {name}": usage for name, usage in found.items()}
    return usages


def nvcc_release() -> str:
    """`13.0`: another release gives other numbers."""
    report = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", report)
    return found[1] if found else "unknown"


def write(usages: dict[str, dict[str, Usage]]) -> None:
    """One line for each kernel: [registers, shared memory] for each architecture."""
    kernels = sorted(usages[ARCHS[0]])
    lines = [f"    {json.dumps(k)}: {json.dumps([usages[arch][k][:2] for arch in ARCHS])}" for k in kernels]
    head = f'{{\n  "nvcc": "{nvcc_release()}",\n  "archs": {json.dumps(ARCHS)},\n'
    head += '  "registers and shared memory": {\n'
    BUDGET.write_text(head + ",\n".join(lines) + "\n  }\n}\n")


def read() -> tuple[str, dict[str, dict[str, tuple[int, int]]]]:
    """The release of nvcc, and with it registers and shared memory by architecture and kernel."""
    stored = json.loads(BUDGET.read_text())
    return stored["nvcc"], {
        arch: {kernel: tuple(values[i]) for kernel, values in stored["registers and shared memory"].items()}
        for i, arch in enumerate(stored["archs"])
    }


if __name__ == "__main__":
    found = measure()
    for arch, usages in found.items():
        for kernel, usage in usages.items():
            if usage.spilled or usage.stack:
                print(f"{arch} {kernel}: {usage}")
    write(found)
