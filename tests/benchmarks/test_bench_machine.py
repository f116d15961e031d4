"""The machine: its ceilings, disturbances of a run, the state of a GPU, and the evakernels that is measured."""

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from bench_fakes import CPU, machine

import benchmarks
import evakernels
from benchmarks import cli
from benchmarks import machine as machines
from benchmarks.machine import GpuState, gpu_notes
from evakernels import _native

UUID = "12345678-1234"


def test_machine_describes_itself(steady: None) -> None:
    described = machines.describe(CPU, [torch.float32], ["numpy", "no-such-distribution"])
    assert described.threads == torch.get_num_threads()
    assert described.cache_bytes >= 1 << 18
    assert {"python", "torch", "numpy", "evakernels"} <= set(described.versions)
    assert "no-such-distribution" not in described.versions
    assert "of this checkout" in described.package


@pytest.mark.parametrize(("total", "doubts"), [(110.0, []), (116.0, ["busy"])], ids=["quiet", "busy"])
def test_busy_machine_is_noted(monkeypatch, steady, total, doubts):
    monkeypatch.setattr(machines.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(machines, "_busy_seconds", lambda: (100.0, 50.0, 10.0))
    watch = machines.Watch(machine(), CPU)
    monkeypatch.setattr(machines, "_busy_seconds", lambda: (total, 60.0, 20.0))
    assert [note.partition(":")[0] for note in watch.notes()] == doubts


# --- which evakernels -----------------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout, another folder where evakernels is installed, and Python before it has imported either."""
    for folder in ("checkout", "installed"):
        (tmp_path / folder / "evakernels").mkdir(parents=True)
        (tmp_path / folder / "evakernels" / "__init__.py").touch()
    monkeypatch.setattr(benchmarks, "ROOT", tmp_path / "checkout")
    monkeypatch.delitem(sys.modules, "evakernels")
    return tmp_path / "checkout"


def chosen(monkeypatch: pytest.MonkeyPatch, *arguments: str, path: Sequence[Path]) -> list[str]:
    """Python's folders after the choice; the first is the current one, which Python calls by an empty name."""
    monkeypatch.chdir(path[0])
    monkeypatch.setattr(sys, "path", ["", *map(str, path)])
    monkeypatch.setattr(sys, "argv", ["-m", *arguments])
    benchmarks.choose_evakernels()
    return sys.path


def test_compiled_checkout_is_measured(checkout, monkeypatch):
    installed = checkout.parent / "installed"
    (checkout / "evakernels" / "_ops.so").touch()
    assert chosen(monkeypatch, "op", path=[checkout, installed]) == ["", str(checkout), str(installed)]
    assert chosen(monkeypatch, "op", "--installed", path=[checkout, installed]) == [str(installed)]


def test_installed_one_replaces_uncompiled_checkout(checkout, monkeypatch):
    installed = checkout.parent / "installed"
    assert chosen(monkeypatch, "op", path=[checkout, installed]) == [str(installed)]
    assert chosen(monkeypatch, "op", path=[checkout]) == ["", str(checkout)]


def test_missing_compiled_library_is_a_warning(monkeypatch, capsys, steady):
    monkeypatch.setattr(_native, "LOADED", False)
    monkeypatch.setattr(_native, "REASON", "not built: nobody did")
    there = machines.describe(CPU, (), ())
    assert there.package == f"evakernels/__init__.py of this checkout, {evakernels.__version__}, not compiled"
    assert "not built: nobody did" in there.notes[0]
    assert cli.main(["list"]) == 0
    assert "not built: nobody did" in capsys.readouterr().err


# --- the state of a GPU ---------------------------------------------------------------------------------------------


def test_throttling_and_other_processes_are_noted() -> None:
    before = GpuState(0.0, limited={"power cap": 7.0, "temperature": 1.0})
    after = GpuState(20.0, limited={"power cap": 12.0, "temperature": 1.0})
    (note,) = gpu_notes(before, after)
    assert "power cap for 5.0 s (25%" in note
    (note,) = gpu_notes(GpuState(0.0), GpuState(1.0, others=3))
    assert "busy: 3 other" in note
    assert gpu_notes(before, None) == []
