"""The machine: its name, its ceilings, and disturbances of a run."""

import datetime
import importlib
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

import evakernels
from benchmarks import ROOT
from benchmarks.results import Machine
from evaclip.machine import machine as host
from evaclip.machine import version_of
from evakernels.nn import linear

_DEFAULT_CACHE = 32 << 20
_FIRST_SIDE, _LONGEST_PRODUCT = 256, 0.5  # seconds
BUSY_SHARE = 0.1
"""Largest share of the processors that others use in an undisturbed run."""
DRIFT = 0.1
"""Largest relative change of the machine's ceilings during a steady run."""


def describe(device: torch.device, dtypes: Iterable[torch.dtype], packages: Iterable[str]) -> Machine:
    """The machine with its measured ceilings; a few seconds on a CPU.

    Args:
        device: the device to measure.
        dtypes: dtypes of the matmul rates.
        packages: distributions; the result has their versions.
    """
    copy, matmul = ceilings(device, dtypes)
    return Machine(
        device=device.type,
        name=torch.cuda.get_device_name(device) if device.type == "cuda" else str(host()["processor"]),
        threads=torch.get_num_threads(),
        copy_gbps=copy,
        matmul_tflops=matmul,
        cache_bytes=_cache_bytes(device),
        versions=_versions(packages) | {"evakernels": evakernels.__version__},
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        commit=commit(),
        command=f"python -m benchmarks {shlex.join(sys.argv[1:])}",
        package=_package(),
        notes=[note] if (note := warning()) else [],
    )


def is_checkout() -> bool:
    """Whether the imported evakernels is in this checkout."""
    return Path(evakernels.__file__).resolve().parent.parent == ROOT


def warning() -> str | None:
    """Return the warning about a run without the compiled library; None with it."""
    native = evakernels.info()["native"]
    if native["loaded"]:
        return None
    return f"NO COMPILED LIBRARY ({native['reason']}): evakernels is measured on its references, and on a GPU on Triton"


def _package() -> str:
    """The file of the imported evakernels, its version, and whether it is compiled."""
    file = Path(evakernels.__file__).resolve()
    where = f"{file.relative_to(ROOT)} of this checkout" if is_checkout() else str(file)
    native = evakernels.info()["native"]
    state = f"compiled, {native['isa']}" if native["loaded"] else "not compiled"
    return f"{where}, {evakernels.__version__}, {state}"


def ceilings(device: torch.device, dtypes: Iterable[torch.dtype]) -> tuple[float, dict[str, float]]:
    """GB/s of a large copy, read and written bytes counted, and TFLOP/s of a large matmul by dtype."""
    elements, size = (1 << 28, 8192) if device.type == "cuda" else (1 << 26, 1536)
    # A GPU may move equal numbers with less power; random numbers take a CPU longer than the copies.
    source = torch.arange(elements, device=device, dtype=torch.float32)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _best(partial(target.copy_, source), device) / 1e9
    del source, target
    rates = {}
    for dtype in dtypes:
        rates[str(dtype).removeprefix("torch.")] = _product_rate(device, dtype, size) / 1e12
    return copy, rates


def _product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """FLOP/s of square matmuls of this size, or of smaller ones where such a matmul would take long.

    A processor without instructions for bfloat16 reaches a hundredth of its rate in float32.
    """
    side = min(size, _FIRST_SIDE)
    while True:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        call = partial(linear, a, b)  # by the faster library
        if side == size or 8 * _best(call, device, seconds=0, least=1) > _LONGEST_PRODUCT:
            return 2 * side**3 / _best(call, device)
        side = min(2 * side, size)


