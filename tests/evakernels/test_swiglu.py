import op_checks
import pytest
import torch
import torch.nn.functional as F
from case_tests import *  # noqa: F403
from on_device import DEVICE
from op_checks import DTYPES, OPCHECK_DTYPES, assert_opcheck, randn, with_gradients

import evakernels
from evakernels import _native

EPS = 1e-6
OPS = torch.ops.evakernels
HIDDEN = 7


def ours(gate, up, weight, bias):
    return evakernels.swiglu(gate, up, weight, bias, EPS)


def theirs(gate, up, weight, bias):
    hidden = F.silu(gate) * up
    return hidden if weight is None else F.layer_norm(hidden, hidden.shape[-1:], weight, bias, EPS)


def inputs(norm, rows=(2, 3), width=HIDDEN):
    """gate, up, and the norm's weight and bias as the variant has them."""
    weight = None if norm == "plain" else randn(width, seed=2)
    bias = randn(width, seed=3) if norm == "norm" else None
    return randn(*rows, width), randn(*rows, width, seed=1), weight, bias


NORMS = ("plain", "norm", "norm-without-bias")
CASES = [pytest.param((ours, theirs), inputs(norm), id=norm) for norm in NORMS]


@pytest.mark.parametrize("norm", NORMS)
def test_the_number_of_threads_changes_no_bit(norm):
    many_rows = [None if t is None else t.float() for t in inputs(norm, rows=(300,), width=257)]
    op_checks.assert_threads_change_no_bit(ours, many_rows)


@pytest.mark.parametrize("dtype", OPCHECK_DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_opcheck(norm, dtype):
    gate, up, weight, bias = (None if t is None else t.to(dtype).requires_grad_() for t in inputs(norm))
    assert_opcheck(OPS.swiglu_forward.default, (gate, up, weight, bias, EPS))
    gate, up, weight = (None if t is None else t.detach() for t in (gate, up, weight))
    out, mean, rstd = OPS.swiglu_forward(gate, up, weight, bias, EPS)
    wanted = [weight is not None, bias is not None]
    assert_opcheck(OPS.swiglu_backward.default, (torch.ones_like(out), gate, up, weight, mean, rstd, wanted))


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


# Those of models, and those where kernels change the way they lay a row over threads; no kernel keeps the last three in
# registers.
WIDTHS = (2, 250, 512, 2048, 2730, 4100, 8199, 8200, 16_390)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS[:2])
def test_every_width_keeps_the_error_rule(norm, dtype, width):
    op_checks.assert_as_accurate_as_torch(ours, theirs, inputs(norm, (7,), width), dtype)


@pytest.mark.skipif(
    not _native.LOADED, reason="torch's norm, which is the reference, leaves rounding times 1 / sqrt(eps)"
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS[:2])
def test_a_row_of_one_element_is_as_exact_as_torch(norm, dtype):
    """Product and mean cancel, and with them every gradient behind the norm."""
    op_checks.assert_as_accurate_as_torch(ours, theirs, inputs(norm, (7,), 1), dtype)


@pytest.mark.parametrize("width", [6, 8, 36, 2048, 2730])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS[:2])
def test_strided_rows_and_odd_addresses_change_no_value(norm, dtype, width):
    """Halves of a packed projection, parts of wider rows, rows that begin anywhere, and one row for all."""
    gate, up, weight, bias = (None if t is None else t.to(dtype) for t in inputs(norm, (5,), width))
    packed = torch.cat((gate, up), -1)
    wider = torch.cat((gate, up, gate[:, :3]), -1)
    views = [packed.chunk(2, -1), (wider[:, :width], wider[:, width : 2 * width])]
    for start in (1, 2, 6):
        shifted = torch.cat((gate.new_zeros(start), gate.flatten(), up.flatten()))
        views.append(tuple(t.view(5, width) for t in shifted[start:].split(5 * width)))
    shifted = torch.cat((gate.new_zeros(6), packed.flatten()))
    views.append(shifted[6:].view(5, 2 * width).chunk(2, -1))
    expected = results(gate, up, weight, bias)
    for view in views:
        for actual, right in zip(results(*view, weight, bias), expected, strict=True):
            torch.testing.assert_close(actual, right, rtol=2 * torch.finfo(dtype).eps, atol=2e-5)
    same = results(gate[:1].expand(5, -1), up, weight, bias)
    for actual, right in zip(same, results(gate[:1].repeat(5, 1), up, weight, bias), strict=True):
        torch.testing.assert_close(actual, right, rtol=2 * torch.finfo(dtype).eps, atol=2e-5)


def results(gate, up, weight, bias):
    """The output and all gradients, of inputs that are taken as they lie in memory."""
    leaves = [t.detach().requires_grad_() for t in (gate, up, weight, bias) if t is not None]
    out = ours(*leaves, *[None] * (4 - len(leaves)))
    dout = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype)
    return out, *torch.autograd.grad(out, leaves, dout)


@pytest.mark.parametrize("rows", [(0,), (2, 0)])
@pytest.mark.parametrize("norm", NORMS)
def test_no_rows_give_zero_parameter_gradients(norm, rows):
    out, (_, _, *of_parameters) = with_gradients(ours, [None if t is None else t.float() for t in inputs(norm, rows)])
    assert out[0].shape == (*rows, HIDDEN)
    assert all(torch.equal(g, torch.zeros(HIDDEN)) for g in of_parameters)


@pytest.mark.parametrize("norm", NORMS[:2])
def test_no_columns(norm):
    outputs, gradients = with_gradients(ours, [None if t is None else t.float() for t in inputs(norm, (3,), 0)])
    assert all(t.numel() == 0 for t in outputs + gradients)


def test_a_row_of_one_element_passes_no_gradient_through_its_norm():
    gate, up, weight, bias = (t.float() for t in inputs("norm", (50,), 1))
    _, (dgate, dup, *_) = with_gradients(ours, (gate, up, weight, bias))
    assert dgate.abs().max() < 1e-3
    assert dup.abs().max() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_gates_stay_finite(dtype):
    gate = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4, 1.0]]).to(dtype)
    (out,), (dgate, dup) = with_gradients(evakernels.swiglu, (gate, torch.ones_like(gate)))
    torch.testing.assert_close(out, F.silu(gate))
    assert dgate.isfinite().all()
    assert dup.isfinite().all()


def test_results_are_contiguous_for_transposed_inputs():
    gate, up = (randn(3, 2, HIDDEN, seed=s).transpose(0, 1).requires_grad_() for s in (0, 1))
    out = evakernels.swiglu(gate, up)
    gradients = torch.autograd.grad(out.sum(), (gate, up))
    assert all(t.is_contiguous() for t in (out, *gradients))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_that_the_next_linear_takes(dtype):
    x, (_, _, weight, bias) = randn(3, HIDDEN).float(), inputs("norm")
    layer = torch.nn.Linear(HIDDEN, HIDDEN).to(DEVICE)
    with torch.autocast(DEVICE.type, dtype=dtype):
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
