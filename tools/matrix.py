"""Tries the wheels with every Python and torch that they are for, and prints a table in Markdown.

    python tools/matrix.py dist [--python PATH ...] [--torch VERSION ...] [--out matrix.md]

For each Python that has a wheel in the folder, and each torch: a new environment, torch and numpy from the package
index, the wheel, and then `tools/wheel_check.py`, outside of the source tree. An environment takes up to 6 GB; one
exists at a time. Pythons are found on PATH as python3.11 and so on; `--python` names others.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CHECK = Path(__file__).with_name("wheel_check.py").resolve()
OLDEST_TORCH = "2.11"
HEADER = "| Python | torch | its CUDA | compiled library | ops against the reference | seconds to the first op |"


def wheels(folder: Path) -> dict[str, Path]:
    """By Python, as 3.11."""
    found = {}
    for path in sorted(folder.glob("evakernels-*.whl")):
        if tag := re.search(r"-cp3(\d+)-cp3\1-", path.name):
            found[f"3.{tag[1]}"] = path.resolve()
    if not found:
        raise SystemExit(f"error: no wheel of evakernels with compiled kernels in {folder}")
    return found


def pythons(versions: list[str], named: list[Path]) -> dict[str, str]:
    """The interpreter of each version."""
    code = "import sys; print('%d.%d' % sys.version_info[:2])"
    found = {}
    for path in named:
        answer = subprocess.run([path, "-c", code], capture_output=True, text=True, check=True)
        found[answer.stdout.strip()] = str(path)
    for version in versions:
        if version not in found:
            found[version] = shutil.which(f"python{version}") or ""
        if not found[version]:
            raise SystemExit(f"error: no python{version} on PATH, and none given by --python")
    return found


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1] if text.strip() else ""


def try_out(python: str, torch: str, wheel: Path) -> dict[str, Any]:
    """What `CHECK` reports in a new environment, or an `error`."""
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "environment/bin/python"
        requirement = "torch" if torch == "newest" else f"torch=={torch}.*"
        commands: tuple[list[str | Path], ...] = (
            [python, "-m", "venv", own.parents[1]],
            [own, "-m", "pip", "install", "--quiet", "--no-compile", requirement, "numpy"],
            [own, "-m", "pip", "install", "--quiet", "--no-deps", wheel],
            [own, "-I", CHECK],
        )
        for command in commands:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode:
                return {"error": last_line(done.stderr) or f"{command[1:]} ended with {done.returncode}"}
        report: dict[str, Any] = json.loads(last_line(done.stdout))
        if not Path(report["file"]).is_relative_to(folder):
            return {"error": f"the evakernels that was imported is {report['file']}"}
        return report


def row(version: str, torch: str, report: dict[str, Any]) -> str:
    if "error" in report:
        return f"| {version} | {torch} | | fails: {report['error']} | | |"
    cells = (
        report["python"],
        report["torch"],
        report["cuda"] or "CPU build",
        f"loaded, {report['isa']}",
        f"{len(report['ops'])} families",
        f"{sum(report['seconds'].values()):.1f}",
    )
    return f"| {' | '.join(cells)} |"


def processor() -> str:
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), flags=re.MULTILINE)
    return names[0] if names else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="the folder with a wheel for each Python")
    parser.add_argument("--python", type=Path, action="append", default=[], help="an interpreter that isn't on PATH")
    parser.add_argument("--torch", action="append", help=f"versions (default: {OLDEST_TORCH}, 2.13, newest)")
    parser.add_argument("--out", type=Path, help="a file for the table too")
    arguments = parser.parse_args()
    found = wheels(arguments.wheels)
    interpreters = pythons(list(found), arguments.python)
    lines = [HEADER, "|---" * HEADER[1:].count("|") + "|"]
    failed = False
    for version, wheel in found.items():
        for torch in arguments.torch or (OLDEST_TORCH, "2.13", "newest"):
            print(f"Python {version}, torch {torch} ...", file=sys.stderr, flush=True)
            report = try_out(interpreters[version], torch, wheel)
            failed |= "error" in report
            lines.append(row(version, torch, report))
            print(lines[-1], file=sys.stderr, flush=True)
    machine = f"{processor()}, {len(os.sched_getaffinity(0))} cores"
    lines += ["", f"{datetime.date.today()}, {machine}, `python tools/matrix.py`; wheels: "]
    lines[-1] += ", ".join(f"`{wheel.name}`" for wheel in found.values()) + "."
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)
    sys.exit(failed)


if __name__ == "__main__":
    main()
