"""Builds the native library with CMake and ninja, or records why it could not be built.

EVAKERNELS_NATIVE says what to do: "auto" (default) builds where the tools are there and installs the pure
Python package where they are not, "on" makes their absence an error, "off" never builds. A build that fails
is always an error.

EVAKERNELS_CUDA says the same of the kernels for GPUs, which nvcc compiles; EVAKERNELS_CUDA_ARCHS for which GPUs, as
CMake spells them ("90-real"; the usual ones if not set).
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
PACKAGE = "evakernels"
RECORD = "_build.json"
LIBRARY = "_ops.so"
MODES = ("auto", "on", "off")


def find_tool(*names: str) -> str | None:
    """The first of these programs beside this Python (where pip puts CMake and ninja) or on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return next((found for name in names if (found := shutil.which(name, path=path))), None)


def find_compiler() -> str | None:
    """The C++ compiler: what $CXX says, else the usual names."""
    wanted = os.environ.get("CXX")
    return find_tool(*wanted.split()[:1]) if wanted else find_tool("c++", "g++", "clang++")


def what_is_missing() -> str | None:
    """Why the native library can't be built here; None if it can."""
    if sys.platform != "linux":
        return f"the native library is built on Linux only, this is {sys.platform}"
    if not find_compiler():
        return "no C++ compiler found (looked for " + (os.environ.get("CXX") or "c++, g++, clang++") + ")"
    missing = [name for name in ("cmake", "ninja") if not find_tool(name)]
    missing += [name for name in ("torch", "pybind11") if importlib.util.find_spec(name) is None]
    return f"needed for the build, but not found: {', '.join(missing)}" if missing else None


def mode_of(variable: str) -> str:
    """What the environment says about a part of the build."""
    mode = os.environ.get(variable, "auto")
    if mode not in MODES:
        raise SystemExit(f"error: {variable}={mode!r}; accepted are {', '.join(MODES)}")
    return mode


def why_not_native() -> str | None:
    """The reason to leave the native library out; None to build it."""
    mode = mode_of("EVAKERNELS_NATIVE")
    if mode == "off":
        return "switched off by EVAKERNELS_NATIVE=off"
    reason = what_is_missing()
    if reason and mode == "on":
        raise SystemExit(f"error: EVAKERNELS_NATIVE=on, but {reason}")
    return reason


def why_not_cuda() -> str | None:
    """The reason to leave the kernels for GPUs out; None to build them."""
    mode = mode_of("EVAKERNELS_CUDA")
    if mode == "off":
        return "switched off by EVAKERNELS_CUDA=off"
    reason = NOT_NATIVE or (None if find_tool(os.environ.get("CUDACXX", "nvcc")) else "no CUDA compiler found (nvcc)")
    if reason and mode == "on":
        raise SystemExit(f"error: EVAKERNELS_CUDA=on, but {reason}")
    return reason


def cuda_options() -> list[str]:
    """What CMake must know about the kernels for GPUs."""
    archs = os.environ.get("EVAKERNELS_CUDA_ARCHS")
    options = [f"-DEVAKERNELS_CUDA={'OFF' if NOT_CUDA else 'ON'}"]
    return [*options, f"-DEVAKERNELS_CUDA_ARCHS={archs.replace(',', ';')}"] if archs else options


def forget_environment(build: Path) -> None:
    """The paths of a former environment's torch or ninja must not survive. CMake's --fresh removes the objects too."""
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    for compilers in (build / "CMakeFiles").glob("[0-9]*.*"):
        shutil.rmtree(compilers)


class BuildPython(build_py):
    """Adds the record of what was decided, which `evakernels.info()` reports."""

    def run(self) -> None:
        super().run()
        folder = (ROOT if self.editable_mode else Path(self.build_lib)) / PACKAGE
        if NOT_NATIVE:
            # What an earlier build left in the source tree would be loaded in spite of the decision.
            for stale in [*folder.glob("_C.*.so"), *folder.glob(LIBRARY)]:
                stale.unlink()
        record = {
            "native": NOT_NATIVE is None,
            "reason": NOT_NATIVE,
            "cuda": NOT_CUDA is None,
            "cuda_reason": NOT_CUDA,
        }
        (folder / RECORD).write_text(json.dumps(record) + "\n")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib) / PACKAGE / RECORD)]


class BuildNative(build_ext):
    """Runs CMake in place of the compiler commands of setuptools."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake = find_tool("cmake")
        forget_environment(build)
        subprocess.run(
            [
                *(cmake, "-G", "Ninja", "-S", ROOT, "-B", build),
                f"-DCMAKE_CXX_COMPILER={find_compiler()}",
                f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
                f"-DPython_EXECUTABLE={sys.executable}",
                f"-DEVAKERNELS_VERSION={self.distribution.get_version()}",
                *cuda_options(),
            ],
            check=True,
        )
        subprocess.run([cmake, "--build", build], check=True)
        subprocess.run([cmake, "--install", build, "--prefix", target], check=True)

    def copy_extensions_to_source(self) -> None:
        super().copy_extensions_to_source()
        self.copy_file(str(Path(self.build_lib) / PACKAGE / LIBRARY), str(ROOT / PACKAGE / LIBRARY))

    def get_outputs(self) -> list[str]:
        return [*super().get_outputs(), str(Path(self.build_lib) / PACKAGE / LIBRARY)]


NOT_NATIVE = why_not_native()
NOT_CUDA = why_not_cuda()

setup(
    ext_modules=[] if NOT_NATIVE else [Extension(f"{PACKAGE}._C", sources=[])],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
)
