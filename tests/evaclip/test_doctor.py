"""`evaclip doctor`."""

from importlib import metadata
from typing import Any

import pytest

from evaclip import doctor
from evaclip.cli import main


def facts(**changes: Any) -> dict[str, Any]:
    native: dict[str, Any] = {
        "loaded": True, "reason": None, "isa": "avx2", "isa_error": None, "version": "0.1.0",
        "compiler": "GNU 12", "isas_built": ["baseline", "avx2"], "isas_available": ["baseline", "avx2"],
    }  # fmt: skip
    cuda: dict[str, Any] = {"available": False, "version": None, "devices": []}
    base: dict[str, Any] = {
        "evakernels": "0.1.0",
        "python": "3.11",
        "torch": "2.13",
        "triton": None,
        "native": native,
        "cuda": cuda,
    }
    return {key: {**value, **changes[key]} if key in changes else value for key, value in base.items()}


def test_the_command_shows_system_packages_and_ops(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for part in ("System", "Packages", "Ops", metadata.version("torch"), "layer_norm_forward", "reference"):
        assert part in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "loaded, built by GNU 12"),
        ({}, "avx2 in use; built: baseline, avx2"),
        ({"native": {"loaded": False, "reason": "not built: no compiler", "isa": None}}, "not loaded: not built: no c"),
        ({"native": {"loaded": False, "reason": "x", "isa": None}}, "none: there is no native library"),
        ({"native": {"isa_error": "EVAKERNELS_ISA=avx1024 is unknown"}}, "EVAKERNELS_ISA=avx1024 is unknown"),
        ({}, "none: this torch is built without CUDA"),
        ({"cuda": {"version": "13.0"}}, "built for CUDA 13.0, but there is no usable GPU"),
        ({"cuda": {"available": True, "version": "13.0", "devices": ["NVIDIA H100"]}}, "NVIDIA H100"),
    ],
)
def test_each_state_is_told_with_its_reason(changes: dict[str, Any], expected: str) -> None:
    assert any(expected in state for _, state in doctor.system_rows(facts(**changes)))


def test_a_missing_package_comes_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = ["torch>=2.11", 'nonexistent-thing>=1; extra == "clip"', 'evakernels[clip]; extra == "demo"']
    monkeypatch.setattr(metadata, "requires", lambda name: declared)
    assert doctor.package_rows() == [
        ("torch", metadata.version("torch"), "core"),
        ("nonexistent-thing", "not installed: pip install 'evakernels[clip]'", "clip"),
    ]


def test_every_op_has_a_live_backend() -> None:
    rows = {op: (live, others) for op, live, others in doctor.backend_rows()}
    assert "contrastive_forward" in rows
    assert all(live in ("cpu", "reference") for live, _ in rows.values())
    assert all(others for live, others in rows.values())
