"""The L2 norm of several tensors as one vector: the root of the sum of all squares.

The squares are summed in float32 (float64 when any tensor is float64). Nothing waits for the device.
"""

import torch
from torch import Tensor

from evakernels.reference._numerics import accumulation_dtype

# Elements: what lies in the cache between square and sum. torch's own norms on a CPU are slower, and add up a float32
# vector of 20 million with an error of 0.1 %.
_PART = 2**20


def gradient_norm(grads: list[Tensor]) -> Tensor:
    dtype = accumulation_dtype(*grads)
    parts = (part for grad in grads for part in grad.reshape(-1).split(_PART))
    return torch.stack([part.to(dtype).square().sum() for part in parts]).sum().sqrt()
