"""What the GPU kernels take of a multiprocessor, as nvcc reports it, and how wide they access memory, as disassembled.

    python tests/cuda/budget.py     compiles the kernels and writes budget.json

A kernel that takes more registers or shared memory than before runs in fewer copies at a time and is slower, which no
test of its results shows; one that spills registers reads and writes memory that it should not; and the compiler may
cut a load or store of 16 bytes into pieces. tests/evakernels/test_cuda_budget.py compares.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[2]))

from ptx_interpreter.runtime import newest_for, ptx_in

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc/cuda"
BUILD = ROOT / "build/ptx"
"""What isn't changed is not compiled again, neither for the tests that run the PTX."""
OBJECTS = "CMakeFiles/cuda_kernels.dir/csrc/cuda/*.cu.o"
PTX_OF = "80-virtual,100-virtual"
"""Machine code is made of this PTX, as setup.py has it for all GPUs."""
FLAGS = ";-lineinfo;--no-compress"
"""Of nvcc: the PTX tells its lines, and can be read in objects."""
BUDGET = Path(__file__).resolve().with_name("budget.json")
ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120")
DISASSEMBLED = "sm_90"
SECTIONS = ("registers and shared memory", "accesses")

KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\S+)' for '(?P<arch>\S+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
FUNCTION = re.compile(r"\s*Function : (\S+)")
ACCESS = re.compile(r"\b(LDG|STG)(?:STS)?((?:\.\w+)*)")


class Usage(NamedTuple):
    """Of one kernel on one architecture, in registers a thread and bytes."""

    registers: int
    shared: int
    stack: int
    spilled: int


class Accesses(NamedTuple):
    """Instructions of a kernel that access global memory: of 16 bytes a thread, and of fewer."""

    wide_loads: int = 0
    other_loads: int = 0
    wide_stores: int = 0
    other_stores: int = 0


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


def nvcc() -> Path | None:
    """The CUDA compiler: that on PATH, else that of the package nvidia-cuda-nvcc; None without any."""
    if found := shutil.which(os.environ.get("CUDACXX", "nvcc")):
        return Path(found)
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or []]
    return next((found for folder in folders for found in sorted(folder.glob("cu*/bin/nvcc"))), None)


def build(target: str = "cuda_kernels") -> None:
    """Compiles the kernels as setup.py does it for all GPUs, to PTX, and nothing that uses them but `target`."""
    settings = {"EVAKERNELS_NATIVE": "on", "EVAKERNELS_CUDA": "on", "EVAKERNELS_CUDA_ARCHS": PTX_OF}
    packaged = []
    if (compiler := nvcc()) and (runtime := next(compiler.parents[1].glob("lib/libcudart.so.*"), None)):
        # A package has its libraries where neither nvcc nor CMake looks, and not under the name that they look for.
        settings |= {"CUDACXX": str(compiler), "LIBRARY_PATH": str(runtime.parent)}
        packaged = [f"-DCUDA_CUDART={runtime}"]
    code = "import json, runpy, setuptools; setuptools.setup = lambda **_: None; run = runpy.run_path('setup.py'); "
    code += "print(json.dumps([run['find_tool']('cmake'), run['find_tool']('ninja'), run['cuda_options']()]))"
    told = _output([sys.executable, "-c", code], os.environ | settings)
    cmake, ninja, options = json.loads(told.splitlines()[-1])
    options = [o + FLAGS if o.startswith("-DEVAKERNELS_CUDA_CODES=") else o for o in options]
    # The stand-in takes the runtime's place, also in what CMake adds of itself.
    options += ["-DCMAKE_CUDA_RUNTIME_LIBRARY=None", *packaged]
    options += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DPython_EXECUTABLE={sys.executable}"]
    _output([cmake, "-G", "Ninja", "-S", str(ROOT), "-B", str(BUILD), *options], os.environ | settings)
    _output([cmake, "--build", str(BUILD), "--target", target])


