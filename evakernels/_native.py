"""The compiled library: loads it, or records the reason why that is impossible."""

import importlib
import json
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import backends

NAMESPACE = f"{backends.NAMESPACE}_native"
"""Namespace of the compiled library's operators."""

_FOLDER = Path(__file__).parent
_LIBRARY = _FOLDER / "_ops.so"
_BUILD_RECORD = _FOLDER / "_build.json"
_DEVICES = {"cuda": "a GPU", "cpu": "a CPU"}


def build_record() -> dict[str, Any]:
    """The build's record: `native`, `cuda`, `reason` and `cuda_reason` if false; empty without a build.

    `cuda_archs` are the requested GPUs, `cuda_codes` nvcc's output (`sm_90` machine code, `compute_90` PTX),
    `cuda_release` is nvcc's.
    """
    try:
        record: dict[str, Any] = json.loads(_BUILD_RECORD.read_text())
    except FileNotFoundError:
        return {}
    return record


def _load() -> str | None:
    if not _LIBRARY.exists():
        return f"not built: {build_record().get('reason') or f'{_LIBRARY} does not exist'}"
    try:
        torch.ops.load_library(_LIBRARY)
    except OSError as exc:
        # Torch's error names the file, its cause the reason.
        return f"{_LIBRARY.name} can't be loaded under torch {torch.__version__}: {exc.__cause__ or exc}"
    return None


REASON: str | None = _load()
"""Why the compiled library is not loaded; None if it is."""

LOADED: bool = REASON is None

PROCESSORS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx", "amd")
"""Kinds of processors."""


class Launcher(NamedTuple):
    """Runs an op: a Python function that takes the named compiled kernel and the op's arguments."""

    function: Callable[..., Any]
    kernel: str


_launchers: dict[tuple[str, str], Launcher] = {}
"""Launchers by op and type of device."""


def register(
    op_name: str,
    reasons: backends.Reasons | None,
    gpu_reasons: backends.Reasons | None,
    cpu_launcher: Launcher | None,
    gpu_launcher: Launcher | None,
) -> None:
    """Registers the library's kernels of an op as its backends "cpu" and "cuda"."""
    for device in _DEVICES:
        launcher = gpu_launcher if runs_gpu_kernels(device) else cpu_launcher
        overload = getattr(getattr(torch.ops, NAMESPACE), op_name if launcher is None else launcher.kernel).default
        # `_op` is a microsecond faster than the overload.
        if launcher is None:
            function = backends.noting_writes(overload._op, overload)
        else:
            _launchers[op_name, device] = launcher
            function = partial(launcher.function, overload._op)
        backends.register(op_name, device, function, _reasons(op_name, device, reasons, gpu_reasons), device)


def _reasons(
    op_name: str, device: str, common_reasons: backends.Reasons | None, gpu_reasons: backends.Reasons | None
) -> backends.Reasons:
    def reasons(*args: Any) -> list[str]:
        if not LOADED:
            return [f"the compiled library is not loaded: {REASON}"]
        if not implemented(op_name, device):
            return [f"{op_name} has no compiled {device.upper()} kernel"]
        tensor = backends.first_tensor(args)
        if tensor is None:
            return [] if device != "cuda" or torch.cuda.is_available() else ["there is no GPU here"]
        place, unsupported = tensor.device, []
        if place.type != device:
            unsupported.append(f"the tensors are on {place}, not on {_DEVICES[device]}")
        elif device == "cuda" and (reason := gpu_unsupported_reason(place.index)):
            unsupported.append(reason)
        unsupported += backends.dtype_reasons(args)
        if common_reasons is not None:
            unsupported += common_reasons(**backends.by_name(op_name, args))
        if gpu_reasons is not None and runs_gpu_kernels(device):
            unsupported += gpu_reasons(**backends.by_name(op_name, args))
        return unsupported

    return reasons


