"""The kernels by themselves, driven by a program without Python, under each tool of NVIDIA's compute-sanitizer."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.stage import Failure, Refusal, Session, Settings, Unit
from benchmarks.origin import ROOT

SECONDS = 60

PROGRAM = "drive_gpu"
FAMILIES = ("norms", "rope_attention", "swiglu", "token_dropout", "gelu", "lamb")
TOOLS = ("plain", "memcheck", "synccheck", "racecheck", "initcheck")
_BUILT = ROOT / "build/gpu-check-hunters"
_SUMMARY = re.compile(r"=+ (?:\w+ )?SUMMARY: (.*)")
_COMPILE = "compile"
_LIMIT = 60.0
_CUDA = "/usr/local/cuda/bin"
_COMPLAINTS = 42
"""Exit status that the sanitizer is asked for where it has found something."""


def units(settings: Settings) -> list[Unit]:
    """One for each tool; before them, where the bundle has no program, one that compiles it."""
    found = [
        Unit("hunters", tool, seconds=60, limit=_LIMIT, value=48 - number, alone=False)
        for number, tool in enumerate(TOOLS)
    ]
    if binary(settings).exists() or settings.rehearsal:
        return found
    return [Unit("hunters", _COMPILE, seconds=300, limit=300, value=49), *found]


def binary(settings: Settings) -> Path:
    """Where the bundle has the program, CMake's target `PROGRAM`; else where a unit compiles it."""
    found = Path(settings.bundle) / "hunters" / PROGRAM
    return found if settings.bundle and found.exists() else _BUILT / PROGRAM


def run(unit: Unit, session: Session) -> None:
    """One run of the program for each family, or its compilation."""
    if unit.name == _COMPILE:
        session.case("nvcc", lambda: compile_program(_BUILT))
        return
    for family in FAMILIES[:1] if session.settings.rehearsal else FAMILIES:
        session.case(family, partial(_drive, session.settings, family, unit.name))


def _drive(settings: Settings, family: str, tool: str) -> dict[str, Any]:
    command = [str(_program(settings)), family]
    if tool != "plain":
        command = [_sanitizer(), "--tool", tool, "--error-exitcode", str(_COMPLAINTS), "--print-limit", "10", *command]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_LIMIT - 5)
    except subprocess.TimeoutExpired as exc:
        raise Failure(f"no end after {_LIMIT - 5:g} s", {"output": _text(exc.stdout)[-1500:]}) from None
    output = done.stdout + done.stderr
    found = _SUMMARY.search(output)
    data = {"status": done.returncode, "summary": found[1] if found else "", "output": ""}
    if done.returncode == 0 and "all right" in output and (found or tool == "plain"):
        return data
    raise Failure(_complaint(output, done.returncode), data | {"output": output[:3000]})


def _complaint(output: str, status: int) -> str:
    """The first line that says what is wrong."""
    if status < 0:
        return f"died of signal {-status}"
    lines = [line.lstrip("= ") for line in output.splitlines() if line.strip("= ")]
    telling = (line for line in lines if re.search(r"wrong: |\b[Ee]rror|Invalid|hazard|Uninitialized|Barrier", line))
    return next(telling, lines[-1] if lines else "") + f" (exit status {status})"


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), _CUDA])


def _text(output: bytes | str | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def _sanitizer() -> str:
    found = shutil.which("compute-sanitizer", path=_path())
    if found is None:
        raise Refusal(f"no compute-sanitizer on PATH or in {_CUDA}")
    return found


def _program(settings: Settings) -> Path:
    found = binary(settings)
    if not found.exists():
        raise Refusal(f"no {found}: not in the bundle, and not compiled")
    return found


def compile_program(folder: Path, arch: str = "native") -> None:
    """Compiles the program for a GPU (`sm_90`; this machine's) with nvcc alone, into `folder`.

    Raises:
        Refusal: there is no nvcc.
        Failure: it can't compile; the data has what it printed.
    """
    nvcc = shutil.which("nvcc", path=_path())
    if nvcc is None:
        raise Refusal("no nvcc to compile the program with, and no bundle that has it")
    folder.mkdir(parents=True, exist_ok=True)
    kernels, driver = ROOT / "csrc/cuda", ROOT / "tests/cuda"
    sources = [*kernels.glob("*.cu"), *kernels.glob("*.cpp"), *driver.glob("drive*.cpp"), driver / "gpu_memory.cpp"]
    options = [f"-arch={arch}", "-std=c++20", "-lineinfo", f"-I{ROOT / 'csrc'}"]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        _call([nvcc, *options, "-c", str(source), "-o", str(target)])
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(target) for target in pool.map(compile_one, sources)]
    _call([nvcc, f"-arch={arch}", *objects, "-o", str(folder / f"{PROGRAM}.new")])
    (folder / f"{PROGRAM}.new").rename(folder / PROGRAM)


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        text = done.stdout + done.stderr
        raise Failure(f"nvcc: {text.strip().splitlines()[-1:]}", {"command": command, "output": text[-3000:]})
