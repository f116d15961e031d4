"""`make release`, tools/matrix.py and the workflow of a fork's CI."""

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

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


def test_matrix_tries_all_pairs_one_at_a_time(tmp_path, monkeypatch, capsys):
    """A fake uv makes environments and fills its cache."""
    seen = []

    def run(command, **options):
        folder, program = options["cwd"], str(command[1])
        if program == "venv":
            seen.append([len(list(folder.glob(name))) for name in ("environment", "cache")])
            command[-1].mkdir()
            (folder / "cache").mkdir(exist_ok=True)
        if program == "pip" and command[-1].name == "broken.whl":
            raise subprocess.CalledProcessError(1, command, "", "first line\nno such package\n")
        report = {"file": str(folder / "environment/evakernels"), "torch": f"{len(seen)}"}
        return subprocess.CompletedProcess(command, 0, json.dumps(report), "")

    monkeypatch.setattr(matrix, "install_uv", lambda folder: folder / "uv/bin/uv")
    monkeypatch.setattr(matrix.subprocess, "run", run)
    found = {"3.11": tmp_path / "a.whl", "3.12": tmp_path / "broken.whl"}
    results = matrix.try_all(found, {"3.11": "a", "3.12": "b"}, ["2.11", "2.12"])
    assert seen == [[0, 0], [0, 1], [0, 0], [0, 1]]
    lines = matrix.format_table(results).splitlines()
    assert lines[2:] == ["| 3.11 | 1 | 3 |", "| 3.12 | fails: no such package | fails: no such package |"]


def test_ci_calls_targets_for_supported_pythons():
    versions = release.supported_pythons()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == f">={versions[0]}"
    assert f"Python {versions[0]} to {versions[-1]}" in (ROOT / "docs/install.md").read_text()
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    assert jobs["wheels"]["strategy"]["matrix"]["python"] == versions
    (targets,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    steps = [step for job in jobs.values() for step in job["steps"]]
    called = {step["run"].split()[1] for step in steps if "run" in step}
    assert called == {"test", "release"} & set(targets.split())
    assert all(re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"]) for step in steps if "uses" in step)
    assert "secrets" not in text