def _output(command: list[str], environment: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return done.stdout


def objects() -> list[Path]:
    """Those of today's sources, in the order of their names."""
    return sorted(path for path in BUILD.glob(OBJECTS) if (SOURCES / path.stem).exists())


def source_of(path: Path) -> str:
    """`gelu` of `gelu.cu.o`."""
    return path.name.removesuffix(".cu.o")


def assemble(path: Path, arch: str) -> Path:
    """Makes machine code of an object's PTX; what the assembler says of it is in a file beside it, `.usage`."""
    code = path.with_suffix(f".{arch}.cubin")
    report = code.with_suffix(".usage")
    if not report.exists() or report.stat().st_mtime < path.stat().st_mtime:
        (texts,) = ptx_in(path.read_bytes())
        ptx = code.with_suffix(".ptx")
        ptx.write_text(newest_for(texts, int(arch.removeprefix("sm_"))))
        assembler = (nvcc() or Path()).with_name("ptxas")
        call = [assembler, f"-arch={arch}", "-m64", "-v", ptx, "-o", code]
        done = subprocess.run(call, capture_output=True, text=True, check=True)
        report.write_text(done.stderr)
    return code


def measure(archs: Sequence[str] = ARCHS) -> dict[str, dict[str, Usage]]:
    """The usage by architecture and kernel, once the sources are built."""
    pairs = [(path, arch) for path in objects() for arch in archs]
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        codes = list(threads.map(assemble, *zip(*pairs, strict=True)))
    usages: dict[str, dict[str, Usage]] = {arch: {} for arch in archs}
    for (path, arch), code in zip(pairs, codes, strict=True):
        found = usages_in(code.with_suffix(".usage").read_text())[arch]
        # Kernels of headers may be in several files, with other types that have the same name.
        usages[arch] |= {f"{source_of(path)}: {name}": usage for name, usage in found.items()}
    return usages


def disassembler() -> str | None:
    """NVIDIA's cuobjdump: that on PATH, or Triton's; None without any."""
    spec = importlib.util.find_spec("triton")
    folders = [Path(folder) / "backends/nvidia/bin" for folder in (spec and spec.submodule_search_locations) or []]
    return shutil.which("cuobjdump", path=os.pathsep.join([os.environ.get("PATH", ""), *map(str, folders)]))


def accesses_in(machine_code: str) -> dict[str, Accesses]:
    """The accesses of every kernel of a disassembled source file."""
    counts: dict[str, Counter[str]] = {}
    current: Counter[str] = Counter()
    for line in machine_code.splitlines():
        if begins := FUNCTION.match(line):
            current = counts[begins[1]] = Counter()
        elif found := ACCESS.search(line):
            current[found[1] + (" wide" if "128" in found[2].split(".") else " other")] += 1
    kinds = ("LDG wide", "LDG other", "STG wide", "STG other")
    accesses = [Accesses(*(own[kind] for kind in kinds)) for own in counts.values()]
    return dict(zip(readable(list(counts)), accesses, strict=True))


def measure_accesses(tool: str) -> dict[str, Accesses]:
    """The accesses by kernel on DISASSEMBLED, in the machine code that `measure` made."""
    # It calls a program that lies beside it.
    environment = os.environ | {"PATH": os.pathsep.join([str(Path(tool).parent), os.environ.get("PATH", "")])}
    accesses = {}
    for path in objects():
        call = [tool, "-sass", assemble(path, DISASSEMBLED)]
        code = subprocess.run(call, env=environment, capture_output=True, text=True, check=True).stdout
        accesses |= {f"{source_of(path)}: {name}": found for name, found in accesses_in(code).items()}
    return accesses


def nvcc_release() -> str:
    """`13.0`: another release gives other numbers."""
    report = subprocess.run([str(nvcc()), "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release (\d+\.\d+)", report)
    return found[1] if found else "unknown"


def write(usages: dict[str, dict[str, Usage]], accesses: dict[str, Accesses]) -> None:
    """One line for each kernel: [registers, shared memory] for each architecture, and one of its accesses."""
    kernels = sorted(usages[ARCHS[0]])
    numbers = {kernel: [usages[arch][kernel][:2] for arch in ARCHS] for kernel in kernels}
    parts = [f'  "nvcc": "{nvcc_release()}"', f'  "archs": {json.dumps(ARCHS)}']
    for name, values in zip(SECTIONS, (numbers, {k: accesses[k] for k in kernels}), strict=True):
        lines = [f"    {json.dumps(kernel)}: {json.dumps(value)}" for kernel, value in values.items()]
        parts.append(f'  "{name}": {{\n' + ",\n".join(lines) + "\n  }")
    BUDGET.write_text("{\n" + ",\n".join(parts) + "\n}\n")


def read() -> tuple[str, dict[str, dict[str, tuple[int, int]]]]:
    """The release of nvcc, and with it registers and shared memory by architecture and kernel."""
    stored = json.loads(BUDGET.read_text())
    return stored["nvcc"], {
        arch: {kernel: tuple(values[i]) for kernel, values in stored[SECTIONS[0]].items()}
        for i, arch in enumerate(stored["archs"])
    }


def registers_of(arch: str) -> Callable[[str], int]:
    """Maps a kernel's symbol to its registers per thread."""
    known = {kernel.partition(": ")[2]: usage[0] for kernel, usage in read()[1][arch].items()}
    return cache(lambda symbol: known[readable([symbol])[0]])


def read_accesses() -> dict[str, Accesses]:
    """The accesses on DISASSEMBLED, by kernel."""
    return {kernel: Accesses(*counts) for kernel, counts in json.loads(BUDGET.read_text())[SECTIONS[1]].items()}


if __name__ == "__main__":
    tool = disassembler()
    if tool is None:
        sys.exit("no cuobjdump found: pip install triton brings it")
    build()
    found = measure()
    for arch, usages in found.items():
        for kernel, usage in usages.items():
            if usage.spilled or usage.stack:
                print(f"{arch} {kernel}: {usage}")
    write(found, measure_accesses(tool))
