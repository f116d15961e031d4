"""Where an op is worth its call: by kind of device, dtype and size, and on a CPU by instruction set.

Measured on CPUs (AMD EPYC, Zen 5 and Zen 3, 2 threads, torch 2.13, 2026-11-25) beside what the untouched modules run;
what isn't faster there isn't listed. On a GPU nothing has been measured: listed are the ops that make one pass over
memory of several.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

from .. import _native, triton
from ..autocast import is_on
from ..backends import refuse

_HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *_HALF)
"""Those that any op serves."""

OPS = {
    "layer_norm": "layer_norm_forward",
    "rms_norm": "layer_norm_forward",
    "add_norm": "add_layer_norm_forward",
    "scaled_add_norm": "add_layer_norm_forward",
    "norm_add": "layer_norm_add_forward",
    "attention": "rope_attention_forward",
    "attention_training": "rope_attention_forward",
    "multi_head": "rope_attention_forward",
    "rope_attention": "rope_attention_forward",
    "swiglu": "swiglu_forward",
    "swiglu_norm": "swiglu_forward",
    "gelu": "gelu_forward",
    "exact_gelu": "gelu_forward",
    "quick_gelu": "gelu_forward",
    "token_dropout": "token_dropout_forward",
    "clip_loss": "contrastive_forward",
    "siglip_loss": "siglip_value",
}
"""What each entry of the tables runs."""

_CPU: dict[str, dict[torch.dtype, int]] = {
    # In float32 torch's is as fast: 0.87 to 1.06 times.
    "layer_norm": dict.fromkeys(_HALF, 1 << 18),
    "rms_norm": dict.fromkeys(DTYPES, 0),
    "add_norm": {torch.float32: 1 << 20} | dict.fromkeys(_HALF, 1 << 18),
    "scaled_add_norm": {torch.float32: 1 << 18} | dict.fromkeys(_HALF, 1 << 18),
    "norm_add": {torch.float32: 1 << 18} | dict.fromkeys(_HALF, 1 << 18),
    # Without a rotation torch's 16-bit attention is 1.5 to 3 times slower, of few tokens only with gradients.
    "attention": dict.fromkeys(_HALF, 1 << 18),
    "attention_training": dict.fromkeys(_HALF, 1 << 15),
    "multi_head": dict.fromkeys(DTYPES, 1 << 15),
    "rope_attention": dict.fromkeys(DTYPES, 1 << 14),
    "swiglu": {torch.float32: 0} | dict.fromkeys(_HALF, 1 << 18),
    "swiglu_norm": dict.fromkeys(DTYPES, 0),
    # By tanh, which torch computes slowly: 2.5 to 4.9 times.
    "gelu": dict.fromkeys(DTYPES, 0),
    # Of 25,000 elements as fast. Of 150,000 1.06 (bfloat16) to 1.76 times (float16), of 2.4 million 1.05 to 2.2 times,
    # with gradients 1.06 to 1.55 and 1.45 to 2.5 times (2026-11-29).
    "exact_gelu": dict.fromkeys(DTYPES, 1 << 16),
    # Three passes in torch. Of 6,000 elements 1.3 times as fast, with gradients as fast; of 25,000 1.2 to 2.4 times, of
    # 2.4 million 3 times and more (2026-11-29).
    "quick_gelu": dict.fromkeys(DTYPES, 1 << 13),
    "token_dropout": dict.fromkeys(DTYPES, 0),
    # In bfloat16 torch's products are twice as fast as these in float32. Of 64 pairs a step is 0.8 times as fast.
    "clip_loss": {torch.float32: 1 << 16},
    "siglip_loss": {torch.float32: 1 << 16},
}
"""Op to dtype to the least number of elements, with AVX-512."""

_CPU_AMD: dict[str, dict[torch.dtype, int]] = _CPU | {
    # As times as fast as torch's, which asks MKL, with 16 to 1,025 tokens (Zen 5, 2026-11-28): 1.6 to 4.4 in float32,
    # 1.3 to 9 in 16 bit, with gradients 1.3 to 16.
    "attention": dict.fromkeys(DTYPES, 0),
    "attention_training": dict.fromkeys(DTYPES, 0),
    # Of 130,000 elements 1.0 to 1.2 times as fast in 16 bits, forward or with gradients, and behind an add 1.0 to 1.4;
    # of 230,000 in float32 1.16 to 1.33 and 1.12 to 1.27; of a million 1.3 to 2.2 (Zen 5, 2026-11-29).
    "layer_norm": {torch.float32: 3 << 16} | dict.fromkeys(_HALF, 1 << 17),
    "add_norm": {torch.float32: 3 << 16} | dict.fromkeys(_HALF, 1 << 17),
    "scaled_add_norm": {torch.float32: 3 << 16} | dict.fromkeys(_HALF, 1 << 17),
}
"""The same on AMD's processors."""

