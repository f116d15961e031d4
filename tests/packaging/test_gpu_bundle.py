"""What travels to a machine that has a GPU and no network."""

import os
import re
import subprocess
import sys
from pathlib import Path

import gpu_bundle
import pytest

ROOT = Path(__file__).parents[2]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def packed(tmp_path, monkeypatch):
    """`pack_wheels` with a pip that makes wheels of these sizes, or fails with a message; returns the names."""

    def pack(sizes, room):
        def run(command, **options):
            folder, *wanted = command[command.index("--dest") + 1 :]
            folder.mkdir(exist_ok=True)
            names = [re.match(r"[\w-]+", text)[0] for text in wanted]
            failures = [sizes[name] for name in names if isinstance(sizes.get(name), str)]
            for name in names:
                if not failures:
                    (folder / f"{name}-1.0-py3-none-any.whl").write_bytes(b"x" * sizes.get(name, 10))
            return subprocess.CompletedProcess(command, len(failures), "", *failures or [""])

        monkeypatch.setattr(gpu_bundle.subprocess, "run", run)
        gpu_bundle.pack_wheels(Path("python"), "3.12", tmp_path, room)
        return {path.name.partition("-1.0")[0] for path in (tmp_path / "wheels").iterdir()}

    return pack


def test_peers_that_do_not_fit_are_left_out(packed, capsys):
    names = packed({"xformers": 500, "cut-cross-entropy": "no such wheel"}, room=200)
    assert names == {*gpu_bundle.NEEDED, "open_clip_torch", "liger-kernel", "inf-cl"}
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["left out xformers: 0.0 MiB, and 0.0 are left", "left out cut-cross-entropy: no such wheel"]


@pytest.mark.parametrize("size", ["no such wheel", 500])
def test_needed_packages_are_not_left_out(packed, size):
    with pytest.raises(SystemExit, match=r"error: the check needs .*pydantic"):
        packed({"pydantic": size}, room=100)


def test_unfinished_bundle_leaves_the_former_one(tmp_path, monkeypatch):
    def fail(*arguments):
        raise SystemExit("error: the compiler failed")

    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "csrc.sha256").write_text("former")
    monkeypatch.setattr(gpu_bundle, "build_python", lambda interpreter, version: interpreter)
    monkeypatch.setattr(gpu_bundle, "require_nvcc", lambda python, archs: None)
    monkeypatch.setattr(gpu_bundle, "pack_libraries", fail)
    monkeypatch.setattr(sys, "argv", ["gpu_bundle.py", "--python", sys.executable, "--out", str(folder)])
    with pytest.raises(SystemExit, match="the compiler failed"):
        gpu_bundle.main()
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    assert (folder / "csrc.sha256").read_text() == "former"


def run(*arguments, **environment):
    """The one line that make's command prints where it can't begin."""
    command = [sys.executable, ROOT / "tools/gpu_bundle.py", *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_unknown_python(tmp_path):
    assert "--python must be" in run("--python", "3.97")
    assert "--python must be" in run("--python", tmp_path / "python")


def test_bundle_without_nvcc():
    printed = run("--python", sys.executable, CUDACXX="no-such-nvcc")
    assert printed == "error: EVAKERNELS_CUDA=on, but no CUDA compiler found (looked for no-such-nvcc)\n"
