import pytest
import torch
import torch.nn.functional as F
from op_checks import (
    DTYPES,
    assert_as_accurate_as_torch,
    assert_compiles,
    assert_deterministic,
    assert_gradcheck,
    assert_opcheck,
)

import evakernels

EPS = 1e-6
OPS = torch.ops.evakernels
HIDDEN = 7


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ours(gate, up, weight, bias):
    return evakernels.swiglu(gate, up, weight, bias, EPS)


def theirs(gate, up, weight, bias):
    hidden = F.silu(gate) * up
    return hidden if weight is None else F.layer_norm(hidden, hidden.shape[-1:], weight, bias, EPS)


def inputs(norm):
    """gate, up, and the norm's weight and bias as the variant has them."""
    weight = None if norm == "plain" else randn(HIDDEN, seed=2)
    bias = randn(HIDDEN, seed=3) if norm == "norm" else None
    return randn(2, 3, HIDDEN), randn(2, 3, HIDDEN, seed=1), weight, bias


CASES = [pytest.param(inputs(norm), id=norm) for norm in ("plain", "norm", "norm-without-bias")]


@pytest.mark.parametrize("inputs", CASES)
def test_gradcheck(inputs):
    assert_gradcheck(ours, inputs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", CASES)
def test_as_accurate_as_torch(inputs, dtype):
    assert_as_accurate_as_torch(ours, theirs, inputs, dtype)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inputs", CASES)
def test_compiles_without_graph_break(inputs, dynamic):
    assert_compiles(ours, inputs, dynamic)


@pytest.mark.parametrize("inputs", CASES)
def test_two_runs_are_bit_equal(inputs):
    assert_deterministic(ours, [None if t is None else t.bfloat16() for t in inputs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("inputs", CASES)
def test_opcheck(inputs, dtype):
    gate, up, weight, bias = (None if t is None else t.to(dtype).requires_grad_() for t in inputs)
    assert_opcheck(OPS.swiglu_forward.default, (gate, up, weight, bias, EPS))
    gate, up, weight = (None if t is None else t.detach() for t in (gate, up, weight))
    out, mean, rstd = OPS.swiglu_forward(gate, up, weight, bias, EPS)
    has_bias = bias is not None
    assert_opcheck(OPS.swiglu_backward.default, (torch.ones_like(out), gate, up, weight, mean, rstd, has_bias))


def test_halves_of_a_packed_projection_are_served_in_place():
    packed = randn(2, 3, 2 * HIDDEN)
    weight, bias = randn(HIDDEN, seed=2), randn(HIDDEN, seed=3)
    gate, up = (t.requires_grad_() for t in packed.chunk(2, -1))
    out = ours(gate, up, weight, bias)
    torch.testing.assert_close(out, theirs(gate, up, weight, bias))
    gradients = torch.autograd.grad(out.square().sum(), (gate, up))
    expected = torch.autograd.grad(theirs(gate, up, weight, bias).square().sum(), (gate, up))
    torch.testing.assert_close(gradients, expected)
    assert out.is_contiguous()
    assert all(g.is_contiguous() for g in gradients)


def test_results_are_contiguous_for_transposed_inputs():
    gate, up = (randn(3, 2, HIDDEN, seed=s).transpose(0, 1).requires_grad_() for s in (0, 1))
    out = evakernels.swiglu(gate, up)
    gradients = torch.autograd.grad(out.sum(), (gate, up))
    assert all(t.is_contiguous() for t in (out, *gradients))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_that_the_next_linear_takes(dtype):
    x, (_, _, weight, bias) = randn(3, HIDDEN).float(), inputs("norm")
    layer = torch.nn.Linear(HIDDEN, HIDDEN)
    with torch.autocast("cpu", dtype=dtype):
        gate, up = layer(x), layer(x)
        assert ours(gate, up, None, None).dtype == theirs(gate, up, None, None).dtype == dtype
        normed = ours(gate, up, weight.float(), bias.float())
        assert normed.dtype == layer(normed).dtype == dtype
    assert ours(x, x, weight.float(), bias.float()).dtype == torch.float32


def test_float32_norm_parameters_beside_a_16_bit_projection():
    gate, up, weight, bias = inputs("norm")
    leaves = [t.requires_grad_() for t in (gate.bfloat16(), up.bfloat16(), weight.float(), bias.float())]
    out = ours(*leaves)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert [t.grad.dtype for t in leaves] == [torch.bfloat16] * 2 + [torch.float32] * 2


def test_a_second_derivative_is_refused():
    gate = randn(3, 8).requires_grad_()
    (gradient,) = torch.autograd.grad(evakernels.swiglu(gate, gate).sum(), gate, create_graph=True)
    with pytest.raises(RuntimeError, match="swiglu has no second derivative"):
        gradient.sum().backward()


ONES = torch.ones(2, 4)


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ((torch.tensor(1.0), torch.tensor(1.0)), ValueError, r"gate is a scalar; expected \[..., F\]"),
        ((ONES.long(), ONES), TypeError, "gate is torch.int64; accepted: float64"),
        ((ONES, ONES.half()), TypeError, r"up is torch.float16; accepted: torch.float32 \(as gate\)"),
        (
            (ONES, torch.ones(2, 5)),
            ValueError,
            r"up has shape \(2, 5\); expected the shape of gate = \(2, 4\)",
        ),
        ((ONES, ONES, torch.ones(3)), ValueError, r"norm_weight has shape \(3,\); expected \[F\] = \(4,\)"),
        ((ONES, ONES, torch.ones(4), torch.ones(1)), ValueError, r"norm_bias has shape \(1,\)"),
        ((ONES, ONES, torch.ones(4).half()), TypeError, "norm_weight is torch.float16"),
        ((ONES, ONES, None, torch.ones(4)), ValueError, "norm_bias without norm_weight"),
        ((ONES, ONES.to("meta")), ValueError, "up on meta"),
    ],
)
def test_wrong_input_says_what_is_accepted(arguments, exception, message):
    with pytest.raises(exception, match=message):
        evakernels.swiglu(*arguments)
