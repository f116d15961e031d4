"""Kernels in Triton, one file per op family: the portable path for GPUs without the CUDA build.

A family's file holds its kernels and, under the name of each op that it serves, the function that launches them. The
files are imported by the first call that they could serve: importing evakernels doesn't import Triton.

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

FAMILIES = {
    "contrastive": (
        "contrastive_forward",
        "contrastive_backward",
        "contrastive_kept_forward",
        "contrastive_kept_backward",
        "siglip_value",
        "siglip_forward",
        "siglip_backward",
    ),
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
        backends.register(op, "triton", lambda *args: launcher(op)(*args), lambda *args: _reasons(op, args), device)


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
    function: Callable[..., Any] = getattr(_module(op), op)
    return function


def _module(op: str) -> Any:
    return importlib.import_module(f"{__name__}.{_FAMILY_OF[op]}")


@cache  # asked at every call of an op
def _installed() -> bool:
    return find_spec("triton") is not None


@cache  # asked at every call of an op
def _too_old(device: int) -> list[str]:
    """The reason, if it is one, why Triton compiles nothing for the GPU of that number."""
    capability = torch.cuda.get_device_capability(device)
    if torch.version.cuda is None or capability >= _OLDEST_GPU:  # AMD's have numbers of their own
        return []
    return [f"the GPU has compute capability {capability[0]}.{capability[1]}; Triton needs 8.0 or later"]


def _reasons(op: str, args: tuple[Any, ...]) -> list[str]:
    """Why Triton can't serve a call: what holds for every op, and what the family's own `reasons` adds."""
    if not _installed():
        return ["triton is not installed"]
    if not args:
        return [] if INTERPRETED or torch.cuda.is_available() else ["there is no GPU here"]
    found = []
    tensor = backends.first_tensor(args)
    device = "cpu" if INTERPRETED else "cuda"
    if tensor is not None and tensor.device.type != device:
        where = "a CPU, where kernels are interpreted" if INTERPRETED else "a GPU"
        found.append(f"the tensors are on {tensor.device}, not on {where}")
    elif tensor is not None and tensor.is_cuda:
        found += _too_old(tensor.device.index)
    dtypes = dict.fromkeys(t.dtype for t in backends.tensors(args) if t.dtype.is_floating_point)
    found += [f"{d} is not one of float32, bfloat16, float16" for d in dtypes if d not in _DTYPES]
    if not found:
        own = getattr(_module(op), "reasons", None)
        found += own(op, *args) if own else []
    return found
