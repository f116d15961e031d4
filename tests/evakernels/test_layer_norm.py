import itertools
from contextlib import nullcontext
from functools import partial

import op_checks
import pytest
import torch
import torch.nn.functional as F
from case_tests import *  # noqa: F403
from on_device import DEVICE
from op_checks import DTYPES, Recorder, assert_opcheck, cast, randn, with_gradients
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import BaseTorchFunctionMode

import evakernels
from evakernels import autocast

EPS = 1e-6
OPS = torch.ops.evakernels
NORMS = ["layer", "rms"]
HALVES = [torch.bfloat16, torch.float16]


def torch_norm(kind, x, weight, bias):
    if kind == "rms":
        return F.rms_norm(x, x.shape[-1:], weight, EPS)
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


def plain(kind):
    """Our function and torch's, over (x, weight, bias); RMSNorm ignores the bias slot (None)."""

    def ours(x, weight, bias):
        return evakernels.rms_norm(x, weight, EPS) if kind == "rms" else evakernels.layer_norm(x, weight, bias, EPS)

    return ours, lambda x, weight, bias: torch_norm(kind, x, weight, bias)


def scaled(branch, layer_scale, row_scale):
    branch = branch if layer_scale is None else branch * layer_scale
    if row_scale is None:
        return branch
    return branch * row_scale.to(branch.dtype).view(-1, *[1] * (branch.dim() - 1))


def joined(name, row_scale):
    """Our norm of this name that is joined with a residual connection."""

    def ours(residual, branch, weight, bias, layer_scale):
        parameters = (weight,) if "rms" in name else (weight, bias)
        options = {"layer_scale": layer_scale, "row_scale": row_scale, "eps": EPS}
        return getattr(evakernels, name)(residual, branch, *parameters, **options)

    return ours


def add_then_norm(kind, row_scale):
    def theirs(residual, branch, weight, bias, layer_scale):
        x = residual + scaled(branch, layer_scale, row_scale)
        return torch_norm(kind, x, weight, bias), x

    return joined(f"add_{kind}_norm", row_scale), theirs


def norm_then_add(kind, row_scale):
    def theirs(residual, branch, weight, bias, layer_scale):
        return residual + scaled(torch_norm(kind, branch, weight, bias), layer_scale, row_scale)

    return joined(f"{kind}_norm_add", row_scale), theirs


FORMS = {"plain": None, "add": add_then_norm, "post": norm_then_add}
JOINED_FORMS = ["add", "post"]


def inputs_of(form, *shape):
    """A norm's input, weight and bias; of a joined one residual, branch, weight, bias and layer_scale."""
    x, weight, bias, layer_scale = randn(*shape, seed=1) + 0.5, *(randn(shape[-1], seed=seed) for seed in (2, 3, 4))
    return (x, weight, bias) if form == "plain" else (randn(*shape), x, weight, bias, layer_scale)


def row_scale_of(batch):
    return torch.tensor([0.0, 1.25, 2.0]).repeat(batch)[:batch]


def ours(form, kind="layer", place=0):
    """Our function on `inputs_of`. Its row_scale drops every third sample."""
    if form == "plain":
        return plain(kind)[place]
    return lambda residual, *given: FORMS[form](kind, row_scale_of(len(residual)))[place](residual, *given)


def theirs(form, kind="layer"):
    return ours(form, kind, 1)


def parameters(kind, width, affine):
    weight = randn(width, seed=1) if affine else None
    return weight, randn(width, seed=2) if affine and kind == "layer" else None


def cases():
    """Every form, norm and combination of optional arguments: name, pair of functions, inputs at width C."""
    for kind, affine in itertools.product(NORMS, [True, False]):
        yield f"plain-{kind}-{affine}", plain(kind), (randn(2, 3, 7), *parameters(kind, 7, affine))
    for form, kind, ls, rs in itertools.product([add_then_norm, norm_then_add], NORMS, [True, False], [True, False]):
        row_scale = torch.tensor([0.0, 1.25]) if rs else None
        layer_scale = randn(7, seed=5) if ls else None
        inputs = (randn(2, 3, 7), randn(2, 3, 7, seed=4), *parameters(kind, 7, True), layer_scale)
        yield f"{form.__name__}-{kind}-{ls}-{rs}", form(kind, row_scale), inputs


