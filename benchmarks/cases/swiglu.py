"""SwiGLU: the gated product alone, with the sub-LayerNorm of EVA-02, and the whole MLP around it."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import evakernels
from benchmarks.operation import Cost, Draw, Function, Inputs, Operation, Work, count_passes, peer, register
from benchmarks.shapes import Shape

EPS = 1e-6

_SHAPES = {
    "cpu": ("eva02-b16@224 b1", "eva02-b16@224 b8", "eva02-l14@224 b4", "eva02-l14@336 b4"),
    "cuda": (
        "eva02-b16@224 b64",
        "eva02-b16@224 b512",
        "eva02-l14@224 b256",
        "eva02-l14@224 b256 drop50",
        "eva02-l14@336 b128",
    ),
}
_PRODUCT_SHAPES = _SHAPES | {"cpu": ("eva02-b16@224 b1", "eva02-b16@224 b8", "eva02-l14@224 b4")}
_MLP_SHAPES = {"cpu": ("eva02-b16@224 b1", "eva02-b16@224 b2", "eva02-l14@224 b1"), "cuda": _SHAPES["cuda"]}


def _product_inputs(shape: Shape, draw: Draw) -> Inputs:
    size = (shape.batch, shape.tokens, shape.hidden)
    return {"gate": draw.normal(*size), "up": draw.normal(*size)}


def _norm_inputs(shape: Shape, draw: Draw) -> Inputs:
    return {
        "norm_weight": draw.normal(shape.hidden, scale=0.1, mean=1.0),
        "norm_bias": draw.normal(shape.hidden, scale=0.1),
    }


def _swiglu_inputs(shape: Shape, draw: Draw) -> Inputs:
    return _product_inputs(shape, draw) | _norm_inputs(shape, draw)


def _mlp_inputs(shape: Shape, draw: Draw) -> Inputs:
    """Weights of a scale that keeps the values near 1."""
    width, hidden = shape.width, shape.hidden
    inputs = {"x": draw.normal(shape.batch, shape.tokens, width)} | _norm_inputs(shape, draw)
    for number, (outputs, columns) in enumerate(((hidden, width), (hidden, width), (width, hidden)), start=1):
        inputs[f"w{number}"] = draw.normal(outputs, columns, scale=columns**-0.5)
        inputs[f"b{number}"] = draw.normal(outputs, scale=0.1)
    return inputs


def _mlp_work(shape: Shape, itemsize: int) -> Work:
    """Three matmuls forward, six backward.

    Bytes of x, the output, the three matrices and their gradients. Values between the matmuls are neither input nor
    output; biases and norm are too small to count.
    """
    tokens = shape.batch * shape.tokens
    product = 2 * tokens * shape.width * shape.hidden
    activations, matrices = tokens * shape.width * itemsize, 3 * shape.width * shape.hidden * itemsize
    forward = Cost(3 * product, 2 * activations + matrices)
    return Work(forward, Cost(6 * product, 3 * activations + 2 * matrices))


# --- operations -----------------------------------------------------------------------------------------------------


def _product_eager(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _swiglu_eager(gate: Tensor, up: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    return F.layer_norm(F.silu(gate) * up, norm_weight.shape, norm_weight, norm_bias, EPS)


def _mlp_with(product: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Function:
    """The MLP with `product(gate, up, norm_weight, norm_bias)` between its matmuls."""

    def mlp(
        x: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        w3: Tensor,
        b3: Tensor,
    ) -> Tensor:
        return F.linear(product(F.linear(x, w1, b1), F.linear(x, w2, b2), norm_weight, norm_bias), w3, b3)

    return mlp


_SILU_MUL = register(
    Operation(
        name="silu_mul",
        summary="silu(gate) * up",
        inputs=_product_inputs,
        eager=_product_eager,
        ours=evakernels.swiglu,
        work=count_passes("hidden", forward=3, backward=5),
        shapes=_PRODUCT_SHAPES,
        raw=lambda rows, hidden: Shape(tokens=rows, hidden=hidden),
        small="4x64",
        gradients=("gate", "up"),
        registered="swiglu_forward",
    )
)
register(
    replace(
        _SILU_MUL,
        name="swiglu",
        summary="silu(gate) * up, then LayerNorm over the hidden channels (sub-LN)",
        inputs=_swiglu_inputs,
        eager=_swiglu_eager,
        ours=partial(evakernels.swiglu, eps=EPS),
        shapes=_SHAPES,
        gradients=("gate", "up", "norm_weight", "norm_bias"),
    )
)
register(
    Operation(
        name="swiglu_mlp",
        summary="the whole MLP of EVA-02: two projections, gated product with sub-LN, and the projection back",
        inputs=_mlp_inputs,
        eager=_mlp_with(_swiglu_eager),
        ours=partial(evakernels.swiglu_mlp, eps=EPS),
        work=_mlp_work,
        shapes=_MLP_SHAPES,
        raw=lambda rows, width, hidden: Shape(tokens=rows, width=width, hidden=hidden),
        small="4x64x64",
        gradients=("x", "norm_weight", "norm_bias", "w1", "b1", "w2", "b2", "w3", "b3"),
    )
)


# --- peers ----------------------------------------------------------------------------------------------------------


@peer("silu_mul", package="liger-kernel", devices=("cuda",))
def liger(shape: Shape) -> Function:
    """Liger-Kernel's Triton product, forward only."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def product(gate: Tensor, up: Tensor) -> Tensor:
        if gate.requires_grad:  # other candidates are called with the same inputs
            raise NotImplementedError("its backward writes the gradients over gate and up; swiglu_mlp measures it")
        out: Tensor = LigerSiLUMulFunction.apply(gate, up)
        return out

    return product


