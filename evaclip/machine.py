"""Machine and package versions, for runs and evaluations."""

import math
import os
import platform
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

SPIN_COUNT = "50000"
"""Iterations that a thread of libgomp spins at a barrier before it sleeps; libgomp's default is 300,000."""


def versions() -> dict[str, str]:
    """Versions by package, Python's among them."""
    from evakernels import __version__

    packages = {"python": platform.python_version(), "evakernels": __version__}
    return packages | {name: version_of(name) or "not installed" for name in ("torch", "pillow", "scikit-learn")}


def version_of(package: str) -> str | None:
    """The version of a distribution; None if it isn't installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def user_cache(name: str) -> Path:
    """`evaclip/NAME` in the user's cache folder ($XDG_CACHE_HOME, else ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "evaclip" / name


def machine() -> dict[str, Any]:
    """`system`, `processor`, `cores` that this process may use, and the names of all `gpus`."""
    import torch  # here, as `evaclip report` only reads the machines of runs

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"system": platform.platform(terse=True), "processor": _processor(), "cores": usable_cores(), "gpus": gpus}


def usable_cores(control_groups: Path = Path("/sys/fs/cgroup")) -> int:
    """Number of processor cores that this process may use, by its affinity and its container's CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        with suppress(OSError, ValueError):  # "max" and -1 are not limits
            quota, period = map(int, " ".join((control_groups / name).read_text() for name in names).split())
            if quota > 0:
                return max(1, min(cores, math.ceil(quota / period)))
    return cores


def limit_spinning() -> None:
    """Let OpenMP threads sleep soon at a barrier, so that spinning threads don't block the thread they wait for.

    Does nothing after torch was imported, as libgomp has read its environment, or if OMP_WAIT_POLICY is set.
    """
    if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for matmuls in bfloat16; without them these are far slower than fp32."""
    import torch

    from evakernels._native import processor

    capabilities = torch.cpu.get_capabilities()
    has_instructions = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return has_instructions and processor() not in ("avx2", "avx512")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
