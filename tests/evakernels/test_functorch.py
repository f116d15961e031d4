"""Forward-mode derivatives and functorch's transforms of every op, in float64, beside the same of torch's functions."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from op_checks import randn
from test_contrastive import differentiable_statistics, sigmoid_losses, smoothed, statistics_of_matrix
from test_token_dropout import pair as of_token_dropout
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

import evakernels

EPS = 1e-3
INDEX = torch.tensor([[3, 0], [1, 2]])
OFFSETS = torch.tensor([0, 3, 3, 5])
ANGLES = torch.linspace(0, 3, 4 * 2, dtype=torch.float64).view(4, 2)
COS, SIN = ANGLES.cos(), ANGLES.sin()
ROWS = torch.tensor([3, -1, 0, 2, 1])  # of packed tokens


def inputs(*shapes: tuple[int, ...], seed: int = 0) -> tuple[Tensor, ...]:
    return tuple(randn(*shape, seed=seed + i) for i, shape in enumerate(shapes))


# --- the same of torch's functions ----------------------------------------------------------------------------------


def layer_norm(x, weight=None, bias=None):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def rms_norm(x, weight=None):
    return F.rms_norm(x, x.shape[-1:], weight, EPS)


def total(residual, branch, layer_scale, row_scale):
    return residual + row_scale[:, None, None] * layer_scale * branch


def add_layer_norm(residual, branch, weight, bias, layer_scale, row_scale):
    x = total(residual, branch, layer_scale, row_scale)
    return layer_norm(x, weight, bias), x


def add_rms_norm(residual, branch, weight):
    return rms_norm(residual + branch, weight), residual + branch


def attention(q, k, v, causal=False):
    """Of heads `[..., N, H, D]`."""
    scores = torch.einsum("...qhd,...khd->...hqk", q, k) * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -math.inf)
    return torch.einsum("...hqk,...khd->...qhd", scores.softmax(-1), v)


def rotated(x):
    """All tokens but the first."""
    cos, sin = COS[:, None], SIN[:, None]
    a, b = x[:, 1:, :, 0::2], x[:, 1:, :, 1::2]
    turned = torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)
    return torch.cat((x[:, :1], turned), 1)


def rotated_by_row(x):
    """Packed tokens `[T, H, D]`, but those of row -1."""
    cos = COS[ROWS].masked_fill(ROWS[:, None] < 0, 1.0)[:, None]
    sin = SIN[ROWS].masked_fill(ROWS[:, None] < 0, 0.0)[:, None]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def packed_attention(q, k, v):
    parts = [(0, 3), (3, 5)]
    return torch.cat([attention(*(x[a:b] for x in (q, k, v)), causal=True) for a, b in parts])


# --- every op that returns something --------------------------------------------------------------------------------

BATCH = (2, 3, 4)
CASES = {
    "layer_norm": (lambda *t: evakernels.layer_norm(*t, EPS), layer_norm, inputs(BATCH, (4,), (4,))),
    "rms_norm": (lambda *t: evakernels.rms_norm(*t, EPS), rms_norm, inputs(BATCH, (4,))),
    "add_layer_norm": (
        lambda r, b, w, c, s, d: evakernels.add_layer_norm(r, b, w, c, layer_scale=s, row_scale=d, eps=EPS),
        add_layer_norm,
        inputs(BATCH, BATCH, (4,), (4,), (4,), (2,)),
    ),
    "add_rms_norm": (lambda *t: evakernels.add_rms_norm(*t, eps=EPS), add_rms_norm, inputs(BATCH, BATCH, (4,))),
    "layer_norm_add": (
        lambda r, b, w, c, s, d: evakernels.layer_norm_add(r, b, w, c, layer_scale=s, row_scale=d, eps=EPS),
        lambda r, b, w, c, s, d: total(r, layer_norm(b, w, c), s, d),
        inputs(BATCH, BATCH, (4,), (4,), (4,), (2,)),
    ),
    "rms_norm_add": (
        lambda *t: evakernels.rms_norm_add(*t, eps=EPS),
        lambda r, b, w: r + rms_norm(b, w),
        inputs(BATCH, BATCH, (4,)),
    ),
    "swiglu": (evakernels.swiglu, lambda gate, up: F.silu(gate) * up, inputs(BATCH, BATCH)),
    "swiglu-norm": (
        lambda *t: evakernels.swiglu(*t, EPS),
        lambda gate, up, weight, bias: layer_norm(F.silu(gate) * up, weight, bias),
        inputs(BATCH, BATCH, (4,), (4,)),
    ),
    "gelu": (evakernels.gelu, lambda x, b: F.gelu(x + b), inputs(BATCH, (4,))),
    "gelu-tanh": (
        lambda x: evakernels.gelu(x, approximate="tanh"),
        lambda x: F.gelu(x, approximate="tanh"),
        inputs(BATCH),
    ),
    "gelu-sigmoid": (
        lambda x: evakernels.gelu(x, approximate="sigmoid"),
        lambda x: x * torch.sigmoid(1.702 * x),
        inputs(BATCH),
    ),
    "rope_attention": (
        lambda q, k, v: evakernels.rope_attention(q, k, v, COS, SIN, num_prefix=1),
        lambda q, k, v: attention(rotated(q), rotated(k), v),
        inputs(*[(2, 5, 2, 4)] * 3),
    ),
    "rope_attention-causal": (
        lambda *t: evakernels.rope_attention(*t, causal=True),
        lambda *t: attention(*t, causal=True),
        inputs(*[(2, 3, 2, 4)] * 3),
    ),
    "rope_attention-shared-heads": (
        lambda *t: evakernels.rope_attention(*t, causal=True, return_lse=True)[0],
        lambda q, k, v: F.pad(
            attention(q[:, 2:], *(x.repeat_interleave(2, 2) for x in (k, v)), causal=True), (0, 0, 0, 0, 2, 0)
        ),
        inputs((2, 5, 4, 4), *[(2, 3, 2, 4)] * 2),
    ),
    "packed_attention-rotated": (
        lambda *t: evakernels.packed_attention(*t, OFFSETS, max_seqlen=3, cos=COS, sin=SIN, positions=ROWS),
        lambda q, k, v: packed_attention(rotated_by_row(q), rotated_by_row(k), v),
        inputs(*[(5, 2, 4)] * 3),
    ),
    "packed_attention": (
        lambda *t: evakernels.packed_attention(*t, OFFSETS, max_seqlen=3),
        packed_attention,
        inputs(*[(5, 2, 4)] * 3),
    ),
    "token_dropout": (*of_token_dropout(INDEX), inputs((2, 4, 3), (1, 3), (5, 3))),
    "contrastive_statistics": (differentiable_statistics, statistics_of_matrix, inputs((3, 4), (5, 4), ())),
    "clip_loss": (*smoothed(0.1), inputs((3, 4), (3, 4), ())),
    "clip_loss-logits-not-kept": (*smoothed(0.0, memory_budget=0), inputs((3, 4), (3, 4), ())),
    "siglip_loss": (evakernels.siglip_loss, sigmoid_losses, inputs((3, 4), (3, 4), (), ())),
}
every_op = pytest.mark.parametrize(("ours", "theirs", "given"), CASES.values(), ids=CASES)


def tangents(given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(randn(*t.shape, seed=50 + i) for i, t in enumerate(given))


def everything(given: tuple[Tensor, ...]) -> tuple[int, ...]:
    return tuple(range(len(given)))


def as_one(function):
    """The same as a scalar, of which `grad` takes the derivative."""

    def scalar(*given):
        outputs = function(*given)
        return sum(o.square().sum() for o in ([outputs] if isinstance(outputs, Tensor) else outputs))

    return scalar


def test_no_public_op_is_left_out():
    """Ops that only write, or only draw, have no derivative, and `gradient_norm` is made of torch's operators."""
    without = {"adamw_update", "as_torch_operators", "gradient_norm", "lamb_apply", "lamb_step", "lamb_update"}
    without.add("sample_token_index")
    assert {name.partition("-")[0] for name in CASES} == set(evakernels.ops.__all__) - without


