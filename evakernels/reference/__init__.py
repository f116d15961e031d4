"""The definition of each op in plain PyTorch: one file per family, for any device and any float dtype."""

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 when any tensor is float64, float32 otherwise: the dtype of sums and statistics."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
