"""`make dist`, tools/matrix.py and the workflows of a fork's CI."""

import json
import re
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from contextlib import nullcontext
from pathlib import Path

import build_wheel
import matrix
import pytest
import release
import yaml

ROOT = Path(__file__).parents[2]
WHEEL = "evakernels-0.1.0-cp311-cp311-manylinux_2_27_x86_64.whl"


def test_release_notes_are_one_section():
    text = "# Changelog\n\n## 1.1.0, unreleased\n\nnew\n\n### Added\n\n- x\n\n## 1.1\n\nolder\n\n## 1.0.0\n\noldest\n"
    assert release.release_notes(text, "1.1.0") == "new\n\n### Added\n\n- x\n"
    assert release.release_notes(text, "1.1") == "older\n"
    assert release.release_notes(text, "1.0.0") == "oldest\n"
    with pytest.raises(SystemExit, match=r"CHANGELOG\.md"):
        release.release_notes(text, "1.0")


def test_release_writes_hashes_and_notes(tmp_path, monkeypatch):
    """With a fake build and check."""
    out, results = tmp_path / "dist", iter(["fails: no kernel", "2.15.0"])
    monkeypatch.setattr(release, "build_all", lambda interpreters, out, cuda: (out / WHEEL).write_text("wheel"))
    monkeypatch.setattr(matrix, "try_out", lambda *arguments: next(results))
    monkeypatch.setattr(matrix, "install_uv", lambda folder: folder / "uv/bin/uv")
    monkeypatch.setattr(release, "require_committed", lambda: None)
    monkeypatch.setattr(sys, "argv", ["release.py", "--python", sys.executable, "--out", str(out)])
    with pytest.raises(SystemExit, match="check of a wheel"):
        release.main()
    assert [path.name for path in out.iterdir()] == [WHEEL]
    with pytest.raises(SystemExit, match="--out must be an empty folder"):
        release.main()
    (out / WHEEL).unlink()
    release.main()
    assert {path.name for path in out.iterdir()} == {WHEEL, "SHA256SUMS", "NOTES.md"}
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=out, check=True)
    assert (out / "NOTES.md").read_text().startswith("### Added")


def test_release_builds_from_one_sdist(tmp_path, monkeypatch):
    """Fake commands write the files; EVAKERNELS_CUDA=on doesn't reach the sdist."""
    calls = []

    def run(*command, **environment):
        calls.append((*command[:3], environment.get("EVAKERNELS_CUDA")))
        if command[1] == "-c":
            (tmp_path / "evakernels-0.1.0.tar.gz").touch()

    monkeypatch.setattr(build_wheel, "run", run)
    monkeypatch.setattr(build_wheel, "make_environment", lambda interpreter, *arguments: Path(interpreter))
    monkeypatch.setattr(build_wheel, "build_audited", lambda *arguments: calls.append(arguments))
    monkeypatch.setenv("EVAKERNELS_CUDA", "on")
    release.build_all({"3.11": "a", "3.12": "b"}, tmp_path, True)
    sdist = tmp_path / "evakernels-0.1.0.tar.gz"
    (python, option, code, cuda), *others = calls
    assert (python, option, cuda) == (Path("a"), "-c", "off")
    assert "build_sdist" in code
    assert others[::2] == [(Path(name), tmp_path, True, sdist) for name in "ab"]
    assert others[1::2] == [(Path(name), "-m", "twine", None) for name in "ab"]


def test_release_finds_pythons_that_run(tmp_path, monkeypatch):
    for version, status in (("3.11", 1), ("3.12", 0), ("3.9", 0)):
        (tmp_path / f"python{version}").write_text(f"#!/bin/sh\nexit {status}\n")
        (tmp_path / f"python{version}").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert release.find_pythons() == [tmp_path / "python3.12"]
    (tmp_path / "python3.12").unlink()
    with pytest.raises(SystemExit, match=r"--python must be given: none of Python 3\.11, .*3\.14 is on PATH"):
        release.find_pythons()


def test_release_refuses_uncommitted_files(tmp_path, monkeypatch):
    monkeypatch.setattr(build_wheel, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["release.py", "--out", str(tmp_path / "dist")])
    (tmp_path / "h100.json").touch()
    release.require_committed()
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    with pytest.raises(SystemExit, match=r"must have no uncommitted files: git status\n\?\? h100\.json"):
        release.main()
    (tmp_path / "h100.json").unlink()
    release.require_committed()


