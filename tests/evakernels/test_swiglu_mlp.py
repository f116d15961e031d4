from functools import partial

import op_checks
import pytest
import torch
import torch.nn.functional as F
from case_tests import *  # noqa: F403
from op_checks import DTYPES, randn, with_gradients
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import evakernels
from evakernels import nn

del test_threads_change_no_bit  # noqa: F821 - torch's matmuls may sum in another order

EPS = 1e-6
WIDTH, HIDDEN, OUT = 6, 10, 5


def ours(*given):
    return evakernels.swiglu_mlp(*given, EPS)


def padded(*given):
    """The same; `pad_cases` pads the hidden width."""
    return ours(*given)


def theirs(x, w1, w2, w3, b1, b2, b3, weight, bias):
    hidden = F.silu(F.linear(x, w1, b1)) * F.linear(x, w2, b2)
    hidden = hidden if weight is None else F.layer_norm(hidden, weight.shape, weight, bias, EPS)
    return F.linear(hidden, w3, b3)


def inputs(variant, rows=(2, 3), width=WIDTH, hidden=HIDDEN, out=OUT):
    """Input, the three weights, their biases, and the norm's weight and bias, as the variant has them."""
    given = [randn(*rows, width)]
    given += [
        randn(*shape, seed=i) / shape[1] ** 0.5 for i, shape in enumerate([(hidden, width)] * 2 + [(out, hidden)], 1)
    ]
    has_biases = variant != "no-biases"
    given += [randn(size, seed=i) if has_biases else None for i, size in enumerate((hidden, hidden, out), 4)]
    has_norm = variant in ("norm", "norm-without-bias")
    return [*given, randn(hidden, seed=7) if has_norm else None, randn(hidden, seed=8) if variant == "norm" else None]


VARIANTS = ("plain", "no-biases", "norm", "norm-without-bias")
CASES = [pytest.param((ours, theirs), inputs(variant), id=variant) for variant in VARIANTS]
CASES += [pytest.param((ours, theirs), inputs("norm", (2, 0)), id="no-rows")]
CASES += [pytest.param((padded, theirs), inputs(variant), id=f"{variant}-padded") for variant in VARIANTS]
TRANSFORMED = (*VARIANTS, "norm-padded")
QUICK = {"test_opcheck": ("norm", "no-biases", "norm-padded")}
QUICK["test_compiles_without_graph_break"] = ("norm", "norm-padded")


@pytest.fixture(autouse=True)
def pad_cases(request, monkeypatch):
    if "pair" in request.fixturenames and request.getfixturevalue("pair")[0] is padded:
        monkeypatch.setenv("EVAKERNELS_PAD_HIDDEN", "1")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("setting", ["0", "1"])
@pytest.mark.parametrize("variant", ["no-biases", "norm"])
def test_real_width_as_accurate_as_torch(variant, setting, dtype, monkeypatch):
    monkeypatch.setenv("EVAKERNELS_PAD_HIDDEN", setting)
    op_checks.assert_as_accurate_as_torch(ours, theirs, inputs(variant, (4,), 16, 2730, 16), dtype)


# --- padding --------------------------------------------------------------------------------------------------------


@pytest.fixture
def _padded(monkeypatch):
    monkeypatch.setenv("EVAKERNELS_PAD_HIDDEN", "1")


@pytest.mark.usefixtures("_padded")
@pytest.mark.parametrize("variant", VARIANTS)
def test_padding_is_exact_zeros(variant):
    """The gated product runs on 64 channels; the 54 of padding, and their gradients, are zero."""
    with op_checks.Recorder() as recorder:
        _, gradients = with_gradients(ours, [None if t is None else t.float() for t in inputs(variant)])
    calls = {op.name(): args for op, args in recorder.own_calls()}
    gate, up = calls["evakernels::swiglu_mlp_backward"][7:9]
    assert gate.shape[-1] == 128
    assert up.numel() == 0
    for half in gate.chunk(2, -1):
        assert half.shape[-1] == 64
        assert half[..., HIDDEN:].eq(0).all()
    assert [g.shape for g in gradients] == [t.shape for t in inputs(variant) if t is not None]


