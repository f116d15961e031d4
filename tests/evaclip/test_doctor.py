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

from evaclip import doctor, extras
from evaclip.commands.main import main
from evakernels import backends
from evakernels.ops import layer_norm

ASCII = doctor.ASCII_MARKS


@pytest.fixture(scope="module")
def known() -> dict[str, Any]:
    """The diagnosis of this machine."""
    return doctor.diagnose()


def facts(**changes: Any) -> dict[str, Any]:
    """What `diagnose` returns of a machine where all is well, with changes in single parts; without the ops."""
    native: dict[str, Any] = {
        "loaded": True, "reason": None, "isa": "avx2", "isa_error": None, "version": "0.1.0",
        "compiler": "GNU 12", "isas_built": ["baseline", "avx2"], "isas_available": ["baseline", "avx2"],
        "cuda_archs": [], "built": True, "cuda_reason": "no CUDA compiler found (nvcc)", "module_error": None,
    }  # fmt: skip
    base: dict[str, Any] = {
        "evakernels": "0.1.0",
        "python": "3.11",
        "torch": "2.13",
        "triton": None,
        "native": native,
        "cuda": {
            "available": False, "version": None, "devices": [], "driver": None, "capabilities": [], "error": None,
        },
        "machine": {"system": "Linux", "processor": "Some CPU", "cores": 4, "gpus": []},
        "packages": {"": {"torch": "2.13", "numpy": "2.0"}, "clip": {"rich": "15", "pyyaml": "6"}},
        "problems": [],
    }  # fmt: skip
    return {key: value | changes[key] if key in changes else value for key, value in base.items()}


def ops(**states: tuple[str, ...]) -> dict[str, Any]:
    """States of ops, in the order of the backends, as `op_states` returns them; each unable one has a reason."""
    return {
        op: {
            "family": op.split("_")[0],
            "backends": {
                backend: {"state": state, "reasons": [f"{op} has no {backend} kernel"] if state == "unable" else []}
                for backend, state in zip(backends.PREFERENCE, of_op, strict=True)
            },
        }
        for op, of_op in states.items()
    }


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
    for part in ("machine", metadata.version("torch"), "reference", "layer_norm", "● live"):
        assert part in text
    assert "broken" not in text