def dual_numbers(function, given, requires_grad=False):
    with forward_ad.dual_level():
        duals = [
            forward_ad.make_dual(x.clone().requires_grad_(requires_grad), tangent)
            for x, tangent in zip(given, tangents(given), strict=True)
        ]
        outputs = function(*duals)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        return [tuple(forward_ad.unpack_dual(output)) for output in outputs]


def of_one_argument_after_the_other(jacobian):
    """So that those are mapped over and the rest isn't."""
    return lambda function, given: [jacobian(function, i)(*given) for i in everything(given)]


def one_tangent_alone(function, given):
    results = []
    for i, tangent in enumerate(tangents(given)):
        alone = lambda x, i=i: function(*given[:i], x, *given[i + 1 :])  # noqa: E731
        results.append(jvp(alone, (given[i],), (tangent,)))
    return results


def gradients_of_each_sample(function, given):
    several = tuple(torch.stack([x, x.flip(0) if x.dim() else 2 * x]) for x in given)
    return vmap(grad(as_one(function), everything(given)))(*several)


DERIVATIVES = {
    "jvp": lambda function, given: jvp(function, given, tangents(given)),
    "dual numbers": dual_numbers,
    "dual numbers of leaves": partial(dual_numbers, requires_grad=True),
    "one tangent alone": one_tangent_alone,
    "jacfwd": of_one_argument_after_the_other(jacfwd),
    "jacrev": of_one_argument_after_the_other(jacrev),
    "gradients of each sample": gradients_of_each_sample,
    "forward mode of torch.autograd": partial(
        torch.autograd.functional.jacobian, strategy="forward-mode", vectorize=True
    ),
}


