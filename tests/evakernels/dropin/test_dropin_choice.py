"""The options of `accelerate`, and its report."""

import copy
import pickle

import pytest
import torch
from dropin_families import FAMILIES, log_ops
from timm.layers import Attention
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import evakernels
from evakernels.backends import observed_by

pytestmark = pytest.mark.by_processor
native = pytest.mark.skipif(not evakernels.info()["native"]["loaded"], reason="the native library is not built")


def _replaced(model):
    """Names of the modules that have another class than they were built with."""
    untouched = copy.deepcopy(model)
    evakernels.restore(untouched)
    pairs = zip(model.named_modules(), untouched.modules(), strict=True)
    return {name for (name, module), other in pairs if type(module) is not type(other)}


# --- include, exclude ------------------------------------------------------------------------------------------------

_MLP = {"mlp", "mlp.norm", "mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"}
_LINEARS = {"attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.proj", *_MLP} - {"mlp", "mlp.norm"}
_BLOCK = {"", "norm1", "norm2", "attn", *_LINEARS, *_MLP}


def _block(number, parts):
    return {f"blocks.{number}.{part}".rstrip(".") for part in parts}


@pytest.mark.parametrize(
    ("options", "replaced"),
    [
        (
            {"include": ["EvaAttention", "blocks.1.mlp"]},
            {"blocks.0.attn"} | _block(1, {"attn", "mlp", "mlp.norm"} | {n for n in _LINEARS if "mlp" in n}),
        ),
        ({"include": "blocks.*", "exclude": ("blocks.0*", "Linear")}, _block(1, _BLOCK - _LINEARS)),
        ({"include": "blocks", "exclude": "EvaAttention"}, _block(0, _BLOCK - {"attn"}) | _block(1, _BLOCK - {"attn"})),
    ],
)
def test_include_and_exclude_choose_modules(options, replaced):
    model = FAMILIES["eva02"].build()
    report = evakernels.accelerate(model, force=True, **options)
    assert _replaced(model) == {done.name for done in report.replaced} == replaced
    assert {left.reason for left in report.left} <= {"not included", "excluded"}


def test_later_exclude_restores_modules():
    model = FAMILIES["eva02"].build()
    evakernels.accelerate(model, force=True)
    everything = _replaced(model)
    evakernels.accelerate(model, exclude="EvaAttention", force=True)
    assert everything - _replaced(model) == {"blocks.0.attn", "blocks.1.attn"}
    evakernels.accelerate(model, include="EvaAttention", force=True)
    assert _replaced(model) == everything


@pytest.mark.parametrize(
    ("options", "error", "near"),
    [
        ({"include": ["EvaBlock", "EvaAttentoin"]}, ValueError, "include.*EvaAttention"),
        ({"exclude": "blocks.*.atn"}, ValueError, r"exclude.*blocks\.\*\.attn"),
        ({"include": "patch_embed"}, ValueError, "include.*supported"),
        ({"exclude": 3}, TypeError, "exclude"),
    ],
)
def test_pattern_without_a_module_raises(options, error, near):
    model = FAMILIES["eva02"].build()
    with pytest.raises(error, match=near):
        evakernels.accelerate(model, **options)
    assert _replaced(model) == set()


# --- force -----------------------------------------------------------------------------------------------------------


@native
def test_small_call_runs_own_code_unless_forced():
    model, x = nn.Sequential(nn.LayerNorm(8), nn.GELU()).eval(), torch.zeros(1, 8)
    evakernels.accelerate(model)
    with log_ops() as ops:
        model(x)
    assert ops == set()
    report = evakernels.accelerate(model, force=True)
    assert [done.op for done in report.replaced] == ["layer_norm", "gelu"]
    with log_ops() as ops:
        model(x)
    assert ops == {"layer_norm", "gelu"}


@native
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
def test_forced_linear_runs_on_onednn():
    model, x = nn.Linear(8, 4), torch.randn(3, 8)
    expected = model(x)
    evakernels.accelerate(model, force=True)
    ran = []
    with observed_by(lambda op, backend: ran.append((op, backend))):
        torch.testing.assert_close(model(x), expected)
    assert ran == [("linear", "oneDNN")]


@pytest.mark.parametrize(("features", "rows"), [((7, 0), 3), ((0, 7), 3), ((7, 4), 0)])
def test_empty_linear_has_gradients(features, rows):
    layer = nn.Linear(*features)
    evakernels.accelerate(layer, force=True)
    x = torch.randn(rows, features[0], requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == x.shape
    assert [p.grad.shape for p in layer.parameters()] == [p.shape for p in layer.parameters()]


def _attention(**options):
    return Attention(16, num_heads=2, **options)


@native
@pytest.mark.parametrize(
    ("build", "call"),
    [
        (_attention, lambda model, x: model(x, attn_mask=torch.ones(4, 4, dtype=torch.bool))),
        (lambda: _attention(attn_drop=0.5), lambda model, x: model(x)),
        (_attention, lambda model, x: model.double()(x.double())),
        (lambda: nn.LayerNorm(16), lambda model, x: torch.func.vmap(model)(x)),
        (lambda: nn.GELU(), lambda model, x: model(TwoTensor(x, x)).a),
    ],
    ids=["mask", "dropout", "float64", "vmap", "subclass"],
)
def test_unsupported_call_runs_own_code(build, call):
    model, x = build(), torch.randn(2, 4, 16)
    untouched, ran = copy.deepcopy(model), []
    report = evakernels.accelerate(model, include=type(model).__name__, force=True)
    assert report.headline.startswith("1 of ")
    results = []
    for m in (model, untouched):
        torch.manual_seed(0)
        with observed_by(lambda op, backend: ran.append(op)):
            results.append(call(m, x))
    assert ran == []
    torch.testing.assert_close(*results)


def test_report_can_be_copied():
    report = evakernels.accelerate(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    assert copy.deepcopy(report) == report == pickle.loads(pickle.dumps(report))
