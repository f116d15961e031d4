"""Makes one folder of what the check of a GPU needs on a machine that has one, and no network: build/gpu-bundle.

    python tools/gpu_bundle.py [--python 3.12] [--arch 90 ...] [--limit 60] [--out build/gpu-bundle]

It holds the compiled libraries for that machine's Python and GPU, wheels of the packages that it is likely to lack, and
those of the peers as far as the limit allows, the most valuable first; `benchmarks/gpu_check/bundle.py` tells the
layout. Neither torch nor Triton is in it. What the build needs is kept in build/gpu-bundle-tools for the next time.
"""

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import matrix
import wheel
from requirements import requirements

ROOT = wheel.ROOT
MIB = 1 << 20
DRIVER = "drive_gpu"  # CMake's target for the program that drives the kernels under sanitizers
GLIBCS = range(17, 40)
"""Minor versions of glibc 2 that a wheel may ask for; pip takes none for another."""


@dataclass(frozen=True)
class Group:
    """Packages that are of use together only.

    Attributes:
        names: what they are called in the manifest, and on PyPI.
        more: what they need besides, and the machine lacks.
        whole: pip adds all that they require; else it is on the machine already, as torch is.
        needed: without them the check can't run.
        early: betas are taken, as there is nothing else.
    """

    names: tuple[str, ...]
    more: tuple[str, ...] = ()
    whole: bool = False
    needed: bool = False
    early: bool = False


# In the order of their value: what of the peers doesn't fit is left out.
GROUPS = (
    Group(("pydantic",), whole=True, needed=True),
    Group(("ftfy",), whole=True, needed=True),
    Group(("open_clip_torch",), needed=True),
    Group(("liger-kernel",)),
    Group(("inf-cl",)),
    Group(("xformers",)),
    Group(("cut-cross-entropy",)),
    Group(
        ("flash-attn-4", "quack-kernels"),
        (
            *("apache-tvm-ffi", "torch-c-dlpack-ext"),
            *("nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-base", "nvidia-cutlass-dsl-libs-core"),
            "nvidia-cutlass-dsl-libs-cu13",
        ),
        early=True,
    ),
)
WITHOUT_WHEELS = {
    "apex": "PyPI has no wheel of NVIDIA's Apex",
    "flash-attn": "PyPI has its sources only, which compile for an hour",
}