@every_op
@pytest.mark.parametrize("derivative", DERIVATIVES.values(), ids=DERIVATIVES)
def test_derivatives(derivative, ours, theirs, given):
    torch.testing.assert_close(derivative(ours, given), derivative(theirs, given))


@every_op
def test_gradients_of_a_batch(ours, theirs, given):
    """`grad` outside, `vmap` inside."""
    several = tuple(torch.stack([x, 2 * x]) for x in given)
    results = [grad(lambda *t, f=f: vmap(as_one(f))(*t).sum(), everything(given))(*several) for f in (ours, theirs)]
    torch.testing.assert_close(*results)


@every_op
def test_second_derivatives(ours, theirs, given):
    results = [hessian(lambda x, f=f: as_one(f)(x, *given[1:]))(given[0]) for f in (ours, theirs)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_by_autograd_are_refused(name):
    ours, _, given = CASES[name]
    leaves = [x.clone().requires_grad_() for x in given]
    first = torch.autograd.grad(as_one(ours)(*leaves), leaves, create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match=r"evakernels: \w+ has no second derivative"):
        sum(gradient.sum() for gradient in first if gradient is not None).backward()


@every_op
def test_second_derivatives_as_torch_operators(ours, theirs, given):
    x = given[0].clone().requires_grad_()
    with evakernels.as_torch_operators():
        (first,) = torch.autograd.grad(as_one(ours)(x, *given[1:]), x, create_graph=True)
    (expected,) = torch.autograd.grad(as_one(theirs)(x, *given[1:]), x, create_graph=True)
    torch.testing.assert_close(first, expected)
    results = [torch.autograd.grad(g.square().sum(), x)[0] for g in (first, expected)]
    torch.testing.assert_close(*results)


@every_op
def test_backward_passes_of_several_cotangents(ours, theirs, given):
    """Of outputs whose forward pass nothing has transformed."""
    results = []
    for function in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x in given]
        output = function(*leaves)
        output = output if isinstance(output, Tensor) else output[0]
        cotangents = randn(3, *output.shape, seed=9)
        found = torch.autograd.grad(output, leaves, cotangents, is_grads_batched=True, allow_unused=True)
        results.append(found[: 5 if len(leaves) == 6 else None])  # row_scale has no gradient
    torch.testing.assert_close(*results)


@pytest.mark.exhaustive
@every_op
def test_jvp_of_compiled_code(ours, theirs, given):
    torch._dynamo.reset()

    def pushed(*t):
        return jvp(ours, t, tangents(given))

    compiled = torch.compile(pushed, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), jvp(theirs, given, tangents(given)))


QUICK = ("add_layer_norm", "rope_attention")
COMPILED = [
    pytest.param(name, marks=[] if name in QUICK else pytest.mark.exhaustive)
    for name in CASES
    if not name.startswith("packed_attention")
]


@pytest.mark.parametrize("name", COMPILED)
def test_dual_numbers_in_compiled_code(name):
    """But of packed attention: its reference asks for lengths, and where a graph breaks torch loses dual numbers."""
    torch._dynamo.reset()
    ours, theirs, given = CASES[name]

    @torch.compile(backend="aot_eager")
    def pushed(primals, directions):
        with forward_ad.dual_level():
            outputs = ours(*(forward_ad.make_dual(*pair) for pair in zip(primals, directions, strict=True)))
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
            return [forward_ad.unpack_dual(output).tangent for output in outputs]

    expected = jvp(theirs, given, tangents(given))[1]
    expected = [expected] if isinstance(expected, Tensor) else list(expected)
    torch.testing.assert_close(pushed(given, tangents(given)), expected)
