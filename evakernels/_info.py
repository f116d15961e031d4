"""Installed packages and available backends, for error reports and `evaclip doctor`."""

import platform
from importlib import metadata
from typing import Any

import torch

from . import _native
from ._version import __version__


def info() -> dict[str, Any]:
    """Versions, the state of the native library, and the GPUs, as plain values that JSON can hold.

    Returns:
        `evakernels`, `python`, `torch`, `triton`: versions, None if not installed.
        `native`: `loaded`, and the `reason` if not; `built`, None without a build; the `isa` in use, or the `isa_error`
            if this machine doesn't support EVAKERNELS_ISA; `module_error` if the Python module can't be imported,
            otherwise `version`, `compiler`, `isas_built`, `isas_available` and `cuda_archs`, the GPUs with kernels;
            `cuda_reason` if there are none.
        `cuda`: `available`, the `version` of torch's build, `devices` by name.
    """
    return {
        "evakernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "native": _native_info(),
        "cuda": {
            "available": torch.cuda.is_available(),
            "version": torch.version.cuda,
            "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        },
    }


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _native_info() -> dict[str, Any]:
    state: dict[str, Any] = {
        "loaded": _native.LOADED,
        "reason": _native.REASON,
        "isa": None,
        "isa_error": None,
        "module_error": None,
        "built": _native.build_record().get("native"),
        "cuda_reason": _native.build_record().get("cuda_reason"),
    }
    try:
        compiled = _native.python_module()
    except ImportError as exc:
        return state | {"module_error": str(exc) if _native.is_module_built() else None}
    try:
        state["isa"] = compiled.active_isa()
    except ValueError as exc:
        state["isa_error"] = str(exc)
    return state | dict(compiled.build_info())
