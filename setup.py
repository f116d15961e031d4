"""Build the native library with CMake and ninja.

EVAKERNELS_NATIVE: "auto" (default) builds the library on Linux and installs pure Python elsewhere; "on" is an error
outside of Linux; "off" installs pure Python. A missing tool or a failed build is an error.
EVAKERNELS_CUDA: "auto" (default) builds CUDA kernels if nvcc and a GPU are found; "on" needs only nvcc; "off" builds
none.
EVAKERNELS_CUDA_ARCHS: GPUs in CMake's spelling ("90-real,100"), or "all". Default: this machine's GPUs, or all.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent.resolve()
PACKAGE = "evakernels"
MODULE = f"{PACKAGE}._C"
RECORD = "_build.json"
LIBRARY = "_ops.so"
MODES = ("auto", "on", "off")
INSTALL_TOOLS = "pip install torch setuptools cmake ninja pybind11"
INSTALL_COMPILER = "apt-get install g++, or set CXX"

# Compute capabilities times ten: the oldest GPU that the kernels support, and those of a library for all GPUs.
OLDEST_GPU = 80
ALL_GPUS = (80, 90, 100, 120)
OLDEST_NVCC = (12, 1)  # the first with C++20 and 32 KB of kernel arguments
# From here on nvcc has another compiler to PTX; the kernels' PTX is the same for all GPUs before, and for all after it.
NEXT_COMPILER = 100


def find_tool(*names: str) -> str | None:
    """The first of these programs next to this Python (where pip puts CMake and ninja) or on PATH."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return next((program for name in names if (program := shutil.which(name, path=path))), None)


def find_compiler() -> str | None:
    """Return the C++ compiler: $CXX, or c++, g++, clang++ on PATH."""
    compiler = os.environ.get("CXX")
    return find_tool(*compiler.split()[:1]) if compiler else find_tool("c++", "g++", "clang++")


def require_tools() -> None:
    """End the build if a tool is missing, with the command that installs it."""
    problems = []
    if not find_compiler():
        looked_for = os.environ.get("CXX") or "c++, g++, clang++"
        problems.append(f"no C++ compiler found (looked for {looked_for}); {INSTALL_COMPILER}")
    missing = [name for name in ("cmake", "ninja") if not find_tool(name)]
    missing += [name for name in ("torch", "pybind11") if importlib.util.find_spec(name) is None]
    if missing:
        problems.append(f"needed for the build, but not found: {', '.join(missing)}; {INSTALL_TOOLS}")
    if problems:
        lines = "\n".join(f"error: {problem}" for problem in problems)
        raise SystemExit(f"{lines}\nEVAKERNELS_NATIVE=off installs the package without compiled kernels.")