def _best(call: Callable[[], object], device: torch.device, seconds: float = 0.4, least: int = 5) -> float:
    """Seconds of the fastest call without the first one, which also touches fresh memory."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) <= least or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


class Watch:
    """Notices disturbances of a run: other processes, moving ceilings, a throttled GPU."""

    def __init__(self, machine: Machine, device: torch.device) -> None:
        self._machine, self._device = machine, device
        self._start = _busy_seconds()
        self._gpu = read_gpu_state(device)

    def notes(self) -> list[str]:
        """Return reasons to doubt the numbers since the start.

        Measures the ceilings again, and fills in the machine's clocks.
        """
        total, own, wall = (now - then for now, then in zip(_busy_seconds(), self._start, strict=True))
        others = max(0.0, total - own) / (wall * (os.cpu_count() or 1))
        dtypes = [getattr(torch, name) for name in self._machine.matmul_tflops]
        copy, matmul = ceilings(self._device, dtypes)
        changes = {"copy": copy / self._machine.copy_gbps - 1}
        for dtype, rate in matmul.items():
            changes[f"{dtype} matmul"] = rate / self._machine.matmul_tflops[dtype] - 1
        notes = [
            f"unsteady: the {name} ceiling was {abs(change):.0%} {'higher' if change > 0 else 'lower'} after the run"
            for name, change in changes.items()
            if abs(change) > DRIFT
        ]
        if others > BUSY_SHARE:
            notes.insert(0, f"busy: other processes used {others:.0%} of the processors during the run")
        now = read_gpu_state(self._device)
        self._machine.clocks = now.clocks if now else {}
        return notes + gpu_notes(self._gpu, now)


def _busy_seconds() -> tuple[float, float, float]:
    """Seconds of work of all processors, of this process and its children, and of the clock."""
    times = psutil.cpu_times()
    idle = times.idle + getattr(times, "iowait", 0.0)
    own = os.times()
    return sum(times) - idle - getattr(times, "guest", 0.0), sum(own[:4]), time.monotonic()


def _cache_bytes(device: torch.device) -> int:
    """Bytes of the last-level cache; of a processor as Linux reports it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [path.read_text() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size.strip().removesuffix("K")) << 10 for size in sizes), default=_DEFAULT_CACHE)


def _versions(packages: Iterable[str]) -> dict[str, str]:
    found = {package: version_of(package) for package in sorted({"torch", "triton", *packages})}
    return {"python": platform.python_version(), **{name: version for name, version in found.items() if version}}


def commit() -> str:
    """The commit of this repository, with `+` if files were changed; empty outside of a repository."""

    def git(*args: str) -> str:
        folder = Path(__file__).parent
        return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


# --- the GPU's state by NVML ----------------------------------------------------------------------------------------

_COUNTERS = {"NVML_PERF_POLICY_POWER": "power cap", "NVML_PERF_POLICY_THERMAL": "temperature"}
"""NVML's counters of the time at lowered clocks."""


@dataclass(frozen=True)
class GpuState:
    """The state of a GPU at a moment, without values that the driver doesn't have.

    Attributes:
        seconds: a monotonic clock.
        clocks: clocks in MHz, power in W and temperature in degrees Celsius, by name with unit.
        limited: seconds at lowered clocks since the driver was loaded, by reason.
        others: processes on the GPU besides this one.
    """

    seconds: float
    clocks: dict[str, float] = field(default_factory=dict)
    limited: dict[str, float] = field(default_factory=dict)
    others: int = 0


def read_gpu_state(device: torch.device) -> GpuState | None:
    """Return the state of the GPU that torch calls `device`; a few milliseconds.

    This process must already have used it, since one process on the GPU is taken to be this one: in a container the
    driver numbers processes as outside.

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
            # By UUID: CUDA_VISIBLE_DEVICES changes torch's numbers, not NVML's.
            uuid = torch.cuda.get_device_properties(device).uuid
            return _query(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        finally:
            nvml.nvmlShutdown()
    except (nvml.NVMLError, AttributeError):  # later versions have other names for some of it
        return None


def _query(nvml: Any, handle: Any) -> GpuState:
    def ask(function: Callable[..., Any], *args: Any) -> Any:
        try:
            return function(handle, *args)
        except nvml.NVMLError:  # not supported on this card
            return None

    power = ask(nvml.nvmlDeviceGetPowerUsage)
    clocks = {
        "sm_mhz": ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
        "memory_mhz": ask(nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_MEM),
        "power_w": None if power is None else power / 1e3,
        "temperature_c": ask(nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
    }
    counters = {
        reason: ask(nvml.nvmlDeviceGetViolationStatus, getattr(nvml, policy)) for policy, reason in _COUNTERS.items()
    }
    return GpuState(
        seconds=time.monotonic(),
        clocks={name: value for name, value in clocks.items() if value is not None},
        limited={reason: status.violationTime / 1e9 for reason, status in counters.items() if status},
        others=max(0, len(ask(nvml.nvmlDeviceGetComputeRunningProcesses) or ()) - 1),
    )


def gpu_notes(before: GpuState | None, after: GpuState | None) -> list[str]:
    """Return reasons to doubt times between two states; empty without a state."""
    if before is None or after is None:
        return []
    elapsed = max(after.seconds - before.seconds, 1e-9)
    grown = {reason: total - before.limited.get(reason, total) for reason, total in after.limited.items()}
    notes = [
        f"throttled: {reason} for {seconds:.1f} s ({seconds / elapsed:.0%} of the run)"
        for reason, seconds in grown.items()
        if seconds > 0
    ]
    if others := max(before.others, after.others):
        notes.append(f"busy: {others} other {'process' if others == 1 else 'processes'} on the GPU")
    return notes
