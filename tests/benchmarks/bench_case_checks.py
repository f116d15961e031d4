"""Helpers for tests of the operations: calling a candidate, comparing with float64, and stand-ins of packages."""

import sys
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import benchmarks.cases  # noqa: F401  registers the operations
from benchmarks.accuracy import as_double, gradient_leaves, relative_error, tensors
from benchmarks.accuracy import forward_outputs as outputs
from benchmarks.operation import Draw, Function, Inputs, Operation, peers_of
from benchmarks.shapes import Shape

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}
# Gradients of a whole model have been through many layers, and the temperature's is a difference of large numbers.
TOLERANCES = {"clip_step": {torch.float32: 5e-5, torch.bfloat16: 0.15}}
ATTENTION = ("rope_attention", "causal_attention")


class Traffic(NamedTuple):
    """What the formulas of an operation count.

    Attributes:
        negligible: inputs that they leave out, at most `share` of the bytes.
        read_back: inputs that the backward pass reads in addition to the gradients of the outputs; None for all.
        written: inputs that are written too.
        outputs: whether the outputs count.
    """

    negligible: tuple[str, ...] = ()
    read_back: tuple[str, ...] | None = None
    written: tuple[str, ...] = ()
    outputs: bool = True
    share: float = 0.04


_QKV, _NORM = ("q", "k", "v", "out"), ("norm_weight", "norm_bias")
_STATE = ("exp_avgs", "exp_avg_sqs", "steps")
OPERATIONS = {
    "rope_attention": Traffic(("cos", "sin", "token_index"), _QKV),
    "causal_attention": Traffic((), _QKV),
    "packed_attention": Traffic(("cu_seqlens",), _QKV),
    "gelu": Traffic(("bias",), ("x",)),
    "quick_gelu": Traffic(("bias",), ("x",)),
    "silu_mul": Traffic((), ("gate", "up")),
    "swiglu": Traffic(_NORM, ("gate", "up")),
    "swiglu_mlp": Traffic((*_NORM, "b1", "b2", "b3"), ("x", "w1", "w2", "w3")),
    "token_dropout": Traffic(("token_index",), ()),
    "clip_loss": Traffic(("logit_scale",), outputs=False, share=1e-4),
    "siglip_loss": Traffic(("logit_scale", "logit_bias"), outputs=False, share=1e-4),
    "lamb_step": Traffic(written=_STATE),
    "adamw_step": Traffic(written=_STATE),
    "encode_image": Traffic(),
    "encode_text": Traffic(),
    "clip_step": Traffic(("token_index",), outputs=False, share=1e-4),
}
SMALL = {
    "rope_attention": ("tiny b2", "tiny b2 drop50", "eva01-g14@28 b1"),
    "causal_attention": ("tiny:text b2",),
    "packed_attention": ("tiny:text b5",),
    "token_dropout": ("tiny b2", "tiny b2 drop50"),
    "clip_loss": ("tiny b7", "tiny:text b2"),
    "siglip_loss": ("tiny b7", "tiny:text b2"),
    "encode_image": ("tiny b2", "tiny@40 b1"),
    "encode_text": ("tiny:text b2", "tiny b1"),
    "clip_step": ("tiny b3", "tiny b2 drop50"),
}
CASES = [(op, shape) for op in OPERATIONS for shape in SMALL.get(op, ("tiny b2",))]
# The others have an input in float32 whatever the dtype.
IN_FLOAT64 = list(OPERATIONS)[: list(OPERATIONS).index("clip_loss")]


def draw(op: Operation, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Inputs:
    """A set of inputs on the CPU."""
    return op.inputs(shape, Draw(dtype, torch.device("cpu"), torch.Generator().manual_seed(seed)))


def gradients(op: Operation, function: Function, inputs: Inputs) -> list[Tensor]:
    """Gradients of the inputs that the operation names, for random gradients of the outputs."""
    leaves = gradient_leaves(op, inputs)
    for leaf in leaves:
        leaf.requires_grad_()
    out = tensors(function(**inputs))
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) for o in out]
    return list(torch.autograd.grad(out, leaves, upstream))


def assert_exact(op, function, shape, dtype=torch.float32, training=True, tolerance=None):
    """Outputs and gradients of `function` against float64, of an operation that has gradients."""
    inputs = draw(op, shape, dtype)
    exact = as_double(inputs)
    allowed = tolerance or TOLERANCES.get(op.name, TOLERANCE)[dtype]
    assert relative_error(outputs(function, inputs), outputs(op.eager, exact)) <= allowed
    if training and op.gradients:
        truth = gradients(op, op.eager, exact)
        assert relative_error(gradients(op, function, inputs), truth) <= allowed


def build(op: str, peer: str, shape: Shape) -> Function:
    """The function of a peer, installed or not."""
    (found,) = (candidate for candidate in peers_of(op) if candidate.name == peer)
    return found.build(shape)


def pretend_installed(monkeypatch: pytest.MonkeyPatch, modules: dict[str, dict[str, Any]]) -> None:
    """Makes modules of these names and members importable, and the packages that they lie in."""
    for path, members in modules.items():
        parts = path.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if name not in modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        module = ModuleType(path)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, path, module)


def each_caption_alone(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Causal attention within captions that lie one behind the other, one after the other."""
    parts = []
    for begin, end in zip(cu_seqlens.tolist()[:-1], cu_seqlens.tolist()[1:], strict=True):
        caption = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*caption, is_causal=True).transpose(0, 1))
    return torch.cat(parts)


def moved(function: Function, inputs: Inputs) -> list[Tensor]:
    """The change of each parameter by one step, a hundredth of its value."""
    before = [values.clone() for values in inputs["params"]]
    return [new.double() - old for new, old in zip(outputs(function, inputs), before, strict=True)]
