"""The norms at the widths of models, and at those where kernels change the way they lay a row over threads."""

import pytest
import torch
from op_checks import DTYPES, assert_as_accurate_as_torch, with_gradients
from test_layer_norm import FORMS, JOINED_FORMS, inputs_of, ours, plain, theirs
from torch import Tensor

pytestmark = pytest.mark.kernels("cpu", "nvcc")
WIDTHS = [1, 2, 250, 512, 768, 1024, 1280, 1792, 4096]
WIDTHS += [pytest.param(n, marks=pytest.mark.kernels("cpu", "nvcc", "triton edges")) for n in (1408, 2730, 5120)]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_plain_norm_keeps_the_error_rule(kind, dtype, width):
    x, weight, bias = inputs_of("plain", 29, width)
    assert_as_accurate_as_torch(*plain(kind), (x, weight, None if kind == "rms" else bias), dtype)


@pytest.mark.parametrize("width", WIDTHS[2:])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", JOINED_FORMS)
def test_joined_norm_keeps_the_error_rule(form, dtype, width):
    assert_as_accurate_as_torch(ours(form), theirs(form), inputs_of(form, 13, width), dtype)


@pytest.mark.parametrize("shape", [(4, 8199), (4, 16_390), (4, 25_600), (2000, 24)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_wide_or_many_rows_keep_the_error_rule(form, dtype, shape):
    """No kernel keeps a wide row in registers."""
    assert_as_accurate_as_torch(ours(form), theirs(form), inputs_of(form, *shape), dtype)


@pytest.mark.parametrize("width", [250, 264])
@pytest.mark.parametrize("offset", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_rows_at_odd_addresses_give_the_formula(form, dtype, offset, width):
    def at_offset(tensor: Tensor) -> Tensor:
        return torch.cat([tensor.new_zeros(offset), tensor.flatten()])[offset:].view(tensor.shape)

    aligned = [t.to(dtype) for t in inputs_of(form, 7, width)]
    actual = with_gradients(ours(form), [at_offset(t) for t in aligned], preserve_strides=True)
    torch.testing.assert_close(actual, with_gradients(ours(form), aligned), rtol=2 * torch.finfo(dtype).eps, atol=2e-5)
