"""What a run or an evaluation was done with: the machine, and the versions of what computes."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from evakernels import __version__


def versions() -> dict[str, str]:
    """Versions by package, Python's among them."""
    found = {"python": platform.python_version(), "evakernels": __version__}
    for name in ("torch", "pillow", "scikit-learn"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def machine() -> dict[str, Any]:
    """`system`, `processor`, `cores` that this process may use, and the names of all `gpus`."""
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"system": platform.platform(terse=True), "processor": _processor(), "cores": cores, "gpus": gpus}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
