"""GELU with the bias before it, as it stands between the two projections of an MLP."""

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

import evakernels
from benchmarks.operation import Draw, Inputs, Operation, count_passes, register
from benchmarks.shapes import Shape


def _inputs(shape: Shape, draw: Draw) -> Inputs:
    return {"x": draw.normal(shape.batch, shape.tokens, shape.hidden), "bias": draw.normal(shape.hidden, scale=0.1)}


def _eager(x: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x + bias)


def _quick(x: Tensor, bias: Tensor) -> Tensor:
    total = x + bias
    return total * torch.sigmoid(1.702 * total)


_GELU = register(
    Operation(
        name="gelu",
        summary="gelu(x + bias), exact",
        inputs=_inputs,
        eager=_eager,
        ours=evakernels.gelu,
        work=count_passes("hidden", forward=2, backward=3),
        shapes={
            "cpu": ("eva02-b16:text b1", "eva02-b16:text b8", "eva01-g14@224 b1"),
            "cuda": ("eva02-b16:text b64", "eva02-b16:text b512", "eva01-g14@224 b256", "eva02-bige14@224 b128"),
        },
        raw=lambda rows, channels: Shape(tokens=rows, hidden=channels),
        small="4x64",
        gradients=("x", "bias"),
        registered="gelu_forward",
    )
)
register(
    replace(
        _GELU,
        name="quick_gelu",
        summary="gelu(x + bias) as x sigmoid(1.702 x), CLIP's",
        eager=_quick,
        ours=partial(evakernels.gelu, approximate="sigmoid"),
    )
)
