"""Kernels in Triton, one file per op family: the portable path for GPUs without the CUDA build.

A family's file holds its kernels and, under the name of each op that it serves, the function that launches them. Its
arguments are those of the op's reference, where their types stand. The files are imported by the first call that they
serve: importing evakernels doesn't import Triton, nor does asking why a call can't be served. `static_reasons` tells
what holds for all calls of a device and dtypes, `shape_reasons` gives the question about a call's shapes.

Without a GPU they are tested by an interpreter of the PTX that Triton makes of them: `interpret` lets them serve CPU
tensors.
"""

import importlib
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch

from evakernels import backends
from evakernels.triton import _limits

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

_OLDEST_GPU = (8, 0)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_FAMILY_OF = {op: family for family, ops in FAMILIES.items() for op in ops}


def register(op: str) -> None:
    """Makes the Triton kernels of `op`, if there are any, one of its backends."""
    if op in _FAMILY_OF:
        device = "cpu" if INTERPRETED else "cuda"
        overload = getattr(torch.ops.evakernels, op).default
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


def static_reasons(op: str, device: torch.device, dtypes: tuple[torch.dtype, ...]) -> list[str]:
    """Why Triton serves no call of `op` on this device with tensors of these dtypes, whatever their shapes.

    Nothing is kept: who asks often keeps the answer. Dtypes of integers don't matter.
    """
    if op not in _FAMILY_OF:
        return [f"{op} has no triton implementation"]
    if not _installed():
        return ["triton is not installed"]
    found = []
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        where = "a CPU, where kernels are interpreted" if INTERPRETED else "a GPU"
        found.append(f"the tensors are on {device}, not on {where}")
    elif device.type == "cuda":
        found += _too_old(torch.cuda.current_device() if device.index is None else device.index)
    refused = dict.fromkeys(dtype for dtype in dtypes if dtype.is_floating_point and dtype not in _DTYPES)
    return found + [f"{dtype} is not one of float32, bfloat16, float16" for dtype in refused]


def shape_reasons(op: str) -> _limits.Reasons | None:
    """What maps the arguments of a call of `op` to the reasons why Triton can't serve their shapes; None where it
    serves all. It asks for sizes alone, and needs no Triton."""
    return _limits.REASONS.get(op)


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
    tensor, shapes = backends.first_tensor(args), shape_reasons(op)
    if tensor is None:
        if not _installed():
            return ["triton is not installed"]
        return [] if INTERPRETED or torch.cuda.is_available() else ["there is no GPU here"]
    found = static_reasons(op, tensor.device, tuple(backends.dtypes(args)))
    return found if found or shapes is None else shapes(*args)