_CPU_AMX: dict[str, dict[torch.dtype, int]] = _CPU | {
    "layer_norm": {torch.float32: 1 << 20} | dict.fromkeys(_HALF, 1 << 17),
    "add_norm": {torch.float32: 1 << 19} | dict.fromkeys(_HALF, 1 << 17),
    "scaled_add_norm": {torch.float32: 1 << 18} | dict.fromkeys(_HALF, 1 << 17),
    "attention": dict.fromkeys(_HALF, 0),
    "attention_training": dict.fromkeys(_HALF, 0),
}
"""The same with AMX."""

_CPU_AVX2: dict[str, dict[torch.dtype, int]] = _CPU | {
    # Of 300,000 elements these norms are 0.8 to 1.1 times as fast, of 600,000 1.0 to 1.5 times; behind a plain add in
    # bfloat16 0.8 still.
    "layer_norm": dict.fromkeys(_HALF, 1 << 19),
    "add_norm": dict.fromkeys(DTYPES, 1 << 20),
    "norm_add": {torch.float32: 1 << 19} | dict.fromkeys(_HALF, 1 << 19),
    # Scores in float32 are products in float32 here: as fast as torch's bfloat16, of which only the gradients are slow.
    "attention": {torch.float16: 1 << 18},
    # On a Zen 5 kept to AVX2: the exact form 1.4 to 2 times as fast in 16 bits, in float32 with gradients 0.93 times;
    # QuickGELU 1.1 to 6 times (2026-11-29).
    "exact_gelu": dict.fromkeys(_HALF, 1 << 17),
    "quick_gelu": dict.fromkeys(DTYPES, 1 << 17),
}
"""The same without AVX-512."""

_PRODUCTS = ("attention", "attention_training", "multi_head", "rope_attention")
_GPU = {name: dict.fromkeys(DTYPES, 0) for name in _CPU if name not in (*_PRODUCTS, "gelu", "exact_gelu")} | {
    # Tensor cores take 16 bit; without a rotation torch's own attention kernels have nothing to gain.
    "rope_attention": dict.fromkeys(_HALF, 0),
}


def _is_live(name: str, device: str) -> bool:
    """Whether compiled or Triton kernels serve the op on this type of device; the reference would be slower."""
    op = OPS[name]
    if _native.implemented(op, device):
        return True
    of_triton = any(op in ops for ops in triton.FAMILIES.values())
    return device == "cuda" and of_triton and find_spec("triton") is not None


def cpu_table(isa: str | None, amd: bool = False) -> dict[str, dict[torch.dtype, int]]:
    """The table for the instruction set that the kernels run on, and for AMD's processors or others."""
    if isa == "amx":
        return _CPU_AMX
    if isa is None or not isa.startswith("avx512"):
        return _CPU_AVX2
    return _CPU_AMD if amd else _CPU


_TABLES = {"cpu": cpu_table(_native.active_isa(), _native.is_amd()), "cuda": _GPU}
DEVICES = tuple(_TABLES)
"""The kinds of devices that there are kernels for."""

_SERVED: dict[tuple[str, str, torch.dtype], int] = {
    (name, device, dtype): least
    for device, table in _TABLES.items()
    for name, dtypes in table.items()
    if _is_live(name, device)
    for dtype, least in dtypes.items()
}


_FORCED: dict[tuple[str, str, torch.dtype], int] = {
    (name, device, dtype): 0 for device in DEVICES for name in OPS if _is_live(name, device) for dtype in DTYPES
}
"""The same for modules that are to run on the ops whether that is worth it or not."""


def is_served(name: str, device: str, dtype: torch.dtype, forced: bool = False) -> bool:
    """Whether there are sizes at which the op `name` is worth its call, be it in training only."""
    table = _FORCED if forced else _SERVED
    return any((entry, device, dtype) in table for entry in (name, f"{name}_training"))


def serves(name: str, x: Tensor, *, of_product: bool = False, forced: bool = False) -> bool:
    """Whether the op `name` is worth a call with `x`, or with a linear layer's output for `x` if `of_product`.

    Never for what isn't a plain tensor, such as a DTensor or a proxy of a tracer, nor under functorch's transforms:
    there the untouched code runs. So it is asked before anything else about `x`. With `forced`, whether it can serve.
    """
    if not is_ordinary(x):
        return refuse("tensor subclass, transform or tracer")
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if of_product and is_on(device) else x.dtype
    if _serves_all:
        return dtype in DTYPES
    least = (_FORCED if forced else _SERVED).get((name, device, dtype))
    if least is None:
        return refuse(f"{str(dtype).removeprefix('torch.')} on {device}")
    return x.numel() >= least or refuse("too small")


_serves_all = False


@contextmanager
def serve_all() -> Iterator[None]:
    """Serves every call inside the `with` block, at every size and on whatever backend there is."""
    global _serves_all
    _serves_all = True
    try:
        yield
    finally:
        _serves_all = False


def is_ordinary(x: Tensor) -> bool:
    """Whether `x` is one of torch's own tensors, seen by nothing but autograd and a compiler."""
    if type(x) is not Tensor and type(x) is not torch.nn.Parameter:
        return False
    # A compiler itself knows of transforms, and doesn't trace these questions.
    return torch.compiler.is_compiling() or not (
        torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None
    )