def write_wheel(path, text, name="evakernels/x.py"):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, text)


def test_wheel_names_no_folder_of_this_machine(tmp_path):
    for text in ("x = 1", f"x = '{build_wheel.ROOT}'", f"x = '{tempfile.gettempdir()}/x'"):
        write_wheel(tmp_path / WHEEL, text)
        with nullcontext() if text == "x = 1" else pytest.raises(SystemExit, match=r"evakernels/x\.py: /"):
            build_wheel.check_folders(Path(sys.executable), tmp_path / WHEEL)


@pytest.mark.parametrize(
    ("platform", "file", "accepted"),
    [
        ("manylinux_2_27_x86_64.manylinux_2_28_x86_64", "evakernels/_ops.so", True),
        ("manylinux_2_31_x86_64", "evakernels/_ops.so", False),
        ("linux_x86_64", "evakernels/_ops.so", False),
        ("manylinux_2_28_x86_64", "evakernels.libs/libgomp.so", False),
    ],
)
def test_wheel_runs_with_an_old_glibc(platform, file, accepted, tmp_path, monkeypatch):
    """A fake auditwheel gives the tag."""
    name = f"evakernels-0.1.0-cp311-cp311-{platform}.whl"

    def repair(*command, **environment):
        folder = command[command.index("--wheel-dir") + 1]
        folder.mkdir()
        write_wheel(folder / name, "", file)

    monkeypatch.setattr(build_wheel, "run", repair)
    monkeypatch.setattr(build_wheel, "build", lambda *arguments: None)
    monkeypatch.setattr(build_wheel, "check_folders", lambda *arguments: None)
    with nullcontext() if accepted else pytest.raises(SystemExit, match=f"glibc 2.28 .* got {name}"):
        build_wheel.build_audited(Path(sys.executable), tmp_path / "dist", False)
    assert (tmp_path / "dist" / name).exists() == accepted


def test_matrix_tries_all_pairs_one_at_a_time(tmp_path, monkeypatch, capsys):
    """A fake uv makes environments and fills its cache, which is trimmed after failures too."""
    seen, trimmed = [], []

    def run(command, **options):
        folder, program = options["cwd"], str(command[1])
        if program == "venv":
            seen.append([len(list(folder.glob(name))) for name in ("environment", "cache")])
            command[-1].mkdir()
            (folder / "cache").mkdir(exist_ok=True)
        if program == "cache":
            trimmed.append(command[-2:])
        if program == "pip" and command[-1].name == "broken.whl":
            raise subprocess.CalledProcessError(1, command, "", "first line\nno such package\n")
        report = {"file": str(folder / "environment/evakernels"), "torch": f"{len(seen)}"}
        return subprocess.CompletedProcess(command, 0, json.dumps(report), "")

    monkeypatch.setattr(matrix, "install_uv", lambda folder: folder / "uv/bin/uv")
    monkeypatch.setattr(matrix.subprocess, "run", run)
    found = {"3.11": tmp_path / "a.whl", "3.12": tmp_path / "broken.whl"}
    results = matrix.try_all(found, {"3.11": "a", "3.12": "b"}, ["2.11", "2.12"])
    assert seen == [[0, 0], [0, 1], [0, 0], [0, 1]]
    assert trimmed == [matrix.OWN_BINARIES] * 4
    lines = matrix.format_table(results).splitlines()
    assert lines[2:] == ["| 3.11 | 1 | 3 |", "| 3.12 | fails: no such package | fails: no such package |"]


def test_ci_calls_targets_for_supported_pythons():
    versions = release.supported_pythons()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={versions[0]}"
    assert f"Python {versions[0]} to {versions[-1]}" in (ROOT / "docs/install.md").read_text()
    texts = [(ROOT / f".github/workflows/{name}.yml").read_text() for name in ("ci", "weekly")]
    jobs = yaml.safe_load(texts[0])["jobs"] | yaml.safe_load(texts[1])["jobs"]
    assert jobs["wheels"]["strategy"]["matrix"]["python"] == versions
    assert jobs["newest"]["strategy"]["matrix"]["python"] == [versions[0], versions[-1]]
    (targets,) = re.findall(r"^\.PHONY: ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    steps = [step for job in jobs.values() for step in job["steps"]]
    called = {step["run"].split()[1] for step in steps if "run" in step}
    assert called == {"test", "dist", "weekly", "newest"} & set(targets.split())
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    assert "secrets" not in "".join(texts)
