"""Runs the ops' accuracy tests in a process of their own, on what this process can't switch to."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
# As in CMakeLists.txt: a file with EVAKERNELS_CPU_OPS has no kernels for GPUs. Logits are part of the losses.
_BINDINGS = {path.stem.removesuffix("_logits"): path.read_text() for path in sorted((ROOT / "csrc/bind").glob("*.cpp"))}
COMPILED = _BINDINGS.keys() - {"launch", "module"}
GPU_OPS = sorted(op for op in COMPILED if "\nEVAKERNELS_CPU_OPS(" not in _BINDINGS[op])
OPS = (*sorted(COMPILED), "native_optimizers", "norm_widths", "packed_attention", "stochastic_rounding")
# Not the plugin that collects garbage at the end, of which there is much.
PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:unraisableexception")


def run_ops(
    kernels: Sequence[str] = ("cpu",),
    folder: Path = Path(__file__).parent,
    ops: Sequence[str] = OPS,
    options: Sequence[str] = (),
    **environment: str,
) -> None:
    """Runs the ops' tests from `folder`.

    Args:
        kernels: builds whose tests run, as for the option `--kernels`; of none all tests.
        options: pytest's.
    """
    # Threads that wait for others asleep, as other tests may need the processor.
    environment = {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"} | environment
    arguments = [*(f"--kernels={build}" for build in kernels), *options, *(f"test_{op}.py" for op in ops)]
    result = subprocess.run(
        [*PYTEST, *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]


def tool(name: str) -> str:
    """The program beside this Python, where pip puts it, or on PATH."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def build_library(build: Path, target: str = "all", **options: object) -> None:
    """Builds `target` in the folder `build` with CMake, whose options these are."""
    options = {"CMAKE_MAKE_PROGRAM": tool("ninja"), "Python_EXECUTABLE": sys.executable} | options
    arguments = [f"-D{name}={value}" for name, value in options.items()]
    for command in (["-G", "Ninja", "-S", ROOT, "-B", build, *arguments], ["--build", build, "--target", target]):
        result = subprocess.run([tool("cmake"), *command], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]


def copy_with_library(top: Path, *libraries: Path) -> Path:
    """A copy of the ops and their tests in `top`, with other libraries. Returns the folder of the tests."""
    shutil.copytree(ROOT / "evakernels", top / "evakernels", ignore=shutil.ignore_patterns("*.so"))
    shutil.copytree(ROOT / "tests/evakernels", top / "tests")
    (top / "pytest.ini").write_text("[pytest]\nmarkers =\n    slow\n    exhaustive\n")
    for library in libraries:
        shutil.copy(library, top / "evakernels")
    return top / "tests"


def sanitizer_runtimes(compiler: str) -> list[str]:
    """What to load before Python, which is built without them; without a folder what the compiler lacks."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    calls = [[compiler, f"-print-file-name={name}"] for name in names]
    return [subprocess.run(call, capture_output=True, text=True, check=False).stdout.strip() for call in calls]


def gcc() -> str | None:
    """The path of a g++ whose sanitizers can be loaded before Python, or None."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    return found if found and all(Path(name).is_absolute() for name in sanitizer_runtimes(found)) else None