def read_mode(variable: str) -> str:
    """Return a mode from the environment."""
    mode = os.environ.get(variable, "auto")
    if mode not in MODES:
        raise SystemExit(f"error: {variable} must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


def native_skip_reason() -> str | None:
    """The reason to leave the native library out; None to build it."""
    mode = read_mode("EVAKERNELS_NATIVE")
    if mode == "off":
        return "switched off by EVAKERNELS_NATIVE=off"
    if sys.platform != "linux":
        reason = f"the native library is built on Linux only, this is {sys.platform}"
        if mode == "on":
            raise SystemExit(f"error: EVAKERNELS_NATIVE=on, but {reason}")
        return reason
    require_tools()
    return None


def read_output(*command: str) -> str:
    """Return the output of a program; empty if it is missing, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def find_nvcc() -> str | None:
    """Return nvcc: $CUDACXX, or found on PATH or in the usual folders."""
    if nvcc := os.environ.get("CUDACXX"):
        return find_tool(nvcc)
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return find_tool("nvcc", *(f"{home}/bin/nvcc" for home in homes if home))


def nvcc_archs(nvcc: str) -> list[int]:
    """The GPU architectures to compile for."""
    numbers = re.findall(r"^compute_(\d+)$", read_output(nvcc, "--list-gpu-arch"), flags=re.MULTILINE)
    return sorted(arch for arch in map(int, numbers) if arch >= OLDEST_GPU)


def nvcc_skip_reason() -> str | None:
    """Why there is no CUDA compiler to use; None if there is one."""
    nvcc = find_nvcc()
    if nvcc is None:
        return f"no CUDA compiler found (looked for {os.environ.get('CUDACXX') or 'nvcc'})"
    release = nvcc_release()
    if release is None or not nvcc_archs(nvcc):
        return "nvcc doesn't tell its version and the GPUs that it compiles for"
    if tuple(map(int, release.split("."))) < OLDEST_NVCC:
        return f"nvcc {release} is too old; needed is {'.'.join(map(str, OLDEST_NVCC))} or later"
    return None


def nvcc_release() -> str | None:
    """The release of nvcc, such as `12.8`; None if it doesn't print one."""
    release = re.search(r"release (\d+\.\d+)", read_output(str(find_nvcc()), "--version"))
    return release[1] if release else None


def find_gpus() -> list[int]:
    """The compute capabilities of the GPUs in this machine, 90 for 9.0; 0 if the driver doesn't report it."""
    output = read_output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    capabilities = {int(major + minor) for major, minor in re.findall(r"^(\d+)\.(\d)$", output, flags=re.MULTILINE)}
    # Containers may have a GPU and no nvidia-smi, and its older versions don't know of compute_cap.
    there = "GPU 0" in read_output("nvidia-smi", "-L") or Path("/dev/nvidia0").exists()
    return sorted(capabilities) or [0] * (there or any(Path("/proc/driver/nvidia/gpus").glob("*")))


def gpu_skip_reason() -> str | None:
    """Why no kernels are compiled for the GPUs of this machine; None if they are."""
    gpus = find_gpus()
    if not gpus:
        return "no NVIDIA GPU found (EVAKERNELS_CUDA=on builds for those of other machines)"
    if 0 < gpus[-1] < OLDEST_GPU:
        return f"the GPU's compute capability is {gpus[-1] / 10}; the kernels need {OLDEST_GPU / 10} or later"
    return None


def cuda_skip_reason() -> str | None:
    """The reason to leave the kernels for GPUs out; None to build them."""
    mode = read_mode("EVAKERNELS_CUDA")
    if mode == "off":
        return "switched off by EVAKERNELS_CUDA=off"
    reason = NATIVE_SKIP_REASON or nvcc_skip_reason()
    if reason and mode == "on":
        raise SystemExit(f"error: EVAKERNELS_CUDA=on, but {reason}")
    return reason or (gpu_skip_reason() if mode == "auto" else None)


def all_archs(supported: list[int]) -> list[str]:
    """Machine code for the GPUs of `ALL_GPUS` that nvcc knows, and PTX for what comes after them."""
    archs = [arch for arch in ALL_GPUS if arch in supported]
    if missing := [str(arch / 10) for arch in ALL_GPUS if arch not in supported]:
        print(f"nvcc knows no compute capability {', '.join(missing)}: PTX serves these")
    return [*(f"{arch}-real" for arch in archs[:-1]), str(archs[-1])]


def gpu_arch(gpu: int, supported: list[int]) -> str:
    """Machine code for this GPU or, where it is newer than nvcc, the PTX that its driver compiles."""
    return f"{gpu}-real" if gpu in supported else f"{max(arch for arch in supported if arch < gpu)}-virtual"


def cuda_archs() -> list[str]:
    """The GPUs to compile for, as CMake spells them."""
    supported = nvcc_archs(find_nvcc())
    text = os.environ.get("EVAKERNELS_CUDA_ARCHS", "").strip()
    if text in ("", "all"):
        gpus = [gpu for gpu in find_gpus() if gpu >= OLDEST_GPU] if not text else []
        return list(dict.fromkeys(gpu_arch(gpu, supported) for gpu in gpus)) or all_archs(supported)
    archs = re.split(r"[,; ]+", text)
    accepted = {f"{arch}{suffix}" for arch in supported for suffix in ("", "-real", "-virtual")}
    if wrong := [arch for arch in archs if arch not in accepted]:
        raise SystemExit(
            f"error: EVAKERNELS_CUDA_ARCHS must be all, or a list of {', '.join(map(str, supported))}, each alone or "
            f"with -real (machine code only) or -virtual (PTX only), got {', '.join(wrong)}"
        )
    return archs


def codes_to_generate(archs: list[str]) -> list[str]:
    """Return the options of nvcc for these archs.

    PTX generation takes most of the time, so the oldest GPU's PTX serves the others. No kernel has code for one GPU.
    """
    numbers = [int(arch.partition("-")[0]) for arch in archs]
    options = []
    for number, arch in zip(numbers, archs, strict=True):
        alike = [other for other in numbers if (other < NEXT_COMPILER) == (number < NEXT_COMPILER)]
        oldest = f"compute_{min(alike)}"
        codes = [] if arch.endswith("-virtual") else [f"sm_{number}"]
        codes += [] if arch.endswith("-real") else [oldest]
        options += [f"--generate-code=arch={oldest},code={code}" for code in codes]
    return options


def cuda_options() -> list[str]:
    """Return CMake's options for the CUDA kernels."""
    if CUDA_SKIP_REASON:
        return ["-DEVAKERNELS_CUDA=OFF"]
    return [
        "-DEVAKERNELS_CUDA=ON",
        f"-DCMAKE_CUDA_COMPILER={find_nvcc()}",
        f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(CUDA_ARCHS)}",
        f"-DEVAKERNELS_CUDA_CODES={';'.join(codes_to_generate(CUDA_ARCHS))}",
    ]


