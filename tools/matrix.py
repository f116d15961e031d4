"""Try the wheels with every Python and torch that they are for, and print a table in Markdown.

    python tools/matrix.py dist [--python PATH ...] [--torch VERSION ...]

For each torch and each Python with a wheel in the folder: a new environment, torch and the wheel with its requirements,
and `tools/wheel_check.py`, outside of the source tree. uv installs, from PyPI or UV_DEFAULT_INDEX. An environment takes
up to 6 GB. One exists at a time, and its packages are links into a cache that is emptied after each torch. uv finds
Pythons on PATH; `--python` names others.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from build_wheel import CONSTRAINTS

CHECK = Path(__file__).with_name("wheel_check.py").resolve()
TORCHES = ("2.11", "2.12", "2.13", "2.14", "2.15")
OWN_BINARIES = ("torch", "triton")
"""Packages with a wheel for each Python."""


def wheels(folder: Path) -> dict[str, Path]:
    """Return the wheels by Python, as 3.11."""
    found = {}
    for path in sorted(folder.glob("evakernels-*.whl")):
        if tag := re.search(r"-cp3(\d+)-cp3\1-", path.name):
            found[f"3.{tag[1]}"] = path.resolve()
    if not found:
        raise SystemExit(f"error: no wheel of evakernels with compiled kernels in {folder}")
    return found


def find_python(python: Path | str) -> tuple[str, str]:
    """Return the version of an interpreter, as 3.12, and its absolute path."""
    code = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
    try:
        found = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as exc:
        raise SystemExit(f"error: --python must be a version on PATH or an interpreter, got {python}: {exc}") from None
    version, _, path = found.strip().partition(" ")
    return version, path


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""


def install_uv(folder: Path) -> Path:
    uv = folder / "uv/bin/uv"
    subprocess.run([sys.executable, "-m", "venv", uv.parents[1]], check=True)
    pip = [uv.with_name("python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--constraint", CONSTRAINTS, "uv"], check=True)
    return uv


def try_out(uv: Path, python: str, torch: str, wheel: Path) -> str:
    """Return the version of torch in a new environment in which `CHECK` passes, or `fails: ...`."""
    folder = uv.parents[2]
    own = folder / "environment/bin/python"
    environment = os.environ | {"UV_CACHE_DIR": str(folder / "cache"), "UV_PYTHON_DOWNLOADS": "never"}

    def call(*command: str | Path) -> str:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    requirement = "torch" if torch == "newest" else f"torch=={torch}.*"
    try:
        call(uv, "venv", "--quiet", "--python", python, own.parents[1])
        call(uv, "pip", "install", "--quiet", "--constraint", CONSTRAINTS, "--python", own, requirement, wheel)
        report = json.loads(last_line(call(own, "-I", CHECK)))
    except subprocess.CalledProcessError as exc:
        return f"fails: {last_line(exc.stderr) or f'{exc.cmd[1:]} ended with {exc.returncode}'}"
    finally:
        shutil.rmtree(own.parents[1], ignore_errors=True)
        clean = (uv, "cache", "clean", "--quiet", *OWN_BINARIES)
        subprocess.run(clean, cwd=folder, env=environment, capture_output=True, check=False)
    if not Path(report["file"]).is_relative_to(folder):
        return f"fails: the evakernels that was imported is {report['file']}"
    return str(report["torch"])


def try_all(found: dict[str, Path], interpreters: dict[str, str], torches: list[str]) -> dict[tuple[str, str], str]:
    """Return the results of `try_out` by Python and torch; uv finds Pythons without an interpreter."""
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        uv = install_uv(folder)
        for torch in torches:
            for version, wheel in found.items():
                print(f"Python {version}, torch {torch}: ", end="", file=sys.stderr, flush=True)
                results[version, torch] = try_out(uv, interpreters.get(version, version), torch, wheel)
                print(results[version, torch], file=sys.stderr, flush=True)
            shutil.rmtree(folder / "cache", ignore_errors=True)
    return results


def format_table(results: dict[tuple[str, str], str]) -> str:
    """Return a row for each Python, a column for each torch."""
    versions, torches = ({key[axis]: None for key in results} for axis in (0, 1))
    lines = [f"| Python | {' | '.join(f'torch {torch}' for torch in torches)} |", "|---" * (len(torches) + 1) + "|"]
    lines += [f"| {version} | {' | '.join(results[version, torch] for torch in torches)} |" for version in versions]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="the folder with a wheel for each Python")
    parser.add_argument("--python", type=Path, action="append", default=[], help="an interpreter that isn't on PATH")
    parser.add_argument("--torch", action="append", help=f"versions, or newest (default: {', '.join(TORCHES)})")
    arguments = parser.parse_args()
    interpreters = dict(map(find_python, arguments.python))
    results = try_all(wheels(arguments.wheels), interpreters, arguments.torch or list(TORCHES))
    print(format_table(results))
    sys.exit(any(result.startswith("fails") for result in results.values()))


if __name__ == "__main__":
    main()
