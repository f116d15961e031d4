"""LayerNorm: plain, with the residual add before it and with the residual add after it."""

from dataclasses import replace
from functools import partial

import torch.nn.functional as F
from torch import Tensor

import evakernels
from benchmarks.operation import NVIDIA_APEX, Draw, Function, Inputs, Operation, count_passes, peer, register
from benchmarks.shapes import Shape

EPS = 1e-6

_SHAPES = {
    "cpu": ("eva02-b16@224 b1", "eva02-b16@224 b8", "eva02-l14@224 b8"),
    "cuda": (
        "eva02-b16@224 b512",
        "eva02-l14@224 b256",
        "eva02-l14@224 b256 drop50",
        "eva02-l14@336 b128",
        "eva01-g14@224 b128",
        "eva02-bige14@224 b128",
        "eva02-l14:text b256",
    ),
}
_RESIDUAL_SHAPES = _SHAPES | {"cpu": ("eva02-b16@224 b8", "eva02-l14@224 b8")}


def _affine(shape: Shape, draw: Draw) -> Inputs:
    return {"weight": draw.normal(shape.width, scale=0.1, mean=1.0), "bias": draw.normal(shape.width, scale=0.1)}


def _norm_inputs(shape: Shape, draw: Draw) -> Inputs:
    return {"x": draw.normal(shape.batch, shape.tokens, shape.width), **_affine(shape, draw)}


def _residual_inputs(shape: Shape, draw: Draw) -> Inputs:
    size = (shape.batch, shape.tokens, shape.width)
    return {"residual": draw.normal(*size), "branch": draw.normal(*size), **_affine(shape, draw)}


def _norm_eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, EPS)


def _add_norm_eager(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    x = residual + branch
    return F.layer_norm(x, weight.shape, weight, bias, EPS), x


def _norm_add_eager(residual: Tensor, branch: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return residual + F.layer_norm(branch, weight.shape, weight, bias, EPS)


_NORM = register(
    Operation(
        name="layer_norm",
        summary="LayerNorm over the channels",
        inputs=_norm_inputs,
        eager=_norm_eager,
        ours=partial(evakernels.layer_norm, eps=EPS),
        work=count_passes("width", forward=2, backward=3),
        shapes=_SHAPES,
        raw=lambda rows, channels: Shape(tokens=rows, width=channels),
        small="4x64",
        gradients=("x", "weight", "bias"),
        registered="layer_norm_forward",
    )
)
_ADD_NORM = register(
    replace(
        _NORM,
        name="add_layer_norm",
        summary="residual add, then LayerNorm of the sum; both are returned",
        inputs=_residual_inputs,
        eager=_add_norm_eager,
        ours=partial(evakernels.add_layer_norm, eps=EPS),
        work=count_passes("width", forward=4, backward=4),
        shapes=_RESIDUAL_SHAPES,
        gradients=("residual", "branch", "weight", "bias"),
    )
)
register(
    replace(
        _ADD_NORM,
        name="layer_norm_add",
        summary="LayerNorm of a branch, then the residual add (post-norm)",
        eager=_norm_add_eager,
        ours=partial(evakernels.layer_norm_add, eps=EPS),
        work=count_passes("width", forward=3, backward=3),
    )
)


@peer("layer_norm", package="liger-kernel", devices=("cuda",))
def liger(shape: Shape) -> Function:
    """Liger-Kernel's Triton LayerNorm."""
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, EPS)


@peer("layer_norm", package="quack-kernels", devices=("cuda",))
def quack(shape: Shape) -> Function:
    """quack's CuTe LayerNorm, Hopper and later."""
    from quack.rmsnorm import layernorm

    return lambda x, weight, bias: layernorm(x, weight, bias, EPS)


@peer("layer_norm", package="apex", devices=("cuda",), install=NVIDIA_APEX)
def apex(shape: Shape) -> Function:
    """NVIDIA apex's fused LayerNorm."""
    from apex.normalization.fused_layer_norm import fused_layer_norm_affine

    return lambda x, weight, bias: fused_layer_norm_affine(x, weight, bias, weight.shape, EPS)
