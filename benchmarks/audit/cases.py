"""The audited calls: operations of the benchmarks with GPU kernels, and variants with other inputs."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import benchmarks.cases  # noqa: F401  (registers the operations)
import evakernels
from benchmarks.cases.layer_norm import EPS
from benchmarks.cases.optimizers import sizes_of
from benchmarks.operation import Cost, Draw, Inputs, Operation, Work, get_operation
from benchmarks.shapes import Shape, parse_shape
from evaclip.errors import unknown_name

Case = tuple[str, str, str, str]
"""Names of an op, a shape, a dtype, and `forward` or `backward`."""

WIDTHS = ("eva02-b16@224 b1", "eva02-l14@224 b1", "eva01-g14@224 b1", "eva02-bige14@224 b1", "eva-18b@224 b1")
"""768, 1024, 1408, 1792 and 5120 channels, 197 or 257 rows: enough to keep partial sums below a twentieth."""
HIDDEN = ("eva02-b16@224 b1", "eva02-l14@224 b1")
"""2048 and 2730 hidden channels."""
OF_HIDDEN = " of hidden"
DROPPED = ("eva02-b16@224 b8 drop50", "eva01-g14@224 b8 drop50")
OPTIMIZED = ("tiny@32 b1",)
_PAIRS = ("eva02-b16@224 b512",)
STATISTICS = "clip_loss statistics"
NOT_KEPT = "clip_loss, logits not kept"

SHAPES = {
    "layer_norm": WIDTHS,
    "layer_norm of hidden": HIDDEN,
    "add_layer_norm": WIDTHS,
    "add_layer_norm scaled": WIDTHS,
    "add_layer_norm scaled of hidden": HIDDEN,
    "layer_norm_add": WIDTHS,
    "layer_norm_add scaled": WIDTHS,
    "layer_norm_add scaled of hidden": HIDDEN,
    "silu_mul": HIDDEN,
    "swiglu": HIDDEN,
    "token_dropout": DROPPED,
    "token_dropout by channel": DROPPED,
    "gelu": ("eva02-b16:text b1", "eva01-g14@112 b1"),
    "rope_attention": ("eva02-b16@112 b1", "eva02-l14@112 b1 drop50", "eva01-g14@112 b1", "eva02-bige14@112 b1"),
    "causal_attention": ("eva02-b16:text b1",),
    STATISTICS: _PAIRS,
    NOT_KEPT: _PAIRS,
    "siglip_loss": _PAIRS,
}
"""Audited operations with nvcc's kernels, and their default shapes."""
_ROWS = ("eva02-b16@224 b1",)
_TEXT = ("eva02-b16:text b2",)
TRITON_SHAPES = {
    "layer_norm": _ROWS,
    "add_layer_norm": _ROWS,
    "layer_norm_add": _ROWS,
    "silu_mul": _ROWS,
    "swiglu": _ROWS,
    "token_dropout": ("eva02-b16@224 b8 drop50",),
    "rope_attention": ("eva02-l14@224 b1", "eva01-g14@112 b1"),
    "causal_attention": _TEXT,
    "packed_attention": _TEXT,
    "clip_loss": _PAIRS,
    NOT_KEPT: _PAIRS,
    "siglip_loss": _PAIRS,
    "lamb_step": OPTIMIZED,
    "adamw_step": OPTIMIZED,
}
"""The same with Triton kernels: attention of 257 tokens in heads of 64 channels, and of 65 in heads of 88."""
AUDITED = {"cuda": SHAPES, "triton": TRITON_SHAPES}
DTYPES = ("bfloat16", "float32")
NO_FLOAT32 = (STATISTICS, NOT_KEPT, "siglip_loss", "rope_attention", "causal_attention")
"""Operations without float32 kernels in CUDA."""
NO_BACKWARD = ("siglip_loss",)
"""Operations that compute gradients in the forward pass."""
MOST_ELEMENTS = 50_000
"""Largest tensor in an audited step of an optimizer."""


