"""The options of `accelerate`, and its report."""

import copy
import pickle

import pytest
import torch
from dropin_families import FAMILIES, log_ops, run
from timm.layers import Attention
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import evakernels
from evakernels.dropin import Idle, Ran

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
    report = evakernels.accelerate(model)
    with report.watch(), log_ops() as ops:
        model(x)
    assert ops == set()
    assert {idle.reason for idle in report.idle} <= {"too small", "float32 on cpu"}
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
    report = evakernels.accelerate(model, force=True)
    with report.watch():
        torch.testing.assert_close(model(x), expected)
    assert [(ran.op, ran.backend, ran.calls) for ran in report.ran] == [("linear", "oneDNN", 1)]


# --- what ran --------------------------------------------------------------------------------------------------------


@native
def test_watch_counts_what_ran():
    family, model = FAMILIES["eva02"], FAMILIES["eva02"].build()
    report = evakernels.accelerate(model, exclude="Linear", force=True)
    assert report.ran == report.idle == []
    for _ in range(2):  # a second watch starts anew
        with report.watch():
            run(family, model, 1).sum().backward()
        run(family, model, 1)
        assert Ran("blocks.1.attn", "EvaAttention", "rope_attention", "cpu", 1) in report.ran
        assert Ran("", "", "rope_attention_backward", "cpu", 2) in report.ran
        assert Idle("blocks.0.norm2", "LayerNorm", 0) in report.idle  # part of the step of its block


@native
def test_report_counts_modules_that_ran_their_own_code():
    model = nn.Sequential(*(nn.GELU("tanh") for _ in range(3)))
    report = evakernels.accelerate(model)
    with report.watch():
        model[0](torch.randn(2, 8))
        model[1](torch.randn(2, 8, dtype=torch.float64))
    assert report.ran == [Ran("0", "GELU", "gelu", "cpu", 1)]
    assert report.idle == [Idle("1", "GELU", 1, "float64 on cpu"), Idle("2", "GELU", 0)]
    assert report.headline == "2 of 3 modules, 1 ran their own code (float64 on cpu)"
    assert report.headline in str(report)


def test_report_without_its_model():
    model = nn.Linear(2, 2)
    report = evakernels.accelerate(model)
    for copied in (copy.deepcopy(report), pickle.loads(pickle.dumps(report))):
        assert copied == report
        with pytest.raises(RuntimeError, match="model"), copied.watch():
            pass
    del model
    with pytest.raises(RuntimeError, match="model"), report.watch():
        pass


def _attention(**options):
    return Attention(16, num_heads=2, **options)


@native
@pytest.mark.parametrize(
    ("build", "call", "reason"),
    [
        (_attention, lambda model, x: model(x, attn_mask=torch.ones(4, 4, dtype=torch.bool)), "mask"),
        (lambda: _attention(attn_drop=0.5), lambda model, x: model(x), "dropout"),
        (_attention, lambda model, x: model.double()(x.double()), "float64 on cpu"),
        (
            lambda: nn.LayerNorm(16),
            lambda model, x: torch.func.vmap(model)(x),
            "tensor subclass, transform or tracer",
        ),
        (lambda: nn.GELU(), lambda model, x: model(TwoTensor(x, x)), "tensor subclass, transform or tracer"),
    ],
)
def test_watch_names_the_reason_of_own_code(build, call, reason):
    model = build()
    report = evakernels.accelerate(model, include=type(model).__name__, force=True)
    assert report.headline.startswith("1 of ")
    with report.watch():
        call(model, torch.randn(2, 4, 16))
    assert report.idle == [Idle("", type(model).__name__, 1, reason)]
    assert report.headline.startswith("0 of ")
    assert report.headline.endswith(f", 1 ran their own code ({reason})")


@native
def test_watch_survives_an_error():
    class Stops(nn.Module):
        def forward(self, x):
            raise RuntimeError("stop")

    family, model = FAMILIES["vit"], FAMILIES["vit"].build()
    report = evakernels.accelerate(model, force=True)
    mlp, model.blocks[0].mlp = model.blocks[0].mlp, Stops()
    with report.watch():
        with pytest.raises(RuntimeError, match="stop"):
            run(family, model, 1)
        model.blocks[0].mlp = mlp
        evakernels.gelu(torch.randn(2, 8))
    assert Ran("", "", "gelu", "cpu", 1) in report.ran
    assert not torch.nn.modules.module._has_any_global_hook()