CASES = [pytest.param(pair, inputs, id=name) for name, pair, inputs in cases()]
# Each form with all optional arguments of one norm, and with none of the other.
QUICK = {
    "test_compiles_without_graph_break": [
        *("plain-layer-True", "plain-rms-False", "add_then_norm-layer-True-True", "add_then_norm-rms-False-False"),
        *("norm_then_add-layer-False-False", "norm_then_add-rms-True-True"),
    ]
}
TRANSFORMED = ["plain-layer-True", "plain-rms-True", "add_then_norm-layer-True-True", "add_then_norm-rms-False-False"]
TRANSFORMED += ["norm_then_add-layer-True-True", "norm_then_add-rms-False-False"]


def given_as(x, dtype):
    """In float64, which is the truth, it stays."""
    return x if x.dtype == torch.float64 else x.to(dtype)


def with_out_dtype(form, half, width=None):
    """Our function, torch's and inputs that the dtypes bear. Widths that GPUs read by 4 and by 2 elements, and by 1."""
    width = width or {"to half": 24, "to float32": 10, "add": 24, "add, rms": 7}[form]
    kind, layer_scale = ("rms", None) if form == "add, rms" else ("layer", randn(width, seed=5))
    x_dtype, y_dtype = (half, torch.float32) if form == "to float32" else (torch.float32, half)
    x = randn(2, 3, width).to(half).double()
    inputs = x, *parameters(kind, width, True)
    if "add" not in form:

        def ours(x, weight, bias):
            return evakernels.layer_norm(given_as(x, x_dtype), weight, bias, EPS, out_dtype=y_dtype)

        def theirs(x, weight, bias):
            return given_as(torch_norm(kind, given_as(x, x_dtype).to(x.dtype), weight, bias), y_dtype)

        return ours, theirs, inputs
    row_scale = torch.tensor([0.5, 2.0])

    def ours(x, weight, bias, branch, layer_scale):
        options = {"layer_scale": layer_scale, "row_scale": row_scale, "eps": EPS, "out_dtype": half}
        if kind == "rms":
            return evakernels.add_rms_norm(x, given_as(branch, half), weight, **options)
        return evakernels.add_layer_norm(x, given_as(branch, half), weight, bias, **options)

    def theirs(x, weight, bias, branch, layer_scale):
        branch = given_as(branch, half).to(x.dtype)
        y, x = add_then_norm(kind, row_scale)[1](x, branch, weight, bias, layer_scale)
        return given_as(y, half), x

    return ours, theirs, (*inputs, randn(2, 3, width, seed=4).to(half).double(), layer_scale)


THREADED = [(ours(form), cast(inputs_of(form, 30, 40, 67), torch.bfloat16)) for form in FORMS]
OUT_FORMS = ["to half", "to float32", "add", "add, rms"]


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("form", OUT_FORMS)
@pytest.mark.parametrize("width", [None, 13, 250, 768, 2048])
@pytest.mark.kernels
def test_out_dtype_is_as_accurate_as_torch(width, form, half):
    """As the norm of float32 that is cast, where one is cast. Also of rows of one warp, of several, and odd ones."""
    ours, theirs, inputs = with_out_dtype(form, half, width)
    op_checks.assert_as_accurate_as_torch(ours, theirs, inputs, torch.float32)


@pytest.mark.parametrize("form", ["to half", pytest.param("add", marks=pytest.mark.exhaustive)])
def test_out_dtype_compiles_without_graph_break(form):
    ours, _, inputs = with_out_dtype(form, torch.bfloat16)
    op_checks.assert_compiles(ours, cast(inputs, torch.float32))


