"""`evaclip doctor`."""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch

from evaclip import doctor
from evaclip.commands.main import main
from evaclip.machine import SPIN_COUNT, usable_cores
from evakernels import backends
from evakernels.ops import layer_norm


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """The diagnosis of this machine."""
    return doctor.diagnose()


def facts(**changes: Any) -> dict[str, Any]:
    """The parts of a diagnosis that show problems, of a machine where all is well, with changes in single parts."""
    native: dict[str, Any] = {
        "loaded": True, "reason": None, "isa": "avx2", "isa_error": None, "version": "0.1.0",
        "compiler": "GNU 12", "isas_built": ["baseline", "avx2"], "isas_available": ["baseline", "avx2"],
        "cuda_archs": [], "built": True, "cuda_reason": "no CUDA compiler found (nvcc)", "module_error": None,
    }  # fmt: skip
    cuda = {"available": False, "version": None, "devices": [], "driver": None, "capabilities": [], "error": None}
    packages = {"": {"torch": "2.13", "numpy": "2.0"}, "clip": {"rich": "15", "pyyaml": "6"}}
    base: dict[str, Any] = {"native": native, "cuda": cuda, "packages": packages}
    return {key: value | changes[key] if key in changes else value for key, value in base.items()}


def problem_lines(found: dict[str, Any]) -> list[str]:
    return [f"{problem['what']}; fix: {problem['fix']}" for problem in doctor.find_problems(found)]


GPU = {"available": True, "version": "13.0", "devices": ["H100"] * 2, "driver": "580.65.06"}


def test_doctor_fits_on_a_screen(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 40
    assert all(len(line) <= 80 for line in lines)
    text = "\n".join(lines)
    for part in ("machine", metadata.version("torch"), "reference", "layer_norm", "* live"):
        assert part in text
    assert "broken" not in text


def test_doctor_matrix_agrees_with_dispatch(known: dict[str, Any]) -> None:
    x = torch.randn(3, 8)
    forward = known["ops"]["layer_norm_forward"]["backends"]
    live = next(backend for backend, verdict in forward.items() if verdict["state"] == "live")
    arguments = (x, None, None, 1e-5, False)
    assert backends.select("layer_norm_forward", arguments).backend == (live if live != "cuda" else "cpu")
    assert layer_norm(x, None, None).shape == x.shape


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"packages": {"": {"torch": "2.13", "numpy": None}}}, "not installed: numpy; fix: pip install numpy"),
        ({"native": {"loaded": False, "reason": "not built: f does not exist"}}, "f does not exist; fix: build it"),
        ({"cuda": {"version": "13.0", "error": "driver too old"}}, "driver too old; fix: update the driver"),
        (
            {"native": {"cuda_archs": ["90", "100"]}, "cuda": GPU | {"capabilities": ["8.0", "9.0"]}},
            "this machine's GPU is 80; fix: EVAKERNELS_CUDA_ARCHS='80' pip install",
        ),
    ],
)
def test_doctor_lists_problems_first(changes: dict[str, Any], expected: str) -> None:
    (line,) = problem_lines(facts(**changes))
    assert expected in line


def test_doctor_ignores_optional_parts() -> None:
    for changes in (
        {"native": {"loaded": False, "built": False, "reason": "not built: no C++ compiler found"}},
        {"native": {"cuda_archs": ["80", "90"]}, "cuda": GPU | {"capabilities": ["8.0", "8.9", "9.0", "12.0"]}},
    ):
        assert problem_lines(facts(**changes)) == []


def test_doctor_wrong_isa_exits_with_1() -> None:
    environment = {**os.environ, "EVAKERNELS_ISA": "avx1024", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "evaclip", "doctor"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 1
    assert result.stdout.startswith("broken       EVAKERNELS_ISA: unknown instruction set 'avx1024'")
    assert result.stdout.isascii()
    assert "x calls fail" in result.stdout


def test_doctor_json(known: dict[str, Any], capsys: Any) -> None:
    assert main(["doctor", "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree == known
    assert tree["problems"] == []
    assert tree["torch"] == torch.__version__
    assert tree["packages"][""]["torch"] == metadata.version("torch")
    assert list(tree["ops"]) == list(backends.ops())
    assert tree["ops"]["swiglu_forward"]["family"] == "swiglu"


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({}, {"GOMP_SPINCOUNT": SPIN_COUNT}),
        ({"GOMP_SPINCOUNT": "77"}, {"GOMP_SPINCOUNT": "77"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
)
def test_command_limits_spinning(given: dict[str, str], used: dict[str, str]) -> None:
    """libgomp itself prints what it uses; it reads the environment once, while torch is imported."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment |= {"OMP_DISPLAY_ENV": "verbose", **given}
    command = [sys.executable, "-m", "evaclip", "doctor", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    for name, value in used.items():
        assert f"{name} = '{value}'" in result.stderr
    threads = json.loads(result.stdout)["threads"]
    assert {name for name, value in threads.items() if value is not None} == {"count", *used}


def test_doctor_names_threads_without_cores(known: dict[str, Any]) -> None:
    machine, threads = known["machine"] | {"cores": 2}, known["threads"]
    assert "OMP_NUM_THREADS" not in doctor.render(known | {"machine": machine, "threads": threads | {"count": 2}}, 100)
    assert "OMP_NUM_THREADS=2" in doctor.render(known | {"machine": machine, "threads": threads | {"count": 8}}, 100)


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "90000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_usable_cores_respect_quota(files: dict[str, str], cores: int | None, tmp_path: Path) -> None:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")
    assert usable_cores(tmp_path) == (cores or len(os.sched_getaffinity(0)))
