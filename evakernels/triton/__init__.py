"""Kernels in Triton, one file per op family: the portable path for GPUs without the CUDA build.

A family's file holds its kernels and a launcher under the name of each op, with the arguments of the op's reference.
The first call imports it, so that importing evakernels doesn't import Triton. `interpret` lets the kernels run on CPU
tensors, by an interpreter of their PTX, for tests.
"""

import importlib
import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import backends

FAMILIES: dict[str, list[str]] = {}
"""The ops of each file in this folder."""

INTERPRETED = False
"""Whether the kernels run on CPU tensors. They read it when they are imported, so it holds for the whole process."""

MAX_WIDTH = 1 << 13
"""Channels of a norm's row in registers, in backward with its gradient and the sums over rows."""

MAX_SWIGLU_WIDTH = 1 << 12
"""Channels of SwiGLU's row with a norm, forward and backward, or of a program's part of a row without a norm."""

MAX_HEAD_DIM = 128
"""Channels of a head in registers."""

_MAX_TABLE = (1 << 31) - 1
"""Elements of a head's rotary table, for 32-bit offsets."""

_OLDEST_GPU = (8, 0)
_FAMILY_OF: dict[str, str] = {}
_size_reasons: dict[str, backends.Reasons] = {}


def register(op: str, family: str, size_reasons: backends.Reasons) -> None:
    """Registers the Triton kernels of `op`, if its family has a file; `size_reasons`: `define`'s `triton_reasons`."""
    if not Path(__file__).with_name(f"{family}.py").exists():
        return
    if op not in _FAMILY_OF:
        FAMILIES.setdefault(family, []).append(op)
        _FAMILY_OF[op] = family
        _size_reasons[op] = size_reasons
    function = backends.noting_writes(lambda *args: launcher(op)(*args), backends.overload(op))
    backends.register(op, "triton", function, lambda *args: _reasons(op, args), "cpu" if INTERPRETED else "cuda")


def interpret() -> None:
    """Lets the kernels run on CPU tensors in small chunks, for an interpreter; call it before any kernel."""
    global INTERPRETED
    INTERPRETED = True
    for op, family in _FAMILY_OF.items():
        register(op, family, _size_reasons[op])


@cache
def launcher(op: str) -> Callable[..., Any]:
    """The function that launches the kernels of `op`; it takes the op's arguments."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"{__name__}.{_FAMILY_OF[op]}"), op)
    return function


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


@cache
def _too_old(device: int) -> list[str]:
    """A reason if Triton doesn't support this GPU."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is None or capability >= _OLDEST_GPU:  # AMD's have numbers of their own
        return []
    return [f"the GPU has compute capability {capability[0]}.{capability[1]}; Triton needs 8.0 or later"]


def _reasons(op: str, args: tuple[Any, ...]) -> list[str]:
    """Why Triton doesn't support a call; without arguments, any call."""
    if not _installed():
        return ["triton is not installed"]
    tensor = backends.first_tensor(args)
    if tensor is None:
        return [] if INTERPRETED or torch.cuda.is_available() else ["there is no GPU here"]
    reasons, device = [], tensor.device
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        where = "a CPU, where kernels are interpreted" if INTERPRETED else "a GPU"
        reasons.append(f"the tensors are on {device}, not on {where}")
    elif device.type == "cuda":
        reasons += _too_old(torch.cuda.current_device() if device.index is None else device.index)
    reasons += backends.dtype_reasons(args)
    return reasons or _size_reasons[op](tensor, **backends.by_name(op, args))


def row_reasons(rows: Tensor, limit: int = MAX_WIDTH) -> list[str]:
    """Why the kernels don't support rows of this width."""
    return [f"rows of {rows.shape[-1]} channels are longer than {limit}"] if rows.shape[-1] > limit else []


def head_reasons(heads: Tensor, /, *, scale: float | None = None, cos: Tensor | None = None, **_: Any) -> list[str]:
    """Why the kernels don't support this head dimension, scale or rotary table."""
    head_dim, reasons = heads.shape[-1], []
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        reasons.append(f"head_dim {head_dim} is not one of 1 to {MAX_HEAD_DIM}")
    if scale is not None and not scale > 0:
        reasons.append(f"scale {scale} is not positive")
    if cos is not None and (size := math.prod(cos.shape[-2:])) > _MAX_TABLE:
        reasons.append(f"a table of {size} elements is larger than {_MAX_TABLE}")
    return reasons
