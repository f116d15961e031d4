"""The L2 norm of several tensors as one vector: the root of the sum of all squares.

The squares are summed in float32 (float64 when any tensor is float64). Nothing waits for the device.
"""

import torch
from torch import Tensor

from evakernels.reference._numerics import accumulation_dtype

# Elements: what lies in the cache between square and sum. torch's own norms on a CPU are slower, and add up a float32
# vector of 20 million with an error of 0.1 %.
_PART = 2**20
# Tensors up to this size are put behind one another first: each of two calls costs more than all that they do with it.
_SMALL = 2**14


def gradient_norm(grads: list[Tensor]) -> Tensor:
    dtype = accumulation_dtype(*grads)
    vectors = [grad.reshape(-1).to(dtype) for grad in grads if grad.numel() <= _SMALL]
    vectors = [torch.cat(vectors)] if vectors else []
    vectors += [grad.reshape(-1) for grad in grads if grad.numel() > _SMALL]
    parts = (part for vector in vectors for part in (vector.split(_PART) if vector.numel() > _PART else (vector,)))
    return torch.stack([part.to(dtype).square().sum() for part in parts]).sum().sqrt()
