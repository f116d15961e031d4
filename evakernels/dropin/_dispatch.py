"""Tables of ops that are faster than the untouched modules, by device, dtype, size and a CPU's instruction set.

The GPU table isn't measured: it has the ops that make one pass over memory instead of several.
"""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .. import _native, triton
from .._modes import has_global_hooks
from ..autocast import is_on

_HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *_HALF)
"""The dtypes of all ops."""
ALWAYS: Any = "always"
"""A value of `forced` for comparisons: every op runs, at every size and on any backend."""
NEVER: Any = None
"""A value of `forced` for comparisons: as False, but replacements don't call a block's own forward."""
TINY = 1 << 13
"""Number of elements below which a block runs its own forward on CPUs."""

OPS = {
    "layer_norm": "layer_norm_forward",
    "rms_norm": "layer_norm_forward",
    "add_norm": "layer_norm_forward",
    "scaled_add_norm": "layer_norm_forward",
    "norm_add": "layer_norm_forward",
    "attention": "rope_attention_forward",
    "attention_training": "rope_attention_forward",
    "multi_head": "rope_attention_forward",
    "rope_attention": "rope_attention_forward",
    "packed_attention": "packed_attention_forward",
    "swiglu": "swiglu_forward",
    "swiglu_norm": "swiglu_forward",
    "gelu": "gelu_forward",
    "exact_gelu": "gelu_forward",
    "quick_gelu": "gelu_forward",
    "token_dropout": "token_dropout_forward",
    "clip_loss": "contrastive_forward",
    "siglip_loss": "siglip_forward",
}
"""The op of each entry of the tables."""

_Table = dict[str, dict[torch.dtype, int]]

_CPU: _Table = {
    "layer_norm": dict.fromkeys(_HALF, 1 << 18),
    "rms_norm": dict.fromkeys(DTYPES, 0),
    "add_norm": {torch.float32: 1 << 20} | dict.fromkeys(_HALF, 1 << 18),
    "scaled_add_norm": {torch.float32: 1 << 18} | dict.fromkeys(_HALF, 1 << 18),
    "norm_add": {torch.float32: 1 << 18} | dict.fromkeys(_HALF, 1 << 18),
    # torch's float32 attention is as fast without a rotation; its 16-bit gradients are slow.
    "attention": dict.fromkeys(_HALF, 1 << 18),
    "attention_training": dict.fromkeys(_HALF, 1 << 15),
    "multi_head": dict.fromkeys(DTYPES, 1 << 15),
    "rope_attention": dict.fromkeys(DTYPES, 1 << 14),
    "packed_attention": dict.fromkeys(DTYPES, 0),
    "swiglu": {torch.float32: 0} | dict.fromkeys(_HALF, 1 << 18),
    "swiglu_norm": dict.fromkeys(DTYPES, 0),
    "gelu": dict.fromkeys(DTYPES, 0),
    "exact_gelu": dict.fromkeys(DTYPES, 1 << 16),
    "quick_gelu": dict.fromkeys(DTYPES, 1 << 13),
    "token_dropout": dict.fromkeys(DTYPES, 0),
    # In 16 bits torch's matmuls are faster than the op's float32 ones.
    "clip_loss": {torch.float32: 1 << 16},
    "siglip_loss": {torch.float32: 1 << 16},
}
"""Minimum number of elements by op and dtype, with AVX-512."""

_CPU_AMD: _Table = _CPU | {
    "attention": dict.fromkeys(DTYPES, TINY),
    "attention_training": dict.fromkeys(DTYPES, TINY),
    "layer_norm": {torch.float32: 3 << 16} | dict.fromkeys(_HALF, 1 << 17),
    "add_norm": {torch.float32: 3 << 16} | dict.fromkeys(_HALF, 1 << 17),
    "scaled_add_norm": {torch.float32: 3 << 16} | dict.fromkeys(_HALF, 1 << 17),
}
"""The same on AMD's processors, where torch's matmuls by MKL are slow."""

_CPU_AMX: _Table = _CPU | {
    "layer_norm": {torch.float32: 1 << 20} | dict.fromkeys(_HALF, 1 << 17),
    "add_norm": {torch.float32: 1 << 19} | dict.fromkeys(_HALF, 1 << 17),
    "scaled_add_norm": {torch.float32: 1 << 18} | dict.fromkeys(_HALF, 1 << 17),
    "attention": dict.fromkeys(_HALF, 0),
    "attention_training": dict.fromkeys(_HALF, 0),
}
"""The same with AMX."""

