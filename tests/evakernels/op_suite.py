"""Runs the ops' accuracy tests in a process of their own, on what this process can't switch to."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPS = ("contrastive", "lamb", "layer_norm", "residual_norm", "rope_attention", "swiglu", "token_dropout")
CHOICE = "accurate or odd_shapes or formula or error_rule"
RUN = "import pytest, sys; sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', '-k', {choice!r}, *{files!r}]))"


def run_ops(
    before: str = "",
    choice: str = CHOICE,
    folder: Path = Path(__file__).parent,
    ops: Sequence[str] = OPS,
    **environment: str,
) -> None:
    """The chosen tests of the ops, under the `with` statement `before` if it is given, from `folder`."""
    call = RUN.format(choice=choice, files=[f"test_{op}.py" for op in ops])
    code = f"import evakernels\n{before}:\n    {call}" if before else call
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]


def build_library(build: Path, target: str = "_ops", source: Path = ROOT, **options: object) -> Path:
    """Builds `target` with CMake, whose options these are, and returns the folder that it lies in."""
    tools = {name: Path(sys.executable).with_name(name) for name in ("cmake", "ninja")}
    cmake, ninja = (str(path) if path.exists() else name for name, path in tools.items())
    options = {"CMAKE_MAKE_PROGRAM": ninja, "Python_EXECUTABLE": sys.executable} | options
    arguments = [f"-D{name}={value}" for name, value in options.items()]
    for command in (["-G", "Ninja", "-S", source, "-B", build, *arguments], ["--build", build, "--target", target]):
        result = subprocess.run([cmake, *command], capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
    return build


def copy_with_library(top: Path, **options: object) -> Path:
    """A copy of the ops and their tests in `top`, with a library of its own. Returns the folder of the tests."""
    shutil.copytree(ROOT / "evakernels", top / "evakernels", ignore=shutil.ignore_patterns("*.so"))
    shutil.copytree(ROOT / "tests/evakernels", top / "tests")
    (top / "pytest.ini").write_text("[pytest]\nmarkers = slow\n")
    shutil.copy(build_library(top / "build", **options) / "_ops.so", top / "evakernels")
    return top / "tests"


def sanitizer_runtimes(compiler: str) -> list[str]:
    """What to load in front of Python, which is built without them; without a folder what the compiler lacks."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    calls = [[compiler, f"-print-file-name={name}"] for name in names]
    return [subprocess.run(call, capture_output=True, text=True, check=False).stdout.strip() for call in calls]


def gcc() -> str | None:
    """The path of a g++ whose sanitizers can be loaded in front of Python; None where there is none."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    return found if found and all(Path(name).is_absolute() for name in sanitizer_runtimes(found)) else None