def reader() -> ModuleType:
    """benchmarks/gpu_check/bundle.py, without the package around it, which imports torch."""
    sys.path.insert(0, str(ROOT))
    spec = importlib.util.spec_from_file_location("bundle", ROOT / "benchmarks/gpu_check/bundle.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["bundle"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


bundle = reader()


@contextmanager
def phase(what: str) -> Iterator[None]:
    """What tools/phase.sh does, for a block: a line when it begins, its time at the end, and its output if it fails.

    A command that fails ends the program with a line that names it.
    """
    log = ROOT / "build/logs" / (re.sub(r"\W+", "-", what).strip("-") + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"· {what} ...", flush=True)
    began, output = time.monotonic(), [os.dup(1), os.dup(2)]
    try:
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            yield
    except (Exception, SystemExit) as exc:
        restore(output)
        lines = log.read_text(errors="replace").splitlines()
        told = [line.strip() for line in lines if " error: " in line]  # the compiler's
        print("\n".join(told[:20] or lines[-60:]), flush=True)
        seconds = time.monotonic() - began
        print(f"✗ {what} failed after {seconds:.0f} s; all that it printed is in {log}", file=sys.stderr, flush=True)
        if isinstance(exc, subprocess.CalledProcessError):
            raise SystemExit(f"error: {Path(exc.cmd[0]).name} ended with {exc.returncode}") from None
        raise
    restore(output)
    print(f"✓ {what}: {time.monotonic() - began:.0f} s", flush=True)


def restore(output: Sequence[int]) -> None:
    for number, saved in enumerate(output, start=1):
        os.dup2(saved, number)
        os.close(saved)


# --- the libraries --------------------------------------------------------------------------------------------------


def find_python(wanted: str) -> tuple[str, Path]:
    """The version and the path of the interpreter that is meant: a version such as 3.12, or a path."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    is_version = re.fullmatch(r"3\.\d+", wanted)
    path = matrix.pythons([wanted], [])[wanted] if is_version else wanted
    try:
        version = subprocess.run([path, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as exc:
        told = (getattr(exc, "stderr", "") or str(exc)).strip().splitlines()[0]
        raise SystemExit(f"error: {path} doesn't run: {told}; name another by --python PATH") from None
    if is_version and version != wanted:
        raise SystemExit(f"error: {path} is Python {version}; name that of {wanted} by --python PATH")
    return version, Path(path).absolute()


def with_tools(version: str, interpreter: Path) -> Path:
    """A Python of this version that can build: this one, or that of an environment that is kept."""
    folder = ROOT / "build/gpu-bundle-tools" / version
    for python in (interpreter, folder / "bin/python"):
        if python.exists() and wheel.has_modules(python, *wheel.BUILD_MODULES):
            return python
    shutil.rmtree(folder, ignore_errors=True)
    with phase(f"Installing what the build needs for Python {version}"):
        # Its headers are those that all later ones have.
        return wheel.environment(interpreter, folder, torch=f"torch=={matrix.OLDEST_TORCH}.*")


def check_build(python: Path, archs: Sequence[str]) -> None:
    """Ends with one line where setup.py refuses: without nvcc, or for a GPU that it doesn't know."""
    asked = build_environment(archs)
    command = [python, "setup.py", "--quiet", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | asked, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(matrix.last_line(done.stderr))


def build_environment(archs: Sequence[str]) -> dict[str, str]:
    return {"EVAKERNELS_NATIVE": "on", "EVAKERNELS_CUDA": "on", "EVAKERNELS_CUDA_ARCHS": ",".join(archs)}


def add_libraries(python: Path, archs: Sequence[str], target: Path) -> None:
    """Compiles, and takes from the wheel what the checkout lacks."""
    os.environ.update(build_environment(archs))
    (target / "wheel").mkdir()
    built = wheel.build(python, target / "wheel/plain", cuda=True)
    unpacked = target / "unpacked"
    bundle.unpack(built, unpacked)
    (target / "libraries").mkdir()
    found = unpacked / "evakernels"
    for path in (found / "_ops.so", found / "_build.json", *found.glob("_C.*.so")):
        shutil.move(path, target / "libraries")
    shutil.rmtree(unpacked)
    shutil.rmtree(target / "wheel")


def build_folder(version: str) -> Path:
    """Where setup.py has CMake compile."""
    return ROOT / "build" / f"cmake-cpython-{version.replace('.', '')}"


def add_hunters(build: Path, target: Path) -> str:
    """Compiles the driver of the kernels; returns why there is none, or nothing."""
    if DRIVER not in (build / "build.ninja").read_text():
        return "this checkout has no such program"
    cache = (build / "CMakeCache.txt").read_text()
    cmake = re.search(r"^CMAKE_COMMAND:INTERNAL=(.*)$", cache, flags=re.MULTILINE)
    assert cmake
    wheel.run(cmake[1], "--build", build, "--target", DRIVER)
    (target / "hunters").mkdir()
    shutil.copy(build / DRIVER, target / "hunters")
    return ""


def nvcc_release(build: Path) -> str:
    """That of the compiler that CMake found."""
    told = next(build.glob("CMakeFiles/*/CMakeCUDACompiler.cmake")).read_text()
    found = re.search(r'CMAKE_CUDA_COMPILER_VERSION "([\d.]+)"', told)
    return found[1] if found else ""


def add_predictions(arch: str, target: Path) -> str:
    """Writes what the roofline predicts of the kernels for a GPU; returns why it can't be known, or nothing."""
    python = ROOT / ".venv/bin/python"
    if not python.exists():
        return "they are counted with the packages of .venv, which `make test` sets up"
    name = f"sm_{arch.partition('-')[0]}"
    command = [python, "-m", "benchmarks.audit.prediction", name, target / "predictions.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return matrix.last_line(done.stderr) if done.returncode else ""


# --- the wheels -----------------------------------------------------------------------------------------------------


def download(python: Path, version: str, group: Group, folder: Path) -> str:
    """Fetches a group's wheels into a folder; returns why that can't be done, or nothing."""
    known = {re.split(r"[<>=!~\[]", text)[0]: text for text in requirements("clip")}
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in GLIBCS] + ["manylinux2014_x86_64"]
    options = [
        *("--quiet", "--only-binary", ":all:", "--python-version", version, "--implementation", "cp"),
        *(option for name in platforms for option in ("--platform", name)),
        *([] if group.whole else ["--no-deps"]),
        *(["--pre"] if group.early else []),
    ]
    wanted = [known.get(name, name) for name in (*group.names, *group.more)]
    command = [python, "-m", "pip", "download", *options, "--dest", folder, *wanted]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return last_error(done.stderr) if done.returncode else ""


def last_error(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.startswith("ERROR")]
    return lines[-1].removeprefix("ERROR: ") if lines else matrix.last_line(text) or "pip failed without a word"


def add_wheels(python: Path, version: str, target: Path, room: int) -> dict[str, str]:
    """Fetches what fits into `room` bytes, in the order of `GROUPS`; returns what was left out, and why."""
    left_out = dict(WITHOUT_WHEELS)
    (target / "wheels").mkdir()
    for group in GROUPS:
        folder = target / "download"
        reason = download(python, version, group, folder)
        size = size_of(folder)
        if not reason and size > room:
            reason = f"{size / MIB:.1f} MiB with what it needs, and {max(room, 0) / MIB:.1f} are left"
        if reason and group.needed:
            raise SystemExit(f"error: the check needs {group.names[0]}: {reason}")
        if reason:
            left_out |= dict.fromkeys(group.names, reason)
        else:
            room -= size
            for path in folder.iterdir():
                path.replace(target / "wheels" / path.name)
        shutil.rmtree(folder, ignore_errors=True)
    return left_out


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def packages_in(folder: Path) -> dict[str, dict[str, Any]]:
    """Version and size by distribution, as wheels' names tell them."""
    found = {}
    for path in sorted(folder.glob("*.whl")):
        name, version = path.name.split("-")[:2]
        found[name.replace("_", "-").lower()] = {"version": version, "bytes": path.stat().st_size}
    return found


# --- the whole ------------------------------------------------------------------------------------------------------


def commit() -> str:
    """Of this checkout, with `-dirty` where tracked files differ from it; empty outside of git."""
    command = ["git", "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def write_manifest(target: Path, **told: Any) -> None:
    files = {
        path.relative_to(target).as_posix(): bundle.fingerprint(path)
        for path in sorted(target.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "schema": bundle.SCHEMA,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "sources": bundle.sources_hash(ROOT),
        "torch": matrix.OLDEST_TORCH,
        **told,
        "files": files,
        "packages": packages_in(target / "wheels"),
    }
    (target / bundle.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


def make(version: str, python: Path, archs: Sequence[str], target: Path, limit: int) -> None:
    """Fills a new folder, of `limit` bytes at most."""
    build = build_folder(version)
    with phase(f"Compiling the kernels for {', '.join(archs)}, Python {version}"):
        add_libraries(python, archs, target)
        no_hunters = add_hunters(build, target)
    with phase("Downloading wheels"):
        left_out = add_wheels(python, version, target, limit - size_of(target) - MIB // 16)  # the rest: the manifest
    with phase("Counting what the kernels do"):
        no_predictions = add_predictions(archs[0], target)
    left_out |= {name: why for name, why in ((DRIVER, no_hunters), ("predictions", no_predictions)) if why}
    write_manifest(target, python=version, archs=list(archs), nvcc=nvcc_release(build), left_out=left_out)


def show(folder: Path) -> None:
    """Prints what is in a bundle, and what isn't."""
    found = bundle.read(folder)
    for path, told in found.files.items():
        print(f"{told['bytes'] / MIB:8.2f} MiB  {path}")
    for name, reason in found.left_out.items():
        print(f"    left out  {name}: {reason}")
    print(f"{size_of(folder) / MIB:8.2f} MiB  {folder}, bundle {found.name} of {found.commit or 'no commit'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="3.12", help="version, found on PATH, or path (default: 3.12)")
    parser.add_argument("--arch", nargs="+", default=["90"], help="compute capabilities times ten (default: 90)")
    parser.add_argument("--limit", type=float, default=60, help="size in MiB (default: 60)")
    parser.add_argument("--out", type=Path, default=ROOT / "build/gpu-bundle", help="default: build/gpu-bundle")
    arguments = parser.parse_args()
    archs = [arch if "-" in arch else f"{arch}-real" for arch in arguments.arch]
    version, interpreter = find_python(arguments.python)
    python = with_tools(version, interpreter)
    check_build(python, archs)
    out = arguments.out.absolute()
    target = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    try:
        make(version, python, archs, target, int(arguments.limit * MIB))
        shutil.rmtree(out, ignore_errors=True)
        target.rename(out)
    finally:
        shutil.rmtree(target, ignore_errors=True)
    show(out)


if __name__ == "__main__":
    main()