def test_doctor_without_extras_names_all_packages(known: dict[str, Any]) -> None:
    packages = {extra: dict.fromkeys(names) for extra, names in extras.requirements().items() if extra}
    text = doctor.render(known | {"packages": packages}, False, 80, ASCII)
    assert len(text.splitlines()) <= 40
    assert all(name in text for names in packages.values() for name in names)


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
        ({}, "Some CPU, 4 cores; instruction set avx2 in use (built: baseline, avx2)"),
        ({}, "loaded, built by GNU 12 without kernels for GPUs (no CUDA compiler found (nvcc))"),
        ({"native": {"cuda_archs": ["90", "100"]}}, "built by GNU 12 for GPUs 90, 100"),
        ({"native": {"loaded": False, "reason": "not built: x", "isa": None}}, "not loaded: all ops run on the ref"),
        ({"native": {"loaded": False, "reason": "not built: x", "isa": None}}, "instruction set chosen by torch"),
        ({"native": {"isa": None, "isa_error": "EVAKERNELS_ISA: unknown"}}, "instruction set not known"),
        ({}, "none: this torch is built without CUDA"),
        ({"cuda": {"driver": "580.65.06"}}, "built without CUDA, but there is a driver 580.65.06"),
        ({"cuda": {"version": "13.0"}}, "built for CUDA 13.0, but there is no usable GPU"),
        ({"cuda": GPU}, "2 x H100, driver 580.65.06, CUDA 13.0"),
    ],
)
def test_system_rows_of_each_state(changes: dict[str, Any], expected: str) -> None:
    assert any(expected in state for _, state in doctor._system_rows(facts(**changes)))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"packages": {"": {"torch": "2.13", "numpy": None}}}, "not installed: numpy; fix: pip install numpy"),
        (
            {"native": {"loaded": False, "reason": "_ops.so can't be loaded: x"}},
            "_ops.so can't be loaded: x; fix: build it",
        ),
        ({"native": {"loaded": False, "reason": "not built: f does not exist"}}, "f does not exist; fix: build it"),
        (
            {"native": {"module_error": "undefined symbol"}},
            "_C can't be imported: undefined symbol; fix: build it again",
        ),
        ({"native": {"isa_error": "EVAKERNELS_ISA: no amx"}}, "EVAKERNELS_ISA: no amx; fix: unset EVAKERNELS_ISA"),
        (
            {"cuda": {"version": "13.0", "error": "driver too old"}},
            "driver too old; fix: update the driver, or install",
        ),
        (
            {"native": {"cuda_archs": ["90", "100"]}, "cuda": GPU | {"capabilities": ["8.0", "9.0"]}},
            "built for 90, 100, but this machine's GPU is 80; fix: EVAKERNELS_CUDA_ARCHS='80' pip install",
        ),
        (
            {"native": {"cuda_archs": ["80", "100"]}, "cuda": GPU | {"capabilities": ["9.0", "9.0"]}},
            "built for 80, 100, but this machine's GPU is 90",
        ),
    ],
)
def test_doctor_lists_problems_first(changes: dict[str, Any], expected: str) -> None:
    found = facts(**changes)
    assert len(problem_lines(found)) == 1
    assert expected in problem_lines(found)[0]
    found |= {"problems": list(doctor.find_problems(found)), "ops": ops(norm=("unable", "unable", "fails", "usable"))}
    top = doctor.render(found, False, 80, ASCII).split("\n\n")[0]
    assert " ".join(top.split()) == f"broken {problem_lines(found)[0]}"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"native": {"loaded": False, "built": False, "reason": "not built: no C++ compiler found"}},
        {"packages": {"clip": {"rich": None}}},
        {"cuda": {"version": "13.0"}},
        {"native": {"cuda_archs": ["80", "90"]}, "cuda": GPU | {"capabilities": ["8.0", "8.9", "9.0", "12.0"]}},
        {"native": {"cuda_archs": ["native"]}, "cuda": GPU | {"capabilities": ["7.5"]}},
    ],
)
def test_optional_parts_are_no_problem(changes: dict[str, Any]) -> None:
    assert problem_lines(facts(**changes)) == []


def test_op_states_of_a_broken_backend(known: dict[str, Any]) -> None:
    states = doctor.op_states({"cpu": "the instruction set is unknown"})
    able = {op: verdict["backends"]["cpu"]["state"] != "unable" for op, verdict in known["ops"].items()}
    assert any(able.values())
    for op, was_able in able.items():
        cpu, reference = states[op]["backends"]["cpu"], states[op]["backends"]["reference"]
        assert (cpu["state"] == "fails") == was_able
        assert ("the instruction set is unknown" in cpu["reasons"]) == was_able
        assert reference["state"] == known["ops"][op]["backends"]["reference"]["state"]


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


def test_doctor_verbose_lists_ops_and_packages(known: dict[str, Any]) -> None:
    text = doctor.render(known, True, 80, ASCII)
    for op in backends.ops():
        assert f"\n{op}  cuda: " in text
    for names in extras.requirements().values():
        assert all(f"\n{name} " in text for name in names)


def test_doctor_missing_packages() -> None:
    found = facts(packages={"clip": {"rich": None, "pyyaml": "6", "ftfy": None}, "demo": {"emoji": "2"}})
    text = doctor.render(found | {"ops": ops(norm=("unable", "unable", "live", "usable"))}, False, 80, ASCII)
    assert text.endswith("missing      pip install 'evakernels[clip]' brings rich, ftfy")


def test_driver_version(tmp_path: Path) -> None:
    file = tmp_path / "version"
    assert doctor._driver_version(file) is None
    file.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (dvs-builder)\n"
        "GCC version:  gcc version 12.2.0 (Debian 12.2.0-14)\n"
    )
    assert doctor._driver_version(file) == "580.65.06"


def test_cuda_error_of_an_unusable_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system\nis too old")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert doctor._cuda_error(tmp_path) is None
    (tmp_path / "nvidia0").touch()
    assert doctor._cuda_error(tmp_path) == "The NVIDIA driver on your system is too old"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert doctor._cuda_error(tmp_path) is None
