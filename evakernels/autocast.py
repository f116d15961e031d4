"""The casts of `torch.autocast` for the arguments of an op, as PyTorch makes them for its own ops.

PyTorch runs matrix work (linear, attention) in the autocast dtype on every device, and norms in float32 on CUDA but in
the dtype of their input on a CPU. The casts are made by the public functions, before the op, so that autograd and
`torch.compile` see them.
"""

from typing import Any

import torch
from torch import Tensor

_HALVES = (torch.bfloat16, torch.float16)


def is_on(device: str) -> bool:
    """Whether autocast is on for this type of device; it doesn't exist for some, such as meta."""
    # The compiler of torch 2.11 can't query this.
    available = device != "meta" if torch.compiler.is_compiling() else torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)


def matmul_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype when autocast is on for their device, as for `torch.matmul`."""
    device = tensors[0].device.type
    if not is_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def widens_norms(x: Tensor) -> bool:
    """Whether autocast computes the norm of `x` in float32: on CUDA, as `torch.nn.functional.layer_norm`."""
    return x.device.type == "cuda" and is_on("cuda") and x.dtype != torch.float64


def widened(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Casts 16-bit parameters to float32, for a norm in float32."""
    return tuple(t.float() if isinstance(t, Tensor) and t.dtype in _HALVES else t for t in tensors)