def _scaled(name: str, backward: int) -> Operation:
    """A norm with a residual connection, layer scale and stochastic depth; `backward` in passes over [B, N, C]."""
    plain, function = get_operation(name), getattr(evakernels, name)

    def inputs(shape: Shape, draw: Draw) -> Inputs:
        scales = {"layer_scale": shape.width, "row_scale": shape.batch}
        drawn = {name: draw.normal(size, scale=0.1, mean=1.0) for name, size in scales.items()}
        return plain.inputs(shape, draw) | drawn

    def work(shape: Shape, itemsize: int) -> Work:
        unit = shape.batch * shape.tokens * shape.width * itemsize
        return Work(plain.work(shape, itemsize).forward, Cost(0, backward * unit))

    return replace(
        plain,
        name=f"{name} scaled",
        inputs=inputs,
        ours=partial(function, eps=EPS),
        work=work,
        gradients=(*plain.gradients, "layer_scale"),
    )


def _of_hidden(plain: Operation) -> Operation:
    """Over rows of the hidden channels of an MLP: rows of 2730 channels begin anywhere in a sector."""

    def hidden(shape: Shape) -> Shape:
        return replace(shape, width=shape.hidden)

    return replace(
        plain,
        name=plain.name + OF_HIDDEN,
        inputs=lambda shape, draw: plain.inputs(hidden(shape), draw),
        work=lambda shape, itemsize: plain.work(hidden(shape), itemsize),
    )


def _by_channel() -> Operation:
    """Token dropout of patches with the layout of a convolution's output: channels first."""
    plain = get_operation("token_dropout")

    def inputs(shape: Shape, draw: Draw) -> Inputs:
        drawn = plain.inputs(shape, draw)
        return drawn | {"patches": drawn["patches"].transpose(1, 2).contiguous().transpose(1, 2)}

    return replace(plain, name="token_dropout by channel", inputs=inputs)


def _few_tensors(name: str) -> Operation:
    """Over the smaller tensors of a model: a larger one is more of the same chunks."""
    plain = get_operation(name)

    def inputs(shape: Shape, draw: Draw) -> Inputs:
        drawn = plain.inputs(shape, draw)
        few = [i for i, tensor in enumerate(drawn["grads"]) if tensor.numel() <= MOST_ELEMENTS]
        return {name: [tensors[i] for i in few] for name, tensors in drawn.items()}

    def work(shape: Shape, itemsize: int) -> Work:
        sizes = [size.numel() for size in sizes_of(shape)]
        share = sum(size for size in sizes if size <= MOST_ELEMENTS) / sum(sizes)
        return Work(Cost(0, share * plain.work(shape, itemsize).forward.bytes))

    return replace(plain, inputs=inputs, work=work)


def operation(name: str) -> Operation:
    """The operation of that name. Raises `UserError` with the nearest names if there is none."""
    if name not in SHAPES and name not in TRITON_SHAPES:
        raise unknown_name("audited operation", name, [*SHAPES, *TRITON_SHAPES])
    if name == NOT_KEPT:
        return replace(get_operation("clip_loss"), name=name, ours=partial(evakernels.clip_loss, memory_budget=0))
    if name == STATISTICS:
        return replace(get_operation("clip_loss"), name=name, gradients=())
    if TRITON_SHAPES.get(name) == OPTIMIZED:
        return _few_tensors(name)
    if name.endswith(OF_HIDDEN):
        return _of_hidden(operation(name.removesuffix(OF_HIDDEN)))
    if name == "add_layer_norm scaled":
        return _scaled("add_layer_norm", backward=6)
    if name == "layer_norm_add scaled":
        return _scaled("layer_norm_add", backward=3)
    return _by_channel() if name == "token_dropout by channel" else get_operation(name)


def list_cases(
    names: Sequence[str] = (), shapes: Sequence[str] = (), dtypes: Sequence[str] = (), kernels: str = "cuda"
) -> list[Case]:
    """The cases of these names, shapes and dtypes in a language of kernels, by default all; without missing kernels."""
    cases = []
    for name in names or AUDITED[kernels]:
        has_backward = bool(operation(name).gradients) and name not in NO_BACKWARD
        for shape in [parse_shape(shape).name for shape in shapes] or AUDITED[kernels][name]:
            for dtype in dtypes or (DTYPES if kernels == "cuda" else DTYPES[:1]):
                if kernels == "cuda" and dtype == "float32" and name in NO_FLOAT32:
                    continue
                cases += [(name, shape, dtype, way) for way in ("forward", "backward")[: 1 + has_backward]]
    return cases
