"""The L2 norm of several tensors as one vector: the root of the sum of all squares.

The squares are summed in float32 (float64 when any tensor is float64). Nothing waits for the device.
"""

import torch
from torch import Tensor

from evakernels.reference._numerics import accumulation_dtype


def gradient_norm(grads: list[Tensor]) -> Tensor:
    norms = torch._foreach_norm(grads, 2, dtype=accumulation_dtype(*grads))
    return torch.stack(norms).norm()
