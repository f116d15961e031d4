"""The GPU check survives crashes, hangs, a full budget and missing packages, and continues where it ended."""

import sys
import time
import zipfile

import pytest

from benchmarks import cli, gpu_check
from benchmarks.gpu_check import Step, hash_csrc, install, list_steps, read_results, run_steps

PYTHON = f"cpython-{sys.version_info.major}{sys.version_info.minor}"


def step(name, code, seconds=60.0):
    return Step(name, (sys.executable, "-c", code), seconds)


def run(steps, folder, budget=1000.0):
    """Status by step."""
    results = run_steps(steps, folder, budget, {}, report=lambda line: None)
    return {result["step"]: result["status"] for result in results}


def test_check_goes_on_after_each_kind_of_failure(tmp_path):
    steps = [
        step("good", "print('3 passed')"),
        step("wrong", "print('FAILED test_x - error'); print('1 failed'); raise SystemExit(1)"),
        step("crash", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        step("hang", "import time; time.sleep(1000)", 1.0),
        Step("absent", ("nothing",), 60, missing="no compute-sanitizer"),
        step("last", ""),
    ]
    assert run(steps, tmp_path) == {
        "good": "passed", "wrong": "failed", "crash": "died of SIGSEGV", "hang": "timed out", "absent": "missing",
        "last": "passed",
    }  # fmt: skip
    results = {result["step"]: result for result in read_results(tmp_path / "results.jsonl")}
    assert results["good"]["summary"] == "3 passed"
    assert results["wrong"]["failures"] == ["FAILED test_x - error"]


def test_check_kills_what_a_step_started(tmp_path):
    code = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(9); print(1)'])"
    assert run([step("hang", code, 1.0)], tmp_path) == {"hang": "timed out"}
    time.sleep(0.1)
    assert (tmp_path / "hang.log").read_text() == ""


def test_check_continues_with_open_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "_SHORTEST", 0.0)
    file = tmp_path / "ran"
    steps = [step("one", f"open({str(file)!r}, 'a').write('1')"), step("two", "import time; time.sleep(2)")]
    assert run(steps, tmp_path, budget=1.0) == {"one": "passed"}
    results = tmp_path / "results.jsonl"
    results.write_text(results.read_text() + '\n{"step": "two", "sta')  # a full disk
    assert run(steps, tmp_path) == {"one": "passed", "two": "passed"}
    assert file.read_text() == "1"
    assert [result["step"] for result in read_results(results)] == ["one", "two"]


def test_steps_are_accepted_commands(tmp_path):
    steps, parser = list_steps("cuda", tmp_path), cli._build_parser()
    assert len({step.name for step in steps}) == len(steps)
    for step in steps:
        assert all(gpu_check.Path(word).exists() for word in step.command if word.endswith(".py"))
        if step.command[2:3] == ("benchmarks",):
            parser.parse_args(step.command[3:])


@pytest.mark.parametrize(
    ("statuses", "status"),
    [
        ({"a": "passed", "b": "missing"}, gpu_check.PASSED),
        ({"a": "passed"}, gpu_check.OPEN),
        ({"a": "died of SIGSEGV", "b": "passed"}, gpu_check.FAILED),
        ({"a": "timed out"}, gpu_check.FAILED),
    ],
)
def test_exit_status(statuses, status, tmp_path):
    results = [{"step": name, "status": status} for name, status in statuses.items()]
    assert gpu_check.conclude([step(name, "") for name in "ab"], results, tmp_path) == status


def test_missing_packages_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: None if name == "psutil" else name)
    with pytest.raises(SystemExit) as ended:
        gpu_check.main(["--out", str(tmp_path), "--bundle", str(tmp_path / "none")])
    assert ended.value.code == gpu_check.WRONG_INPUT
    assert "missing packages: psutil" in capsys.readouterr().err


def test_check_without_a_gpu(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_check, "find_spec", lambda name: name)
    monkeypatch.setattr(gpu_check, "find_machine", lambda env: {"cuda": {"available": False, "error": "old driver"}})
    assert gpu_check.main(["--out", str(tmp_path), "--bundle", str(tmp_path / "none")]) == gpu_check.NO_GPU
    assert "old driver" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        gpu_check.main(["--out", str(tmp_path), "--bundle", str(tmp_path / "none"), "--only", "nonsense"])


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A bundle for a checkout of few files."""
    root = tmp_path / "tree"
    for name in ("CMakeLists.txt", "csrc/cuda/norm.cu", "evakernels/__init__.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    monkeypatch.setattr(gpu_check, "ROOT", root)
    folder = tmp_path / "bundle"
    for name in ("_ops.so", f"_C.{PYTHON}-x86_64-linux-gnu.so"):
        (folder / "libraries").mkdir(parents=True, exist_ok=True)
        (folder / "libraries" / name).write_text("compiled")
    (folder / "wheels").mkdir()
    for name in ("tiny", "numpy"):
        with zipfile.ZipFile(folder / f"wheels/{name}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "")
    (folder / "csrc.sha256").write_text(hash_csrc(root) + "\n")
    return folder


def test_bundle_of_other_kernels_or_python_is_refused(bundle, tmp_path):
    install(bundle, tmp_path / "packages")
    library = tmp_path / "tree/evakernels/_ops.so"
    assert library.read_text() == "compiled"
    assert [path.name for path in (tmp_path / "packages").iterdir()] == ["tiny"]  # numpy is installed
    library.unlink()
    kernel = tmp_path / "tree/csrc/cuda/norm.cu"
    kernel.write_text("changed")
    with pytest.raises(SystemExit, match="csrc has changed"):
        install(bundle, tmp_path / "packages")
    kernel.write_text("csrc/cuda/norm.cu")
    (bundle / f"libraries/_C.{PYTHON}-x86_64-linux-gnu.so").unlink()
    with pytest.raises(SystemExit, match="GPU_PYTHON"):
        install(bundle, tmp_path / "packages")
    assert not library.exists()
