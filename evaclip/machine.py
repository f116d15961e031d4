"""Machine and package versions, for runs and evaluations."""

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any


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
    import torch  # here, as `evaclip report` only reads the machines of runs

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"system": platform.platform(terse=True), "processor": _processor(), "cores": usable_cores(), "gpus": gpus}


def usable_cores() -> int:
    """Number of processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for matmuls in bfloat16; without them these are far slower than fp32."""
    import torch

    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