def forget_environment(build: Path) -> None:
    """Delete cached paths of another environment; CMake's --fresh would delete the objects too."""
    (build / "CMakeCache.txt").unlink(missing_ok=True)
    for compilers in (build / "CMakeFiles").glob("[0-9]*.*"):
        shutil.rmtree(compilers)


class BuildPython(build_py):
    """Add the record of the build's choices, which `evakernels.info()` reports."""

    def run(self) -> None:
        super().run()
        folder = (ROOT if self.editable_mode else Path(self.build_lib)) / PACKAGE
        if NATIVE_SKIP_REASON:
            # Libraries that an earlier build left in the source tree would be loaded in spite of the decision.
            for stale in [*folder.glob("_C.*.so"), *folder.glob(LIBRARY)]:
                stale.unlink()
        record = {
            "native": NATIVE_SKIP_REASON is None,
            "reason": NATIVE_SKIP_REASON,
            "cuda": CUDA_SKIP_REASON is None,
            "cuda_reason": CUDA_SKIP_REASON,
            "cuda_archs": CUDA_ARCHS,
            "cuda_release": None if CUDA_SKIP_REASON else nvcc_release(),
            "cuda_codes": [option.rpartition("=")[2] for option in codes_to_generate(CUDA_ARCHS)],
        }
        (folder / RECORD).write_text(json.dumps(record) + "\n")

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        return [*super().get_outputs(include_bytecode), str(Path(self.build_lib) / PACKAGE / RECORD)]


class BuildNative(build_ext):
    """Run CMake in place of the compiler commands of setuptools."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).parent.parent.resolve()
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


NATIVE_SKIP_REASON = native_skip_reason()
CUDA_SKIP_REASON = cuda_skip_reason()
CUDA_ARCHS = [] if CUDA_SKIP_REASON else cuda_archs()

setup(
    ext_modules=[] if NATIVE_SKIP_REASON else [Extension(MODULE, sources=[])],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
)
