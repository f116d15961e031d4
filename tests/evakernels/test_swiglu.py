import itertools

import op_checks
import pytest
import torch
import torch.nn.functional as F
from case_tests import *  # noqa: F403
from on_device import DEVICE
from op_checks import DTYPES, cast, no_triton, randn, with_gradients

import evakernels
from evakernels import _native

EPS = 1e-6
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
CASES += [pytest.param((ours, theirs), inputs(norm, (2, 0)), id=f"{norm}-no rows") for norm in NORMS]
CASES += [pytest.param((ours, theirs), inputs(norm, (3,), 0), id=f"{norm}-no columns") for norm in NORMS[:2]]
THREADED = [(ours, cast(inputs(norm, (300,), 257), torch.float32)) for norm in NORMS]
TRANSFORMED = NORMS
QUICK = {"test_compiles_without_graph_break": NORMS}


# Those of models, and those where kernels change the way they lay a row over threads; no kernel keeps the last three in
# registers.
WIDTHS = (2, 250, 512, 2048, 2730, 4100, 8199, 8200, 16_390)
ROWS = [
    pytest.param(norm, width, marks=no_triton if norm == "norm" and width > 4096 else ())
    for norm, width in itertools.product(NORMS[:2], WIDTHS)
]


@pytest.mark.parametrize(("norm", "width"), ROWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.kernels
def test_every_width_keeps_the_error_rule(norm, dtype, width):
    op_checks.assert_as_accurate_as_torch(ours, theirs, inputs(norm, (7,), width), dtype)


@pytest.mark.skipif(
    not _native.LOADED, reason="torch's norm, which is the reference, leaves rounding times 1 / sqrt(eps)"
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS[:2])
@pytest.mark.kernels("nvcc", "triton edges")
def test_a_row_of_one_element_is_as_exact_as_torch(norm, dtype):
    """Product and mean cancel, and with them every gradient behind the norm."""
    op_checks.assert_as_accurate_as_torch(ours, theirs, inputs(norm, (7,), 1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(("width", "padding", "packed"), [(8, 1, False), (2752, 22, False), (2752, 22, True)])
@pytest.mark.kernels
def test_padded_rows_keep_the_error_rule(width, padding, packed, norm, dtype):
    """Outputs and gradients are those of the other channels, as accurate as torch's, and zero in the padding.

    Packed gate and up have a row stride of twice the padded width.
    """

    padding_of_gradients = []

    def padded(*given):
        gate, up, *vectors = (None if t is None else F.pad(t, (0, padding)) for t in given)
        if packed:
            gate, up = torch.cat((gate, up), -1).chunk(2, -1)
        out = evakernels.swiglu(gate, up, *vectors, EPS, padding)
        assert out[..., -padding:].eq(0).all()
        for tensor in (gate, up, *vectors):
            if tensor is not None:
                tensor.register_hook(lambda g: padding_of_gradients.append(g[..., -padding:]))
        return out[..., :-padding]

    op_checks.assert_as_accurate_as_torch(padded, theirs, inputs(norm, (7,), width - padding), dtype)
    assert padding_of_gradients
    assert all(g.eq(0).all() for g in padding_of_gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [1.1, 30.3])
@pytest.mark.kernels
def test_norm_of_equal_products_is_accurate(value, dtype):
    gate, up, *vectors = inputs("norm", (7,), 2050)
    equal = torch.full_like(gate, value), torch.full_like(up, value)
    op_checks.assert_as_accurate_as_torch(ours, theirs, (*equal, *vectors), dtype)


def test_norm_parameters_of_two_dtypes():
    def with_dtypes(*dtypes):
        gate, up, *vectors = (t.bfloat16() for t in inputs("norm"))
        return gate, up, *(t.to(dtype) for t, dtype in zip(vectors, dtypes, strict=True))

    op_checks.assert_parameter_dtypes(ours, with_dtypes)


@pytest.mark.parametrize("width", [6, 8, 36, 2048, 2730])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("norm", NORMS[:2])
@pytest.mark.kernels("nvcc")
def test_strides_and_odd_addresses_are_bit_equal(norm, dtype, width):
    """Halves of a packed projection, parts of wider rows, rows that begin anywhere, columns, and one row for all.

    Of an even number of short rows a kernel may take two as one, where nothing lies between them.
    """
    gate, up, weight, bias = cast(inputs(norm, (6,), width), dtype)
    packed = torch.cat((gate, up), -1)
    wider = torch.cat((gate, up, gate[:, :3]), -1)
    views = [packed.chunk(2, -1), (wider[:, :width], wider[:, width : 2 * width])]
    for start in (1, 2, 6):
        shifted = torch.cat((gate.new_zeros(start), gate.flatten(), up.flatten()))
        views.append(tuple(t.view(6, width) for t in shifted[start:].split(6 * width)))
    shifted = torch.cat((gate.new_zeros(6), packed.flatten()))
    views.append(shifted[6:].view(6, 2 * width).chunk(2, -1))
    views.append(tuple(t.T.contiguous().T for t in (gate, up)))
    views.append((gate[:1].expand(6, -1), up))
    for view in views:
        outputs, gradients = with_gradients(ours, (*view, weight, bias), preserve_strides=True)
        expected = with_gradients(ours, (*(t.contiguous() for t in view), weight, bias))
        torch.testing.assert_close((outputs, gradients), expected, rtol=2 * torch.finfo(dtype).eps, atol=2e-5)
        assert all(t.is_contiguous() for t in outputs + gradients)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.kernels("nvcc")
def test_large_gates_stay_finite(dtype):
    gate = torch.tensor([[-1e4, -200.0, -90.0, 0.0, 90.0, 200.0, 1e4, 1.0]]).to(dtype)
    (out,), (dgate, dup) = with_gradients(evakernels.swiglu, (gate, torch.ones_like(gate)))
    torch.testing.assert_close(out, F.silu(gate))
    assert dgate.isfinite().all()
    assert dup.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_the_next_linears_dtype(dtype):
    x, (_, _, weight, bias) = randn(3, HIDDEN).float(), inputs("norm")
    layer = torch.nn.Linear(HIDDEN, HIDDEN).to(DEVICE)
    with torch.autocast(DEVICE.type, dtype=dtype):
        gate, up = layer(x), layer(x)
        assert ours(gate, up, None, None).dtype == theirs(gate, up, None, None).dtype == dtype
        normed = ours(gate, up, weight.float(), bias.float())
        assert normed.dtype == layer(normed).dtype == dtype
    assert ours(x, x, weight.float(), bias.float()).dtype == torch.float32


# --- wrong input, for test_wrong_input ------------------------------------------------------------------------------

X, VECTOR = torch.ones(2, 3, 4), torch.ones(4)
CALLS = {"swiglu": {"gate": X, "up": X, "norm_weight": VECTOR, "norm_bias": VECTOR}}
WRONG = {
    "swiglu": [
        (ValueError, "gate", {"gate": torch.ones(()), "up": torch.ones(())}),
        (TypeError, "up", {"up": X.half()}),
        (TypeError, "norm_weight", {"norm_weight": VECTOR.half()}),
        (ValueError, "norm_bias", {"norm_weight": None}),
        (TypeError, "eps", {"eps": None}),
        (ValueError, "padding", {"padding": 4}),
        (ValueError, "padding", {"padding": -1}),
        (TypeError, "padding", {"padding": 0.5}),
    ]
}
