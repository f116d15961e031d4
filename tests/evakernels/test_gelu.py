import pytest
import torch
import torch.nn.functional as F
from case_tests import *  # noqa: F403
from on_device import DEVICE
from op_checks import DTYPES, assert_as_accurate_as_torch, cast, randn, with_gradients

import evakernels
from evakernels import _native

WIDTH = 7
APPROXIMATIONS = ["none", "tanh", "sigmoid"]


def pair(approximate):
    """Ours, and the same from PyTorch's own functions."""

    def ours(x, bias):
        return evakernels.gelu(x, bias, approximate)

    def theirs(x, bias):
        total = x if bias is None else x + bias
        if approximate == "sigmoid":
            return total * torch.sigmoid(1.702 * total)
        return F.gelu(total, approximate=approximate)

    return ours, theirs


def inputs(bias, rows=(2, 3), width=WIDTH):
    return 2 * randn(*rows, width), randn(width, seed=1) if bias else None


EVERY = pytest.mark.parametrize("approximate", APPROXIMATIONS)
CASES = [
    pytest.param(pair(approximate), inputs(bias), id=f"{approximate}{'-bias' * bias}")
    for approximate in APPROXIMATIONS
    for bias in (True, False)
]
CASES += [pytest.param(pair("none"), inputs(True, rows), id=f"no rows-{rows}") for rows in ((0,), (2, 0))]
CASES += [pytest.param(pair("none"), inputs(bias, (3,), 0), id=f"no columns{'-bias' * bias}") for bias in (True, False)]
TRANSFORMED = ["none-bias", "tanh", "sigmoid"]
THREADED = [(pair("none")[0], cast(inputs(bias, (300,), 257), torch.float32)) for bias in (True, False)]
QUICK = {"test_compiles_without_graph_break": TRANSFORMED}
BIAS = pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])


# Around the number of columns that a block of the GPU's kernels takes (2,048 and 4,096), and what is odd.
SIZES = [((7,), 64), ((5,), 250), ((3,), 4100), ((2, 3), 2056), ((70,), 36), ((1,), 1), ((), 7)]


@EVERY
@BIAS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.kernels
def test_every_size_keeps_the_error_rule(bias, approximate, dtype):
    for rows, width in SIZES:
        assert_as_accurate_as_torch(*pair(approximate), inputs(bias, rows, width), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("limits", [(-1.0, 1.0), (-6.0, -1.0), (-12.0, -4.0), (0.0, 12.0)], ids=str)
@pytest.mark.kernels
def test_both_tails_are_as_accurate_as_torch(limits, dtype):
    """Where the values are small, so that an error relative to the largest is one relative to all."""
    x = torch.linspace(*limits, 4096, dtype=torch.float64)
    for approximate in APPROXIMATIONS:
        assert_as_accurate_as_torch(*pair(approximate), (x, None), dtype)


@pytest.mark.skipif(not evakernels.info()["native"]["loaded"], reason="of compiled kernels: torch's are less")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_are_rounded_once(dtype):
    """Relative errors of every 16-bit value: an error of a small value would not show next to the largest."""
    least = -6 if DEVICE.type == "cpu" and not _native.runs_gpu_kernels("cpu") else -3.5
    x = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(dtype)
    x = x[(x > least) & (x < 1e4)]
    (out,), (slope,) = with_gradients(lambda x, _: evakernels.gelu(x), (x, None))
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    z = x.double()
    tail = 0.5 * torch.special.erfc(-z / 2**0.5)
    exact = z * tail, cotangent.double() * (tail + z * torch.exp(-z * z / 2) / (2 * torch.pi) ** 0.5)
    tiny = torch.finfo(dtype).smallest_normal
    for actual, expected in zip((out, slope), exact, strict=True):
        half = 2.0 ** torch.floor(torch.log2(expected.abs().clamp(min=tiny))) * torch.finfo(dtype).eps / 2
        off = (actual.double() - expected).abs() / half
        assert (off > 1).float().mean() < 0.02  # what lies in the middle between two numbers
        assert off.quantile(0.999) < 1.1


@pytest.mark.kernels
def test_bias_gradient_of_many_rows_is_accurate():
    """A long chain of additions has several times the error of torch's sum."""
    x, bias = (t.float() for t in inputs(True, (1 << 18,), 8))
    ours, theirs = pair("none")
    _, (_, exact) = with_gradients(theirs, (x.double(), bias.double()))
    _, (_, torchs) = with_gradients(theirs, (x, bias))
    _, (_, found) = with_gradients(ours, (x, bias))
    assert (found - exact).norm() <= 3 * (torchs - exact).norm()


@BIAS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.kernels("nvcc")
def test_strides_and_odd_addresses_are_bit_equal(bias, dtype):
    x, b = cast(inputs(bias, (5,), 40), dtype)
    wider, shifted = torch.cat((x, x[:, :3]), -1), torch.cat((x.new_zeros(1), x.flatten()))
    expected = with_gradients(evakernels.gelu, (x, b))
    for view in (wider[:, :40], shifted[1:].view(5, 40), x.T.contiguous().T):
        actual = with_gradients(evakernels.gelu, (view, b), preserve_strides=True)
        assert actual[0][0].is_contiguous()
        torch.testing.assert_close(actual, expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


@EVERY
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.kernels("nvcc")
def test_large_values_stay_finite(approximate, dtype):
    x = torch.tensor([-3e4, -200.0, -17.0, -0.0, 0.0, 17.0, 200.0, 3e4]).to(dtype)
    (out,), (dx,) = with_gradients(pair(approximate)[0], (x, None))
    torch.testing.assert_close(out, x.clamp(min=0), atol=0 if approximate != "sigmoid" else 1e-11, rtol=0)
    assert dx.isfinite().all()


@EVERY
@pytest.mark.kernels("nvcc")
def test_what_is_not_finite_is_not_lost(approximate):
    x = torch.tensor([torch.nan, torch.inf, 1.0, -1e38, 1e38, -0.0, -torch.inf])
    (out,), (dx,) = with_gradients(pair(approximate)[0], (x, None))
    assert out[0].isnan()
    assert out[6].isnan()
    assert not out[1].isfinite()
    assert dx[0].isnan()
    assert out[2:6].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_dtype_of_the_linear(dtype):
    x, layer = randn(3, WIDTH).float(), torch.nn.Linear(WIDTH, 5).to(DEVICE)
    with torch.autocast(DEVICE.type, dtype=dtype):
        expected = F.gelu(layer(x))
        folded = evakernels.gelu(F.linear(x, layer.weight), layer.bias)
    assert folded.dtype == expected.dtype == dtype
    torch.testing.assert_close(folded, expected, rtol=0.02, atol=0.01)
    folded.float().sum().backward()
    assert layer.bias.grad.dtype == torch.float32


# --- wrong input, for test_wrong_input ------------------------------------------------------------------------------

X, BIAS_OF_X = torch.ones(2, 3, 4), torch.ones(4)
CALLS = {"gelu": {"x": X, "bias": BIAS_OF_X}}
WRONG = {
    "gelu": [
        (ValueError, "x", {"x": torch.ones(())}),
        (TypeError, "bias", {"bias": BIAS_OF_X.half()}),
        (ValueError, "approximate", {"approximate": "erf"}),
    ]
}
