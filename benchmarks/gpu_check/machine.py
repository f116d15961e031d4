"""The machine as the header of a journal tells it."""

import platform
import subprocess
from typing import Any

import torch

import evakernels
from benchmarks.gpu_check.stage import Settings
from benchmarks.gpu_state import read_state
from benchmarks.machine import commit, device_name


def describe(settings: Settings) -> dict[str, Any]:
    """Card, driver, clocks and versions; `gpu` is false where a GPU was asked for and none is there."""
    gpu = torch.cuda.is_available()
    device = torch.device(settings.device if gpu else "cpu")
    if device.type == "cuda":
        torch.empty(1, device=device)  # NVML takes one process on the GPU to be this one
    state = read_state(device)
    return {
        "gpu": gpu,
        "name": device_name(device),
        "capability": torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0),
        "clocks": state.clocks if state else {},
        "driver": _driver(),
        "platform": platform.platform(),
        "commit": commit(),
        "evakernels": evakernels.info(),
    }


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        output: str = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return output.partition("\n")[0].strip()