@cache
def implemented(op_name: str, device_type: str) -> bool:
    """Whether the compiled library has a kernel for `<op_name>`, or for its launcher, on this type of device."""
    if not LOADED or device_type not in _DEVICES:
        return False
    launcher = _launchers.get((op_name, device_type))
    kernel = op_name if launcher is None else launcher.kernel
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{kernel}", device_type.upper())
    except RuntimeError:  # no such operator
        return False


def runs_gpu_kernels(device_type: str) -> bool:
    """Whether kernels for GPUs run on this type of device: on a CPU only in a test build, which interprets them."""
    return device_type == "cuda" or implemented("interpreted", device_type)


@cache
def gpu_unsupported_reason(index: int) -> str | None:
    """Why no compiled kernel runs on the GPU of that number; None if they do, or if the build left no record of it."""
    codes: list[str] = build_record().get("cuda_codes") or []
    capability = torch.cuda.get_device_capability(index)
    usable = [code for code in codes if _runs_on(code, capability)]
    if release := build_record().get("cuda_release"):
        driver = divmod(driver_version() // 10, 100)
        toolkit = tuple(map(int, release.split(".")))
        # A driver runs machine code of later toolkits of its major version, but doesn't compile their PTX.
        needs_ptx = bool(usable) and all(code.startswith("compute") for code in usable)
        if driver[0] < toolkit[0] or (needs_ptx and driver < toolkit):
            version = ".".join(map(str, driver))
            return f"the driver is for CUDA {version}; the library was compiled with CUDA {release}: update the driver"
    if not codes or usable:
        return None
    version = ".".join(map(str, capability))
    return f"the GPU has compute capability {version}; the library was compiled for {', '.join(codes)}"


def driver_version() -> int:
    """The version of the CUDA driver, such as 12040 for 12.4; 0 under a torch for CPUs."""
    query: Callable[[], int] = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)
    return query()


def _runs_on(code: str, capability: tuple[int, int]) -> bool:
    """`sm_90` is machine code for 9.0 to 9.9, `compute_90` is PTX for 9.0 and all that is newer."""
    kind, _, number = code.partition("_")
    oldest = divmod(int(number), 10)
    return oldest <= capability and (kind == "compute" or oldest[0] == capability[0])


@cache
def active_isa() -> str | None:
    """The instruction set of the CPU kernels: "baseline", "avx2", "avx512", "avx512_bf16" or "amx".

    None without compiled kernels, or if EVAKERNELS_ISA names an instruction set that this machine lacks.
    """
    try:
        isa: str = python_module().active_isa()
    except (ImportError, ValueError):
        return None
    return isa


@cache
def processor() -> str:
    """The kind of processor, by which implementations are chosen: "amd" with AVX-512, others by instruction set.

    Tests set EVAKERNELS_PROCESSOR to another kind; EVAKERNELS_ISA chooses the kernels.
    """
    kind = os.environ.get("EVAKERNELS_PROCESSOR")
    if kind and kind not in PROCESSORS:
        raise ValueError(f"EVAKERNELS_PROCESSOR must be one of {', '.join(PROCESSORS)}, got {kind!r}")
    capabilities = torch.cpu.get_capabilities()
    isa = active_isa() or ("avx512_bf16" if capabilities.get("avx512_f") else "baseline")
    is_amd = str(capabilities.get("cpu_name", "")).startswith("AMD") and isa.startswith("avx512")
    return kind or ("amd" if is_amd else isa)


def is_module_built() -> bool:
    """Whether `evakernels._C` is next to this file."""
    return any(_FOLDER.glob("_C.*.so"))


def python_module() -> Any:
    """The module `evakernels._C`; ImportError if it isn't built or can't be loaded.

    A copy of this package must not find another folder's module: it would load a second library with the same kernels.
    """
    if not is_module_built():
        raise ImportError("evakernels._C is not built")
    return importlib.import_module("._C", __package__)
