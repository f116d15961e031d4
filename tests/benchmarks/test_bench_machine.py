"""The machine: its ceilings, disturbances of a run, the state of a GPU, and the evakernels that is measured."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_fakes import CPU, machine

import benchmarks
import evakernels
from benchmarks import cli
from benchmarks import machine as machines
from benchmarks.machine import GpuState, gpu_notes, read_gpu_state
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


def test_moving_ceilings_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = machines.Watch(machine(), CPU)
    monkeypatch.setattr(machines, "ceilings", lambda device, dtypes: (8.0, {"float32": 0.12, "bfloat16": 0.2}))
    monkeypatch.setattr(machines, "BUSY_SHARE", float("inf"))
    lower, higher = watch.notes()
    assert "copy ceiling was 20% lower" in lower
    assert "float32 matmul ceiling was 20% higher" in higher


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


class FakeNvml:
    """A driver with two GPUs; an answer of None raises."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_PERF_POLICY_POWER, NVML_PERF_POLICY_THERMAL = 0, 1

    class NVMLError(Exception):
        """The driver's refusal."""

    def __init__(self, power: Any = 350_000, limited: Any = (0, 0), processes: Any = 1, driver: Any = True) -> None:
        def answer(value: Any, convert: Any = lambda value: value) -> Any:
            if value is None:
                raise self.NVMLError
            return convert(value)

        self.nvmlInit = lambda: answer(driver)
        self.nvmlShutdown = lambda: None
        self.nvmlDeviceGetHandleByUUID = {f"GPU-{UUID}": "second GPU"}.__getitem__
        self.nvmlDeviceGetClockInfo = lambda handle, clock: {1: 1980, 2: 2619}[clock]
        self.nvmlDeviceGetTemperature = lambda handle, sensor: 61
        self.nvmlDeviceGetPowerUsage = lambda handle: answer(power)
        self.nvmlDeviceGetComputeRunningProcesses = lambda handle: answer(processes, range)
        self.nvmlDeviceGetViolationStatus = lambda handle, policy: SimpleNamespace(
            violationTime=answer(limited)[policy]
        )


def read(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> GpuState | None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(**answers))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    return read_gpu_state(torch.device("cuda", 0))


def test_gpu_state_holds_what_the_driver_has(monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = {"sm_mhz": 1980, "memory_mhz": 2619, "power_w": 350.0, "temperature_c": 61}
    assert read(monkeypatch).clocks == clocks
    state = read(monkeypatch, power=None, limited=None, processes=None)
    assert state.clocks == {name: value for name, value in clocks.items() if name != "power_w"}
    assert gpu_notes(state, state) == []
    assert read(monkeypatch, driver=None) is None


def test_gpu_throttling_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    before = read(monkeypatch, limited=(7_000_000_000, 1_000_000_000))
    after = read(monkeypatch, limited=(12_000_000_000, 1_000_000_000))
    (note,) = gpu_notes(before, replace(after, seconds=before.seconds + 20))
    assert "power cap for 5.0 s (25%" in note


@pytest.mark.parametrize(("processes", "count"), [(0, 0), (1, 0), (4, 3)])  # a container may hide all
def test_other_processes_on_gpu_are_noted(monkeypatch, processes, count):
    notes = gpu_notes(read(monkeypatch), read(monkeypatch, processes=processes))
    assert [f"busy: {count} other" in note for note in notes] == [True] * bool(count)
