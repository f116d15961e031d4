"""Kernels in Triton, one file per op family: the portable path for GPUs without the CUDA build.

A family's file holds its kernels and, under the name of each op that it serves, the function that launches them. Its
arguments are those of the op's reference, where their types stand. The files are imported by the first call that they
serve: importing evakernels doesn't import Triton, nor does asking why a call can't be served.

Without a GPU they are tested by an interpreter of the PTX that Triton makes of them: `interpret` lets them serve CPU
tensors.
"""

import importlib
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .. import backends

FAMILIES = {
    "adamw": ("adamw_update",),
    "contrastive": (
        "contrastive_forward",
        "contrastive_backward",
        "contrastive_kept_forward",
        "contrastive_kept_backward",
        "siglip_value",
        "siglip_forward",
        "siglip_backward",
    ),
    "lamb": ("lamb_update", "lamb_apply", "lamb_step"),
    "layer_norm": (
        "layer_norm_forward",
        "layer_norm_backward",
        "add_layer_norm_forward",
        "add_layer_norm_backward",
        "layer_norm_add_forward",
        "layer_norm_add_backward",
    ),
    "packed_attention": ("packed_attention_forward", "packed_attention_backward"),
    "rope_attention": ("rope_attention_forward", "rope_attention_backward"),
    "swiglu": ("swiglu_forward", "swiglu_backward"),
    "token_dropout": ("token_dropout_forward", "token_dropout_backward"),
}
"""The ops that each file here serves."""

INTERPRETED = False
"""Whether the kernels serve CPU tensors. They read it when they are imported, so it holds for the whole process."""

MAX_WIDTH = 1 << 13
"""Channels of a norm's row: registers hold it, and in backward its gradient and the sums over rows."""

MAX_SWIGLU_WIDTH = 1 << 12
"""Channels of SwiGLU with a norm; without one, of a program's piece of a row. Backward holds more than forward. Both
have one limit, so that one backend serves both."""

MAX_HEAD_DIM = 128
"""Channels of a head, whose rows registers hold."""

_OLDEST_GPU = (8, 0)
_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
_FAMILY_OF = {op: family for family, ops in FAMILIES.items() for op in ops}


def register(op: str) -> None:
    """Makes the Triton kernels of `op`, if there are any, one of its backends."""
    if op in _FAMILY_OF:
        device = "cpu" if INTERPRETED else "cuda"
        overload = backends.overload(op)
        function = backends.noting_writes(lambda *args: launcher(op)(*args), overload)
        backends.register(op, "triton", function, lambda *args: _reasons(op, args), device)


def interpret() -> None:
    """Lets the kernels serve CPU tensors, for who runs what Triton compiles without a GPU, in small pieces.

    To be called before any of them is.
    """
    global INTERPRETED
    INTERPRETED = True
    for op in _FAMILY_OF:
        register(op)


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
    """The reason, if it is one, why Triton compiles nothing for the GPU of that number."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is None or capability >= _OLDEST_GPU:  # AMD's have numbers of their own
        return []
    return [f"the GPU has compute capability {capability[0]}.{capability[1]}; Triton needs 8.0 or later"]


def _reasons(op: str, args: tuple[Any, ...]) -> list[str]:
    """Why Triton can't serve a call; without arguments, what holds for every call."""
    if not _installed():
        return ["triton is not installed"]
    tensor = backends.first_tensor(args)
    if tensor is None:
        return [] if INTERPRETED or torch.cuda.is_available() else ["there is no GPU here"]
    found, device = [], tensor.device
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        where = "a CPU, where kernels are interpreted" if INTERPRETED else "a GPU"
        found.append(f"the tensors are on {device}, not on {where}")
    elif device.type == "cuda":
        found += _too_old(torch.cuda.current_device() if device.index is None else device.index)
    unknown = sorted(str(dtype) for dtype in backends.dtypes(args) - _DTYPES if dtype.is_floating_point)
    found += [f"{dtype} is not one of float32, bfloat16, float16" for dtype in unknown]
    return found or _size_reasons(_FAMILY_OF[op], tensor, backends.by_name(op, args))


def _size_reasons(family: str, tensor: Tensor, given: dict[str, Any]) -> list[str]:
    """Why Triton can't serve the sizes of a call: its first tensor, and its arguments by name."""
    found = []
    if family in ("layer_norm", "swiglu"):
        limit = MAX_SWIGLU_WIDTH if family == "swiglu" else MAX_WIDTH
        has_norm = family == "layer_norm" or given.get("norm_weight") is not None
        if has_norm and tensor.shape[-1] > limit:
            found.append(f"rows of {tensor.shape[-1]} channels are longer than {limit}")
    elif family in ("rope_attention", "packed_attention"):
        head_dim, scale = tensor.shape[-1], given.get("scale")
        if not 1 <= head_dim <= MAX_HEAD_DIM:
            found.append(f"head_dim {head_dim} is not one of 1 to {MAX_HEAD_DIM}")
        if scale is not None and not scale > 0:
            found.append(f"scale {scale} is not positive")
    return found
