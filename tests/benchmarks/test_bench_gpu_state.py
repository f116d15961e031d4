"""What NVML says becomes clocks and notes; a fake NVML stands in for the driver."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu_state import GpuState, notes, read_state

UUID = "12345678-1234-1234-1234-123456789abc"


class FakeNvml(ModuleType):
    """Two GPUs of the machine; torch sees the second one only."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    NVML_PERF_POLICY_POWER, NVML_PERF_POLICY_THERMAL = 0, 1
    nvmlClocksThrottleReasonGpuIdle = 1
    nvmlClocksThrottleReasonSwPowerCap = 4
    nvmlClocksThrottleReasonHwSlowdown = 8
    nvmlClocksThrottleReasonSwThermalSlowdown = 32
    nvmlClocksThrottleReasonHwThermalSlowdown = 64
    nvmlClocksThrottleReasonHwPowerBrakeSlowdown = 128

    class NVMLError(Exception):
        """As pynvml's."""

    def __init__(self, **answers: Any) -> None:
        super().__init__("pynvml")
        self.answers = {"power": 350_000, "reasons": 1, "limited": {0: 7_000_000_000, 1: 0}, "processes": 1} | answers
        self.open = 0

    def _answer(self, handle: str, name: str) -> Any:
        assert self.open == 1
        assert handle == "second GPU"
        if self.answers[name] is None:
            raise self.NVMLError("not supported")
        return self.answers[name]

    def nvmlInit(self) -> None:
        if self.answers.get("driver") == "absent":
            raise self.NVMLError("driver not loaded")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        return {f"GPU-{UUID}": "second GPU", "GPU-other": "first GPU"}[uuid]

    def nvmlDeviceGetClockInfo(self, handle: str, clock: int) -> int:
        return {1: 1980, 2: 2619}[clock]

    def nvmlDeviceGetPowerUsage(self, handle: str) -> Any:
        return self._answer(handle, "power")

    def nvmlDeviceGetTemperature(self, handle: str, sensor: int) -> int:
        return 61

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle: str) -> Any:
        return self._answer(handle, "reasons")

    def nvmlDeviceGetViolationStatus(self, handle: str, policy: int) -> SimpleNamespace:
        return SimpleNamespace(violationTime=self._answer(handle, "limited")[policy])

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=1000 + index) for index in range(self._answer(handle, "processes"))]


def read(monkeypatch: pytest.MonkeyPatch, **answers: Any) -> GpuState | None:
    """The state that `read_state` makes of the fake's answers."""
    nvml = FakeNvml(**answers)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    state = read_state(torch.device("cuda", 0))
    assert nvml.open == 0
    return state


def test_clocks_are_those_of_the_gpu_that_torch_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    state = read(monkeypatch)
    assert state.clocks == {"sm_mhz": 1980, "memory_mhz": 2619, "power_w": 350.0, "temperature_c": 61}


def test_what_the_card_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    state = read(monkeypatch, power=None, reasons=None, limited=None, processes=None)
    assert state.clocks == {"sm_mhz": 1980, "memory_mhz": 2619, "temperature_c": 61}
    assert notes(state, state) == []


def test_throttling_between_two_looks_is_told_with_its_share() -> None:
    before = GpuState(seconds=100, limited_s=(("power cap", 7.0), ("temperature", 1.0)))
    after = GpuState(seconds=120, limited_s=(("power cap", 12.0), ("temperature", 1.0)), reasons=("power cap",))
    assert notes(before, after) == ["throttled: power cap for 5.0 s (25% of the run)"]


def test_counters_are_nanoseconds_and_reasons_have_names(monkeypatch: pytest.MonkeyPatch) -> None:
    state = read(monkeypatch, reasons=1 | 8 | 64, limited={0: 2_500_000_000, 1: 0})
    assert state.limited_s == (("power cap", 2.5), ("temperature", 0.0))
    assert state.reasons == ("hardware slowdown", "hardware temperature limit")
    assert notes(state, state) == [
        "throttled: hardware slowdown, before or after the run",
        "throttled: hardware temperature limit, before or after the run",
    ]


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        (0, []),  # a container may hide them all
        (1, []),
        (2, ["busy: 1 other process on the GPU"]),
        (4, ["busy: 3 other processes on the GPU"]),
    ],
)
def test_other_processes_are_counted(monkeypatch: pytest.MonkeyPatch, processes: int, expected: list[str]) -> None:
    assert notes(read(monkeypatch), read(monkeypatch, processes=processes)) == expected


def test_without_gpu_driver_or_package_there_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, driver="absent") is None
    with monkeypatch.context() as renamed:
        renamed.delattr(FakeNvml, "NVML_PERF_POLICY_POWER")
        assert read(monkeypatch) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert read_state(torch.device("cuda")) is None
    assert read_state(torch.device("cpu")) is None
    assert notes(None, GpuState(seconds=1.0, others=3)) == []
