"""What `torch.autocast` does to the arguments of an op, as PyTorch does it to its own.

PyTorch runs matrix work (linear, attention) in the autocast dtype on every device, and norms in float32 on CUDA but in
the dtype of their input on a CPU. The casts are made by the public functions, in front of the op, so that autograd and
`torch.compile` see them.
"""

import torch
from torch import Tensor


def is_on(device: str) -> bool:
    """Whether autocast is on for this type of device; it doesn't exist for some, such as meta."""
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def matmul_inputs(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the autocast dtype when autocast is on for their device, as for `torch.matmul`."""
    device = tensors[0].device.type
    if not is_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def norm_input(x: Tensor) -> Tensor:
    """`x` in float32 when autocast is on for CUDA, as for `torch.nn.functional.layer_norm`; otherwise as it is."""
    if x.device.type == "cuda" and is_on("cuda") and x.dtype != torch.float64:
        return x.float()
    return x
