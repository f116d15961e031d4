"""The norms joined with a residual connection where compiled code goes wrong: odd sizes, dtypes, strides, NaN."""

import pytest
import torch
import torch.nn.functional as F
from op_checks import DTYPES, assert_as_accurate_as_torch, assert_threads_change_no_bit, randn, with_gradients
from test_layer_norm import add_then_norm, norm_then_add
from torch import Tensor

import evakernels

FORMS = {"add": add_then_norm, "post": norm_then_add}


def inputs_of(*shape: int) -> tuple[Tensor, ...]:
    """residual, branch, weight, bias, layer_scale."""
    width = shape[-1]
    vectors = (randn(width, seed=seed) for seed in (2, 3, 4))
    return randn(*shape), randn(*shape, seed=1) + 0.5, *vectors


def row_scale_of(batch: int) -> Tensor:
    return torch.tensor([0.0, 1.25, 2.0]).repeat(batch)[:batch]


def pair(form, rms, residual):
    return FORMS[form]("rms" if rms else "layer", row_scale_of(len(residual)))


def ours(form, rms=False):
    return lambda residual, *given: pair(form, rms, residual)[0](residual, *given)


def theirs(form):
    return lambda residual, *given: pair(form, False, residual)[1](residual, *given)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 768), (2, 5, 7), (3, 11, 37), (5, 3, 2, 70), (40, 30, 24), (0, 3, 8), (2, 0, 8)], ids=str
)
@pytest.mark.kernels
def test_odd_shapes_keep_the_error_rule(form, dtype, shape):
    assert_as_accurate_as_torch(ours(form), theirs(form), inputs_of(*shape), dtype)


@pytest.mark.parametrize(("residual", "branch"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_eps_none_is_the_accumulation_dtypes(residual, branch):
    x = torch.full((1, 4), 1e-6, dtype=branch)
    found = evakernels.rms_norm_add(torch.zeros(1, 4, dtype=residual), x)
    torch.testing.assert_close(found.to(branch), F.rms_norm(x, (4,)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.kernels("nvcc", "triton edges")
def test_a_row_of_one_element_is_its_own_mean(form):
    """The norm is the bias and passes no gradient, up to rounding times rstd = 1 / sqrt(eps)."""
    residual, branch, weight, bias, layer_scale = (t.float() for t in inputs_of(3, 1))
    outputs, gradients = with_gradients(ours(form), (residual, branch, weight, bias, layer_scale))
    scale = layer_scale * row_scale_of(3)[:, None]
    torch.testing.assert_close(outputs[0], bias.expand(3, 1) if form == "add" else residual + bias * scale)
    # The cotangent of the sum x is the last that with_gradients draws.
    generator = torch.Generator().manual_seed(0)
    for _ in outputs:
        cotangent = torch.randn(3, 1, generator=generator, dtype=torch.float64).float()
    expected = (cotangent, cotangent * scale if form == "add" else torch.zeros(3, 1))
    torch.testing.assert_close(tuple(gradients[:2]), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize("branch_dtype", DTYPES)
@pytest.mark.parametrize("parameter_dtype", ["that of the norm's input", torch.float32])
@pytest.mark.kernels("nvcc")
def test_every_mix_of_dtypes_matches_reference(form, residual_dtype, branch_dtype, parameter_dtype, rms):
    if isinstance(parameter_dtype, str):
        parameter_dtype = residual_dtype
    residual, branch, weight, bias, layer_scale = inputs_of(2, 3, 21)
    parameters = (t.to(parameter_dtype) for t in (weight, bias, layer_scale))
    inputs = (residual.to(residual_dtype), branch.to(branch_dtype), *parameters)
    if rms:
        inputs = (*inputs[:3], None, inputs[4])
    actual = with_gradients(ours(form, rms), inputs)
    with evakernels.use_backend("reference"):
        expected = with_gradients(ours(form, rms), inputs)
    for a, e in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=2 * torch.finfo(a.dtype).eps, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.kernels("cpu", "nvcc")
def test_what_is_not_finite_stays_in_its_row(form, dtype, value):
    residual, branch, *parameters = (t.to(dtype) for t in inputs_of(2, 3, 19))
    clean = with_gradients(ours(form), (residual, branch, *parameters))
    branch[1, 2, 4] = value
    dirty = with_gradients(ours(form), (residual, branch, *parameters))
    rows = torch.ones(2, 3, dtype=torch.bool)
    rows[1, 2] = False
    for a, b in zip(clean[0] + clean[1][:2], dirty[0] + dirty[1][:2], strict=True):
        assert torch.equal(a[rows], b[rows])
    y, dweight = dirty[0][0], dirty[1][2]
    assert y[1, 2].isnan().any()
    assert dweight.isnan().any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.kernels("nvcc")
def test_dropped_infinite_branch_gives_nan(form):
    residual, branch, *parameters = (t.float() for t in inputs_of(2, 3, 19))
    branch[0, 1, 2] = float("inf")  # row_scale is 0 for sample 0, and 0 * inf is NaN
    outputs, _ = with_gradients(ours(form), (residual, branch, *parameters))
    assert outputs[-1][0, 1].isnan().any()


@pytest.mark.parametrize("form", FORMS)
def test_the_number_of_threads_changes_no_bit(form):
    inputs = [t.bfloat16() for t in inputs_of(30, 40, 67)]
    assert_threads_change_no_bit(ours(form), inputs)


def test_a_float64_factor_is_left_to_the_reference():
    residual, branch, *_ = (t.float() for t in inputs_of(2, 3, 8))
    layer_scale = torch.full((8,), 0.5, dtype=torch.float64)
    report = evakernels.explain("add_layer_norm", residual, branch, layer_scale=layer_scale)
    assert "layer_norm_forward on reference: selected" in report
    _, x = evakernels.add_layer_norm(residual, branch, layer_scale=layer_scale)
    torch.testing.assert_close(x, residual + 0.5 * branch)