def test_out_dtype_opcheck():
    x, branch = randn(2, 3, 8).float().requires_grad_(), randn(2, 3, 8, seed=1).bfloat16().requires_grad_()
    weight = randn(8, seed=2).float().requires_grad_()
    assert_opcheck(OPS.layer_norm_forward.default, (x, weight, weight, EPS, False, torch.bfloat16))
    assert_opcheck(OPS.layer_norm_forward.default, (branch, weight, None, EPS, True, torch.float32))
    joined = (branch, weight, weight, EPS, False, torch.bfloat16, x, weight, None, True)
    assert_opcheck(OPS.layer_norm_forward.default, joined)


def with_dtypes(form, weight, bias):
    """Inputs of bfloat16 with norm parameters of these dtypes."""
    x, branch, scale = (randn(2, 8, seed=s).bfloat16() for s in (0, 1, 4))
    vectors = [randn(8, seed=s).bfloat16().to(dtype) for s, dtype in ((2, weight), (3, bias))]
    return (x, *vectors) if form == "plain" else (x, branch, *vectors, scale[0].to(bias))


@pytest.mark.parametrize("form", FORMS)
def test_norm_parameters_of_two_dtypes(form):
    op_checks.assert_parameter_dtypes(ours(form), partial(with_dtypes, form))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.1, 1.1, -300.3, 5e4])
@pytest.mark.parametrize("width", [7, 768, 2050])
@pytest.mark.kernels
def test_norm_of_equal_elements_is_accurate(width, value, dtype):
    """Torch's is the bias: a mean that is rounded would leave its error, divided by sqrt(eps)."""
    x, vectors = torch.full((2, 3, width), value, dtype=torch.float64), parameters("layer", width, True)
    op_checks.assert_as_accurate_as_torch(*plain("layer"), (x, *vectors), dtype)
    op_checks.assert_as_accurate_as_torch(*add_then_norm("layer", None), (x / 2, x / 2, *vectors, None), dtype)
    op_checks.assert_as_accurate_as_torch(*norm_then_add("layer", None), (randn(2, 3, width), x, *vectors, None), dtype)


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("used", [0, 1])
def test_gradients_of_one_result_are_torchs(used, watched):
    """Of the norm or of the sum alone, also where a mode sends the call to the dispatcher."""
    leaves = [t.float().requires_grad_() for t in with_dtypes("add", torch.bfloat16, torch.float32)]
    cotangent = randn(2, 8, seed=5).float()
    with BaseTorchFunctionMode() if watched else nullcontext():
        ours_used = ours("add")(*leaves)[used]
    theirs_used = theirs("add")(*leaves)[used]
    pair = ours_used, theirs_used
    actual, expected = (torch.autograd.grad(y, leaves, cotangent, allow_unused=True) for y in pair)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("kind", NORMS)
def test_cuda_autocast_makes_no_copy_of_what_is_given(monkeypatch, kind):
    monkeypatch.setattr(autocast, "is_on", lambda device: device == "cuda")
    half, full = torch.bfloat16, torch.float32
    with FakeTensorMode(), torch.device("cuda"), Recorder() as recorder:
        x, weight = torch.ones(2, 3, 8), torch.ones(8)
        narrow = torch.ones(2, 3, 8, dtype=half)
        norm, add = getattr(evakernels, f"{kind}_norm"), getattr(evakernels, f"add_{kind}_norm")
        results = norm(narrow, weight), norm(narrow, weight, out_dtype=half), norm(x, weight, out_dtype=half)
        joined = add(x, narrow, weight, out_dtype=half), add(narrow, narrow, weight, out_dtype=half)
    assert [y.dtype for y in results] == [full, half, half]
    assert [(y.dtype, total.dtype) for y, total in joined] == [(half, full), (half, half)]
    taken = [[x.dtype for x in args if isinstance(x, torch.Tensor)] for _, args in recorder.own_calls()]
    plain, added = [[half, full], [half, full], [full, full]], [[half, full, full], [half, full, half]]
    assert taken == plain + added  # x or branch, weight, residual
    assert not [op for op, _ in recorder.calls if "_to_copy" in op.name()]


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_gives_the_dtypes_of_torch(kind, dtype):
    ours, theirs = plain(kind)
    weight, bias = parameters(kind, 8, True)
    weight, bias = weight.float(), None if bias is None else bias.float()
    for x in (randn(3, 8).float(), randn(3, 8).to(dtype)):
        with torch.autocast(DEVICE.type, dtype=dtype):
            y = ours(x, weight, bias)
        # On a CPU autocast leaves norms alone.
        assert y.dtype == (x.dtype if DEVICE.type == "cpu" else torch.float32)
        expected = theirs(x.float(), weight, bias)
        torch.testing.assert_close(y.float(), expected, atol=4e-2 if x.dtype == dtype else 1e-5, rtol=1e-2)


