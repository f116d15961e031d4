"""What a GPU was doing around a run: clocks, power, temperature, throttling and other processes, as NVML tells it."""

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_REASONS = {
    "SwPowerCap": "power cap",
    "SwThermalSlowdown": "temperature",
    "HwSlowdown": "hardware slowdown",
    "HwThermalSlowdown": "hardware temperature limit",
    "HwPowerBrakeSlowdown": "external power brake",
}
"""Of NVML's reasons for lower clocks those that mean trouble; an idle GPU and clocks that somebody set do not."""
_COUNTERS = {"NVML_PERF_POLICY_POWER": "power cap", "NVML_PERF_POLICY_THERMAL": "temperature"}


@dataclass(frozen=True)
class GpuState:
    """One look at a GPU. What the driver doesn't tell is None, or left out.

    Attributes:
        seconds: of a clock that only runs forwards.
        sm_mhz, memory_mhz: clocks of the multiprocessors and of the memory.
        reasons: why the clocks are lowered just now.
        limited_s: seconds that clocks were lowered since the driver was loaded, by reason.
        others: processes on the GPU beside this one.
    """

    seconds: float
    sm_mhz: float | None = None
    memory_mhz: float | None = None
    power_w: float | None = None
    temperature_c: float | None = None
    reasons: tuple[str, ...] = ()
    limited_s: tuple[tuple[str, float], ...] = ()
    others: int = 0

    @property
    def clocks(self) -> dict[str, float]:
        """The numbers that the driver told, by name with unit."""
        names = ("sm_mhz", "memory_mhz", "power_w", "temperature_c")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}


def read_state(device: torch.device) -> GpuState | None:
    """Looks at the GPU that torch calls `device`; a few milliseconds.

    This process must already have used it, since one process on the GPU is taken to be this one: in a container the
    driver names processes by numbers from outside, so they can't be told apart.

    Returns:
        None without a GPU, without nvidia-ml-py, or if the driver doesn't answer.
    """
    if device.type != "cuda":
        return None
    try:
        nvml = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return None
    try:
        nvml.nvmlInit()
        try:
            # By UUID: torch numbers the GPUs that CUDA_VISIBLE_DEVICES leaves, NVML those of the machine.
            uuid = torch.cuda.get_device_properties(device).uuid
            return _read(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        finally:
            nvml.nvmlShutdown()
    except (nvml.NVMLError, AttributeError):  # later versions have other names for some of it
        return None


def notes(before: GpuState | None, after: GpuState | None) -> list[str]:
    """What between two looks made times doubtful; empty if nothing did, or if there was nothing to look with."""
    if before is None or after is None:
        return []
    elapsed = max(after.seconds - before.seconds, 1e-9)
    earlier = dict(before.limited_s)
    grown = {reason: total - earlier.get(reason, total) for reason, total in after.limited_s}
    limited = {reason: seconds for reason, seconds in grown.items() if seconds > 0}
    found = [
        f"throttled: {reason} for {seconds:.1f} s ({seconds / elapsed:.0%} of the run)"
        for reason, seconds in limited.items()
    ]
    current = dict.fromkeys((*before.reasons, *after.reasons))
    found += [f"throttled: {reason}, before or after the run" for reason in current if reason not in limited]
    others = max(before.others, after.others)
    if others:
        found.append(f"busy: {others} other {'process' if others == 1 else 'processes'} on the GPU")
    return found


def _read(nvml: Any, handle: Any) -> GpuState:
    def ask(function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(handle, *args)
        except nvml.NVMLError:  # not supported on this card
            return None

    power = ask(nvml.nvmlDeviceGetPowerUsage)
    reasons = ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons) or 0
    counters = {
        reason: ask(nvml.nvmlDeviceGetViolationStatus, getattr(nvml, policy)) for policy, reason in _COUNTERS.items()
    }
    return GpuState(
        seconds=time.monotonic(),
        sm_mhz=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        memory_mhz=ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
        power_w=None if power is None else power / 1e3,
        temperature_c=ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
        reasons=tuple(
            text for name, text in _REASONS.items() if reasons & getattr(nvml, f"nvmlClocksThrottleReason{name}", 0)
        ),
        limited_s=tuple((reason, status.violationTime / 1e9) for reason, status in counters.items() if status),
        others=max(0, len(ask(nvml.nvmlDeviceGetComputeRunningProcesses) or ()) - 1),
    )