_CPU_AVX2: _Table = _CPU | {
    "layer_norm": dict.fromkeys(_HALF, 1 << 19),
    "add_norm": dict.fromkeys(DTYPES, 1 << 20),
    "norm_add": {torch.float32: 1 << 19} | dict.fromkeys(_HALF, 1 << 19),
    # The op computes scores in float32 here.
    "attention": {torch.float16: 1 << 18},
    "exact_gelu": dict.fromkeys(_HALF, 1 << 17),
    "quick_gelu": dict.fromkeys(DTYPES, 1 << 17),
}
"""The same without AVX-512."""

_MATMULS = ("attention", "attention_training", "multi_head", "rope_attention", "packed_attention")
_GPU: _Table = {name: dict.fromkeys(DTYPES, 0) for name in _CPU if name not in (*_MATMULS, "gelu", "exact_gelu")} | {
    # Tensor cores take 16 bits. Without a rotation torch's own attention kernels have nothing to gain.
    "rope_attention": dict.fromkeys(_HALF, 0),
    "packed_attention": dict.fromkeys(_HALF, 0),
}


def _has_kernels(name: str, device: str) -> bool:
    """Whether the op has compiled or Triton kernels for this type of device; the reference would be slower."""
    op = OPS[name]
    has_triton = any(op in ops for ops in triton.FAMILIES.values()) and find_spec("triton") is not None
    return _native.implemented(op, device) or (device == "cuda" and has_triton)


_CPUS = {"amx": _CPU_AMX, "avx512_bf16": _CPU, "avx512": _CPU, "amd": _CPU_AMD}
_TABLES = {"cpu": _CPUS.get(_native.processor(), _CPU_AVX2), "cuda": _GPU}
DEVICES = tuple(_TABLES)
"""The types of devices with kernels."""

_MIN_SIZES: dict[tuple[str, str, torch.dtype], int] = {
    (name, device, dtype): size
    for device, table in _TABLES.items()
    for name, dtypes in table.items()
    if _has_kernels(name, device)
    for dtype, size in dtypes.items()
}
_FORCED: dict[tuple[str, str, torch.dtype], int] = {
    (name, device, dtype): 0 for device in DEVICES for name in OPS if _has_kernels(name, device) for dtype in DTYPES
}
"""The same for modules that run on the ops even where their own code is faster."""


def has_op(name: str, device: str, dtype: torch.dtype, forced: bool = False) -> bool:
    """Whether the op `name` is faster at some size, in training or in inference."""
    table = _FORCED if forced else _MIN_SIZES
    return any((entry, device, dtype) in table for entry in (name, f"{name}_training"))


def dispatches_to(name: str, x: Tensor, *, after_linear: bool = False, forced: bool = False) -> bool:
    """Whether the op `name` is faster for `x`, or with `after_linear` for a linear layer's output of `x`.

    False for tensor subclasses, such as a DTensor or a tracer's proxy, under functorch's transforms and with global
    hooks. Call it before anything else reads `x`. With `forced`: whether the op supports the call.
    """
    if not is_plain(x) or has_global_hooks():
        return False
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if after_linear and is_on(device) else x.dtype
    if forced is ALWAYS:
        return dtype in DTYPES
    size = (_FORCED if forced else _MIN_SIZES).get((name, device, dtype))
    return size is not None and x.numel() >= size


def is_tiny(x: Tensor, forced: bool) -> bool:
    """Whether a block's own code is faster, as the host time of more checks than torch makes outweighs any op."""
    return forced is False and type(x) is Tensor and x.is_cpu and not torch.compiler.is_compiling() and x.numel() < TINY


def attention_op() -> str:
    """The entry of attention without a rotation, in training or in inference."""
    return "attention_training" if torch.is_grad_enabled() else "attention"


def is_plain(x: Tensor) -> bool:
    """Whether `x` is a tensor of torch's own class that only autograd and a compiler trace."""
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        return False
    # Dynamo handles transforms itself and can't trace these two queries.
    return torch.compiler.is_compiling() or not (
        torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None
    )