@peer("swiglu_mlp", package="liger-kernel", devices=("cuda",))
def liger_mlp(shape: Shape) -> Function:
    """Liger-Kernel's product between PyTorch's projections, with PyTorch's norm."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def product(gate: Tensor, up: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        return F.layer_norm(LigerSiLUMulFunction.apply(gate, up), norm_weight.shape, norm_weight, norm_bias, EPS)

    return _mlp_with(product)


@peer("swiglu_mlp", package="quack-kernels", devices=("cuda",))
def quack_mlp(shape: Shape) -> Function:
    """quack's matmul with the gating in its epilogue, forward only, Hopper and later.

    It takes the first two matrices as one; their concatenation is a small part of the time.
    """
    from quack.linear import linear_gated_func

    def mlp(x: Tensor, norm_weight: Tensor, norm_bias: Tensor, **given: Tensor) -> Tensor:
        if x.requires_grad:
            raise NotImplementedError("its gated product can't be differentiated where a norm follows")
        weight, bias = (torch.cat([given[f"{kind}{number}"] for number in (1, 2)]) for kind in "wb")
        hidden = linear_gated_func(x, weight, "swiglu", bias=bias, store_preact=False, concat_layout=True)[1]
        return F.linear(F.layer_norm(hidden, norm_weight.shape, norm_weight, norm_bias, EPS), given["w3"], given["b3"])

    return mlp


@peer("swiglu_mlp", package="timm")
def timm_mlp(shape: Shape) -> Function:
    """timm's SwiGLU module, as its EVA-02 has it."""
    from timm.layers import SwiGLU  # type: ignore[attr-defined]

    norm: Any = partial(nn.LayerNorm, eps=EPS)  # timm's annotation asks for a class, its own models pass this
    module = SwiGLU(shape.width, shape.hidden, norm_layer=norm, device="meta")
    names = {"fc1_g": ("w1", "b1"), "fc1_x": ("w2", "b2"), "norm": ("norm_weight", "norm_bias"), "fc2": ("w3", "b3")}

    def mlp(x: Tensor, **parameters: Tensor) -> Tensor:
        state = {}
        for layer, (weight, bias) in names.items():
            state[f"{layer}.weight"], state[f"{layer}.bias"] = parameters[weight], parameters[bias]
        out: Tensor = torch.func.functional_call(module, state, (x,))
        return out

    return mlp
