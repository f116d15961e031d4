"""What a run or an evaluation was done with: the machine, and the versions of what computes."""

import ctypes
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of parameters in glibc's malloc.h
_NEVER = 2**31 - 1


def versions() -> dict[str, str]:
    """Versions by package, Python's among them."""
    from evakernels import __version__

    found = {"python": platform.python_version(), "evakernels": __version__}
    return found | {name: version_of(name) or "not installed" for name in ("torch", "pillow", "scikit-learn")}


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
    import torch  # here, as `evaclip report` reads what others found, and shall not wait for it

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"system": platform.platform(terse=True), "processor": _processor(), "cores": cores, "gpus": gpus}


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16 numbers.

    Without them a product takes far longer than in float32: 0.9 GFLOP/s where float32 reaches 69 (one core of an AMD
    EPYC, Zen 3, torch 2.13, 2026-11-27).
    """
    import torch

    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def keep_freed_memory() -> None:
    """Makes glibc keep this process's freed memory for what comes next, instead of returning it; nothing elsewhere.

    By default every activation above 128 KiB is mapped anew and its pages are zeroed at the first touch, which costs
    more than many an op and varies: the reference of layer_norm took 1.0 or 7.5 ms from pass to pass. The demo's step
    took 0.68 s so and 0.60 s with this (two AMD EPYC cores, 2026-11-24).
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _NEVER)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
