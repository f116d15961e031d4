"""Rows in 8 bits: the compiled kernels against the reference, and the reference against its definition."""

import pytest
import torch
from op_checks import DTYPES, assert_opcheck, randn, thread_results

from evakernels import backends
from evakernels.ops.row_quantization import dequantize_rows, quantize_rows

BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpu"])
WIDTHS = pytest.mark.parametrize("width", [1, 7, 64, 131])


@BACKENDS
@WIDTHS
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.kernels("cpu")
def test_codes_are_as_accurate_as_8_bits(backend, width, dtype):
    if backend == "cpu" and dtype == torch.float64:
        pytest.skip("the reference alone has float64")
    x = (randn(2, 3, width) * torch.tensor([1e-6, 1.0, 1e4]).unsqueeze(1)).to(dtype)
    with backends.use_backend(backend):
        codes, scale = quantize_rows(x)
    assert (codes.dtype, codes.shape, scale.dtype, scale.shape) == (torch.uint8, x.shape, torch.float32, x.shape[:-1])
    torch.testing.assert_close(scale.double(), x.double().abs().amax(-1) / 127, rtol=1e-6, atol=0)
    error = ((codes.double() - 128) * scale.double().unsqueeze(-1) - x.double()).abs()
    assert (error <= 0.5001 * scale.double().unsqueeze(-1)).all()
    assert codes.min() >= 1


@BACKENDS
@pytest.mark.kernels("cpu")
def test_formula_of_rows_without_a_scale(backend):
    x = torch.tensor([[0.0, -0.0, 0.0], [1e-38, 0.0, -1e-38], [1.0, torch.nan, 0.0], [torch.inf, 1.0, 0.0]])
    with backends.use_backend(backend):
        codes, scale = quantize_rows(x)
        out = dequantize_rows(codes.float() - 128, scale, None)
    assert (codes == 128).all()
    for found in (scale, out):
        assert found[:2].eq(0).all()
        assert found[2:].isnan().all()


@WIDTHS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.kernels("cpu")
def test_odd_shapes_give_the_reference(width, dtype):
    x, scale, bias = randn(5, 11, width).to(dtype), randn(5, 11, seed=1).abs().float(), randn(width, seed=2).to(dtype)
    found = {}
    for backend in ("reference", "cpu"):
        with backends.use_backend(backend):
            found[backend] = *quantize_rows(x), dequantize_rows(x, scale, bias), dequantize_rows(x, scale, None)
    for ours, expected in zip(found["cpu"], found["reference"], strict=True):
        if ours.dtype == torch.uint8:  # half of a unit may go either way
            assert (ours.int() - expected.int()).abs().max() <= 1
        else:
            torch.testing.assert_close(ours, expected)


def test_ops():
    x, scale, bias = randn(3, 9).float(), randn(3, seed=1).float(), randn(9, seed=2).float()
    assert_opcheck(torch.ops.evakernels.quantize_rows, (x,))
    assert_opcheck(torch.ops.evakernels.dequantize_rows, (x, scale, bias))


def test_threads_change_no_bit():
    x = randn(300, 512).float()
    results = thread_results(lambda: (*quantize_rows(x), dequantize_rows(x, quantize_rows(x)[1], None)))
    assert all(map(torch.equal, *results))


def test_wrong_sizes_are_refused():
    kinds = (ValueError, RuntimeError)  # the latter from torch 2.15 on
    with pytest.raises(kinds, match="scale must be float32, one for each row"):
        torch.ops.evakernels_native.dequantize_rows(torch.ones(3, 4), torch.ones(2), None)
    with pytest.raises(kinds, match="bias must have"):
        torch.ops.evakernels_native.dequantize_rows(torch.ones(3, 4), torch.ones(3), torch.ones(5))