@pytest.mark.parametrize("kind", NORMS)
def test_cuda_autocast_of_bf16_model_gives_float32(monkeypatch, kind):
    """As torch, which casts the weight too. Autocast stays off without a GPU; fake tensors say that they are on one."""
    monkeypatch.setattr(autocast, "is_on", lambda device: device == "cuda")
    with FakeTensorMode(), torch.device("cuda"):
        x, weight = torch.ones(2, 3, 8).bfloat16(), torch.ones(8).bfloat16()
        bias = weight if kind == "layer" else None
        results = [*add_then_norm(kind, None)[0](x, x, weight, bias, None), plain(kind)[0](x, weight, bias)]
        results.append(norm_then_add(kind, None)[0](x, x, weight, bias, None))
    assert [result.dtype for result in results] == [torch.float32] * 4


def test_runs_on_the_meta_device_under_any_autocast():
    q = torch.empty(2, 5, 3, 8, device="meta")
    with torch.autocast("cpu"):
        assert evakernels.layer_norm(q).shape == evakernels.rope_attention(q, q, q).shape == q.shape


# --- odd sizes, dtypes, NaN -----------------------------------------------------------------------------------------

SHAPES = [(1, 768), (2, 5, 7), (3, 11, 37), (5, 3, 2, 70), (40, 30, 24), (0, 3, 8), (2, 0, 8), (3, 0)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.kernels
def test_odd_shapes_keep_the_error_rule(form, dtype, shape):
    op_checks.assert_as_accurate_as_torch(ours(form), theirs(form), inputs_of(form, *shape), dtype)


@pytest.mark.parametrize(("residual", "branch"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_eps_none_is_the_accumulation_dtypes(residual, branch):
    x = torch.full((1, 4), 1e-6, dtype=branch)
    found = evakernels.rms_norm_add(torch.zeros(1, 4, dtype=residual), x)
    torch.testing.assert_close(found.to(branch), F.rms_norm(x, (4,)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("form", JOINED_FORMS)
@pytest.mark.kernels("nvcc", "triton edges")
def test_a_row_of_one_element_is_its_own_mean(form):
    """The norm is the bias and passes no gradient, up to rounding times rstd = 1 / sqrt(eps)."""
    residual, branch, weight, bias, layer_scale = (t.float() for t in inputs_of(form, 3, 1))
    outputs, gradients = with_gradients(ours(form), (residual, branch, weight, bias, layer_scale))
    scale = layer_scale * row_scale_of(3)[:, None]
    torch.testing.assert_close(outputs[0], bias.expand(3, 1) if form == "add" else residual + bias * scale)
    # The cotangent of the sum x is the last that with_gradients draws.
    generator = torch.Generator().manual_seed(0)
    for _ in outputs:
        cotangent = torch.randn(3, 1, generator=generator, dtype=torch.float64).float()
    expected = (cotangent, cotangent * scale if form == "add" else torch.zeros(3, 1))
    torch.testing.assert_close(tuple(gradients[:2]), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("form", JOINED_FORMS)
@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize("branch_dtype", DTYPES)
@pytest.mark.parametrize("parameter_dtype", ["that of the norm's input", torch.float32])
@pytest.mark.kernels("nvcc")
def test_every_mix_of_dtypes_matches_reference(form, residual_dtype, branch_dtype, parameter_dtype, kind):
    if isinstance(parameter_dtype, str):
        parameter_dtype = residual_dtype
    residual, branch, weight, bias, layer_scale = inputs_of(form, 2, 3, 21)
    parameters = (t.to(parameter_dtype) for t in (weight, bias, layer_scale))
    inputs = (residual.to(residual_dtype), branch.to(branch_dtype), *parameters)
    if kind == "rms":
        inputs = (*inputs[:3], None, inputs[4])
    actual = with_gradients(ours(form, kind), inputs)
    with evakernels.use_backend("reference"):
        expected = with_gradients(ours(form, kind), inputs)
    for a, e in zip(actual[0] + actual[1], expected[0] + expected[1], strict=True):
        assert a.dtype == e.dtype
        torch.testing.assert_close(a, e, rtol=2 * torch.finfo(a.dtype).eps, atol=2e-5)


@pytest.mark.parametrize("form", JOINED_FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.kernels("cpu", "nvcc")
def test_what_is_not_finite_stays_in_its_row(form, dtype, value):
    residual, branch, *parameters = (t.to(dtype) for t in inputs_of(form, 2, 3, 19))
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


@pytest.mark.parametrize("form", JOINED_FORMS)
@pytest.mark.kernels("nvcc")
def test_dropped_infinite_branch_gives_nan(form):
    residual, branch, *parameters = (t.float() for t in inputs_of(form, 2, 3, 19))
    branch[0, 1, 2] = float("inf")  # row_scale is 0 for sample 0, and 0 * inf is NaN
    outputs, _ = with_gradients(ours(form), (residual, branch, *parameters))
    assert outputs[-1][0, 1].isnan().any()


def test_a_float64_factor_is_left_to_the_reference():
    residual, branch, *_ = (t.float() for t in inputs_of("add", 2, 3, 8))
    layer_scale = torch.full((8,), 0.5, dtype=torch.float64)
    report = evakernels.explain("add_layer_norm", residual, branch, layer_scale=layer_scale)
    assert "layer_norm_forward on reference: selected" in report
    _, x = evakernels.add_layer_norm(residual, branch, layer_scale=layer_scale)
    torch.testing.assert_close(x, residual + 0.5 * branch)


# --- wrong input, for test_wrong_input ------------------------------------------------------------------------------

X, VECTOR = torch.ones(2, 3, 4), torch.ones(4)
PLAIN = {"x": X, "weight": VECTOR}
JOINED = {"residual": X, "branch": X, "weight": VECTOR, "layer_scale": VECTOR, "row_scale": torch.ones(2)}
WITH_BIAS = {"bias": VECTOR}
CALLS = {"layer_norm": PLAIN | WITH_BIAS, "rms_norm": PLAIN, "add_layer_norm": JOINED | WITH_BIAS}
CALLS |= {"add_rms_norm": JOINED, "layer_norm_add": JOINED | WITH_BIAS, "rms_norm_add": JOINED}
WRONG = {
    "layer_norm": [
        (ValueError, "bias", {"weight": None}),
        (TypeError, "out_dtype", {"out_dtype": torch.int8}),
        (TypeError, "eps", {"eps": None}),  # an RMS norm finds one itself
    ],
    "rms_norm": [
        (TypeError, "weight", {"weight": VECTOR.half()}),
        (TypeError, "weight", {"weight": VECTOR.half(), "out_dtype": torch.bfloat16}),
    ],
    "add_layer_norm": [(TypeError, "eps", {"eps": None})],
    "add_rms_norm": [(TypeError, "out_dtype", {"out_dtype": "bfloat16"})],
    "layer_norm_add": [(TypeError, "eps", {"eps": None})],
}
