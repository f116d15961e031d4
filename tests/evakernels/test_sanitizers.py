"""The compiled library under AddressSanitizer and UndefinedBehaviorSanitizer, as the ops' own tests call it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from op_suite import run_ops

import evakernels

ROOT = Path(__file__).parents[2]
SANITIZE = "-O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all"
RUNTIMES = ("libasan.so", "libubsan.so", "libstdc++.so.6")
ISAS = evakernels.info()["native"].get("isas_available", [])


def runtimes(compiler: str) -> list[str]:
    """The libraries to load in front of Python; names without a folder where the compiler doesn't have them."""
    names = [[compiler, f"-print-file-name={name}"] for name in RUNTIMES]
    return [subprocess.run(name, capture_output=True, text=True).stdout.strip() for name in names]


@pytest.fixture(scope="module")
def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None or not all(Path(name).is_absolute() for name in runtimes(found)):
        pytest.skip("no g++ whose sanitizers can be loaded in front of Python")
    return found


@pytest.fixture(scope="module")
def folder(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the ops and their tests, with a library that is watched."""
    top = tmp_path_factory.mktemp("watched")
    shutil.copytree(ROOT / "evakernels", top / "evakernels", ignore=shutil.ignore_patterns("*.so"))
    shutil.copytree(ROOT / "tests/evakernels", top / "tests")
    (top / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    tools = {name: Path(sys.executable).with_name(name) for name in ("cmake", "ninja")}
    cmake, ninja = (str(path) if path.exists() else name for name, path in tools.items())
    options = {
        "CMAKE_BUILD_TYPE": "Debug",
        "CMAKE_CXX_COMPILER": compiler,
        "CMAKE_CXX_FLAGS": SANITIZE,
        "CMAKE_MAKE_PROGRAM": ninja,
        "Python_EXECUTABLE": sys.executable,
    }
    build = top / "build"
    arguments = [f"-D{name}={value}" for name, value in options.items()]
    subprocess.run([cmake, "-G", "Ninja", "-S", ROOT, "-B", build, *arguments], check=True, capture_output=True)
    subprocess.run([cmake, "--build", build, "--target", "_ops"], check=True, capture_output=True)
    shutil.copy(build / "_ops.so", top / "evakernels")
    return top


@pytest.mark.slow
@pytest.mark.skipif(not ISAS, reason="there are no compiled kernels")
@pytest.mark.parametrize("isa", ISAS)
def test_ops_are_clean(isa: str, folder: Path, compiler: str) -> None:
    run_ops(
        folder=folder / "tests",
        EVAKERNELS_ISA=isa,
        PYTHONPATH=str(folder),
        LD_PRELOAD=" ".join(runtimes(compiler)),
        # Python and torch free nothing at their end. The stack frames of the other check hold vectors of 64 bytes at
        # half their alignment under GCC 12.
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0",
    )
