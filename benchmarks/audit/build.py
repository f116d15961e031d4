"""Builds the counting library, and counts with it."""

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.audit.budget import ROOT
from benchmarks.audit.result import Count, count_from_json
from evaclip.errors import UserError

FOLDER = ROOT / "build" / "audit"
Case = tuple[str, str, str, str]
"""Names of an op, a shape, a dtype, and `forward` or `backward`."""


def count_all(cases: Sequence[Case], libraries: Path | None = None) -> list[Count]:
    """What was counted in each case.

    Args:
        cases: what to count.
        libraries: the folder with the counting `_ops.so`; by default it is built.

    Raises:
        UserError: the kernels can't be emulated here, or the build or a case failed.
    """
    libraries = libraries or _build()
    with tempfile.TemporaryDirectory() as package:
        # This folder comes first, so that its evakernels is the one that is imported.
        shutil.copytree(ROOT / "evakernels", Path(package) / "evakernels", ignore=shutil.ignore_patterns("*.so"))
        library = shutil.copy(libraries / "_ops.so", Path(package) / "evakernels")
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([package, str(ROOT)])}
        call = [sys.executable, "-m", "benchmarks.audit.count", library, json.dumps(cases)]
        return [count_from_json(stored) for stored in json.loads(_run(call, cwd=package, env=environment))]


def _build() -> Path:
    """The folder of the library in which the emulated kernels serve the CPU and count."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise UserError("the emulator of the GPU kernels is written for x86-64 and Linux")
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise UserError("the audit compiles the GPU kernels with g++, which isn't there")
    FOLDER.mkdir(parents=True, exist_ok=True)
    tools = {name: Path(sys.executable).with_name(name) for name in ("cmake", "ninja")}
    cmake, ninja = (str(path) if path.exists() else name for name, path in tools.items())
    options = {
        "CMAKE_MAKE_PROGRAM": ninja,
        "CMAKE_CXX_COMPILER": compiler,
        "CMAKE_BUILD_TYPE": "None",
        "CMAKE_CXX_FLAGS": "-O1 -fno-strict-aliasing",
        "Python_EXECUTABLE": sys.executable,
        "EVAKERNELS_EMULATED": "ON",
    }
    with (FOLDER / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one build at a time
        _run(
            [cmake, "-G", "Ninja", "-S", ROOT, "-B", FOLDER, *(f"-D{name}={value}" for name, value in options.items())]
        )
        _run([cmake, "--build", FOLDER, "--target", "ops_audit"])
    return FOLDER / "audit"


def _run(call: Sequence[str | Path], **options: object) -> str:
    result = subprocess.run(call, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    if result.returncode:
        text = (result.stdout + result.stderr)[-3000:]
        raise UserError(f"{Path(call[0]).name} {call[1]} failed: {text}")
    return str(result.stdout)