def test_padding_setting_is_checked(monkeypatch):
    monkeypatch.setenv("EVAKERNELS_PAD_HIDDEN", "yes")
    with pytest.raises(ValueError, match="EVAKERNELS_PAD_HIDDEN"):
        ours(*inputs("norm"))


# --- memory ---------------------------------------------------------------------------------------------------------


def saved_bytes(function, *given):
    """Bytes that autograd saves besides the arguments' own memory."""
    own = {t.untyped_storage().data_ptr() for t in given if t is not None}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function(*given)
    return sum(t.untyped_storage().nbytes() for place, t in saved.items() if place not in own), out


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("setting", ["0", "1"])
def test_saves_input_gate_and_up(setting, autocast, monkeypatch):
    monkeypatch.setenv("EVAKERNELS_PAD_HIDDEN", setting)
    given = [t.float().requires_grad_() for t in inputs("norm", (32,), 16, 100)]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        saved, out = saved_bytes(ours, *given)
        peer, _ = saved_bytes(theirs, *given)
    channels = 16 * autocast + 2 * (128 if setting == "1" else 100)
    assert saved == 32 * channels * out.itemsize
    assert peer > saved + 32 * 100 * out.itemsize


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_matches_torch(dtype):
    *parameters, _, _ = (t.float() for t in inputs("norm")[1:])
    op_checks.assert_autocast_is_torchs(
        lambda x: ours(x, *parameters, None, None),
        lambda x: theirs(x, *parameters, None, None),
        randn(3, WIDTH).float(),
        dtype,
    )


def save_matmuls(context, op, *args, **options):
    keep = op is torch.ops.aten.addmm.default
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.usefixtures("_padded")
@pytest.mark.parametrize(
    ("options", "repeated"),
    [({}, 2), ({"context_fn": partial(create_selective_checkpoint_contexts, save_matmuls)}, 0)],
    ids=["plain", "policy"],
)
def test_checkpoint_repeats_no_last_matmul(options, repeated):
    """A policy that saves matmuls leaves none to recompute."""
    module, x = nn.SwiGLU(8, 24), randn(4, 8).float().requires_grad_()
    with FlopCounterMode(display=False) as counter:
        checkpoint(module, x, use_reentrant=False, **options).sum().backward()
    assert counter.get_total_flops() == (3 * 3 + repeated) * 2 * 4 * 8 * 24


@pytest.mark.usefixtures("_padded")
@pytest.mark.parametrize("part", ["w1", "w3"])
def test_module_with_a_hook_calls_its_layers(part):
    module, x = nn.SwiGLU(8, 24), randn(4, 8).float()
    expected = module(x)
    called = []
    getattr(module, part).register_forward_hook(lambda *args: called.append(part))
    torch.testing.assert_close(module(x), expected)
    assert called == [part]


# --- wrong input, for test_wrong_input ------------------------------------------------------------------------------

MATRIX, VECTOR = torch.ones(4, 3), torch.ones(4)
CALLS = {
    "swiglu_mlp": {
        "x": torch.ones(2, 3), "w1": MATRIX, "w2": MATRIX, "w3": MATRIX.T, "b1": VECTOR, "b2": VECTOR,
        "b3": torch.ones(3), "norm_weight": VECTOR, "norm_bias": VECTOR,
    }
}  # fmt: skip
WRONG = {
    "swiglu_mlp": [
        (ValueError, "x", {"x": torch.ones(2, 5)}),
        (TypeError, "w1", {"w1": MATRIX.half()}),
        (ValueError, "w2", {"w2": MATRIX.T}),
        (ValueError, "w3", {"w3": VECTOR}),
        (ValueError, "b1", {"b1": torch.ones(3)}),
        (ValueError, "b3", {"b3": torch.ones(4)}),
        (ValueError, "norm_bias", {"norm_weight": None}),
        (TypeError, "eps", {"eps": None}),
    ]
}
