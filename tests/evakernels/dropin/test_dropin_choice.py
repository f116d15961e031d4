"""Which modules `accelerate` is asked to serve, and what of them ran."""

import copy
import pickle

import pytest
import torch
from dropin_families import FAMILIES
from dropin_family import log_ops, ops_of, run
from timm.layers import Attention
from timm.models.eva import EvaAttention
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import evakernels
from evakernels.dropin import Idle, Ran, _gate

everything_served = pytest.mark.usefixtures("everything_served")
native = pytest.mark.skipif(not evakernels.info()["native"]["loaded"], reason="the native library is not built")


def _swapped(model):
    """Names of the modules that have another class than they were built with."""
    untouched = copy.deepcopy(model)
    evakernels.restore(untouched)
    pairs = zip(model.named_modules(), untouched.modules(), strict=True)
    return {name for (name, module), other in pairs if type(module) is not type(other)}


def _everything():
    model = FAMILIES["eva02"].build()
    evakernels.accelerate(model)
    return _swapped(model)


def _reasons(report):
    return {left.reason for left in report.left}


# --- include, exclude ------------------------------------------------------------------------------------------------


@everything_served
def test_what_is_included_alone_is_served():
    model = FAMILIES["eva02"].build()
    report = evakernels.accelerate(model, include=["EvaAttention", "blocks.1.mlp"])
    below = {f"blocks.1.mlp.{name}" for name in ("fc1_g", "fc1_x", "fc2", "norm")}
    assert _swapped(model) == {"blocks.0.attn", "blocks.1.attn", "blocks.1.mlp", *below}
    assert {done.name for done in report.replaced} == _swapped(model)
    assert _reasons(report) == {"not included"}
    assert ops_of(FAMILIES["eva02"], model) == {"rope_attention", "swiglu"}


@everything_served
def test_the_name_of_a_part_stands_for_all_that_is_below():
    part, all_below = (FAMILIES["eva02"].build() for _ in range(2))
    evakernels.accelerate(part, include="blocks")
    evakernels.accelerate(all_below, include="blocks.*")
    assert _swapped(part) == _swapped(all_below) >= {"blocks.0", "blocks.1.mlp.fc2"}
    evakernels.accelerate(part, include="blocks", exclude="blocks.1")
    assert _swapped(part) == {name for name in _swapped(all_below) if not name.startswith("blocks.1")}


@everything_served
def test_what_is_excluded_keeps_its_own_code():
    model = FAMILIES["eva02"].build()
    report = evakernels.accelerate(model, exclude="EvaAttention")
    assert _everything() - _swapped(model) == {"blocks.0.attn", "blocks.1.attn"}
    assert [left.name for left in report.left if left.reason == "excluded"] == ["blocks.0.attn", "blocks.1.attn"]
    assert type(model.blocks[0].attn) is EvaAttention


@everything_served
def test_a_class_and_a_part_of_the_model_may_both_be_excluded():
    model = FAMILIES["eva02"].build()
    evakernels.accelerate(model, include="blocks.*", exclude=("blocks.0*", "Linear"))
    assert _swapped(model) == {name for name in _everything() if name.startswith("blocks.1")} - {
        f"blocks.1.{name}" for name in ("attn.qkv", "attn.proj", "attn.q_proj", "attn.k_proj", "attn.v_proj")
    } - {f"blocks.1.mlp.{name}" for name in ("fc1_g", "fc1_x", "fc2")}


@everything_served
def test_excluded_later_a_module_gets_its_own_code_back():
    model = FAMILIES["eva02"].build()
    evakernels.accelerate(model)
    evakernels.accelerate(model, exclude="EvaAttention")
    assert type(model.blocks[1].attn) is EvaAttention
    report = evakernels.accelerate(model, include="EvaAttention")
    assert _swapped(model) == _everything()
    assert {done.module for done in report.replaced} > {"EvaAttention", "EvaBlock"}  # those of before, too


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize(
    ("pattern", "near"),
    [
        ("EvaAttentoin", "EvaAttention"),
        ("blocks.*.atn", r"blocks\.\*\.attn"),
        ("evablock", "EvaBlock"),
        ("zzzz", "Eva"),
    ],
)
def test_a_pattern_that_matches_nothing_names_what_is_near(argument, pattern, near):
    model = FAMILIES["eva02"].build()
    with pytest.raises(
        ValueError, match=rf"accelerate: {argument}='.*' matches the name or class of no module.*; near.*{near}"
    ):
        evakernels.accelerate(model, **{argument: ["EvaBlock", pattern]})
    assert _swapped(model) == set()


@pytest.mark.parametrize("pattern", ["Conv2d", "patch_embed"])
def test_unsupported_module_cannot_be_included(pattern):
    with pytest.raises(ValueError, match="matches the name or class of no module that is supported; near are"):
        evakernels.accelerate(FAMILIES["eva02"].build(), include=pattern)


@pytest.mark.parametrize("pattern", [nn.Linear, [nn.Linear], 3])
def test_only_patterns_are_taken(pattern):
    with pytest.raises(TypeError, match=r"include=.*; accepted: patterns of names and classes, each a str"):
        evakernels.accelerate(nn.Linear(2, 2), include=pattern)


# --- force -----------------------------------------------------------------------------------------------------------


@native
def test_force_serves_what_is_as_fast_in_torch():
    model = nn.Sequential(nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 8)).eval()
    x = torch.randn(2, 8)
    expected = model(x)
    report = evakernels.accelerate(model, force=True)
    assert [done.op for done in report.replaced][:2] == ["layer_norm", "gelu"]
    with log_ops() as ops:
        actual = model(x)
    assert ops == {"layer_norm", "gelu"}
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@native
@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
def test_a_linear_layer_is_forced_onto_onednn():
    model, x = nn.Linear(8, 4), torch.randn(3, 8)
    expected = model(x)
    report = evakernels.accelerate(model, force=True)
    with report.watch():
        torch.testing.assert_close(model(x), expected)
    assert [(ran.op, ran.backend, ran.calls) for ran in report.ran] == [("linear", "oneDNN", 1)]


@native
def test_what_is_forced_stays_so():
    model = nn.Sequential(nn.LayerNorm(8), nn.GELU())
    evakernels.accelerate(model, include="LayerNorm", force=True)
    evakernels.accelerate(model)
    for copied in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with log_ops() as ops:
            copied(torch.randn(2, 8))
        assert ops == {"layer_norm"}
    evakernels.restore(model)
    assert [type(module) for module in model] == [nn.LayerNorm, nn.GELU]


def test_force_serves_nothing_that_it_cannot_serve_right():
    model = nn.Sequential(nn.LayerNorm((3, 8)), nn.LayerNorm(8, dtype=torch.float64), nn.Linear(8, 8).double())
    x = torch.randn(2, 3, 8).double()
    report = evakernels.accelerate(model, force=True)
    assert [left.reason for left in report.left] == [
        "it normalises 2 dimensions",
        *["no kernels are for float64 on cpu"] * 2,
    ]
    untouched = copy.deepcopy(model)
    evakernels.restore(untouched)
    with log_ops() as ops:
        assert torch.equal(model[1:](x), untouched[1:](x))
    assert ops == set()


@native
@pytest.mark.parametrize("name", ["vit", "eva02", "clip", "open-clip", "dinov3-vit-gated"])
def test_forced_models_run_on_every_op_that_they_have(name):
    family, untouched = FAMILIES[name], FAMILIES[name].build()
    model = copy.deepcopy(untouched)
    evakernels.accelerate(model, force=True)
    assert ops_of(family, model.train()) >= family.ops
    torch.testing.assert_close(run(family, model.eval(), 1), run(family, untouched, 1), rtol=1e-4, atol=1e-5)


def test_a_forced_op_is_served_at_every_size():
    x = torch.zeros(1, 8)
    assert not _gate.serves("layer_norm", x)
    assert _gate.serves("layer_norm", x, forced=True) == evakernels.info()["native"]["loaded"]


# --- what ran --------------------------------------------------------------------------------------------------------


def _totals(report):
    totals = {}
    for ran in report.ran:
        totals[ran.module, ran.op, ran.backend] = totals.get((ran.module, ran.op, ran.backend), 0) + ran.calls
    return totals


@native
@everything_served
def test_a_report_tells_what_ran():
    family, model = FAMILIES["eva02"], FAMILIES["eva02"].build()
    report = evakernels.accelerate(model, exclude="Linear")
    assert report.ran == report.idle == []
    with report.watch():
        run(family, model, 1).sum().backward()
    totals = _totals(report)
    assert totals["EvaBlock", "add_layer_norm", "cpu"] == 2
    assert totals["EvaAttention", "rope_attention", "cpu"] == 2
    assert totals["", "rope_attention_backward", "cpu"] == 2
    assert Ran("blocks.1.attn", "EvaAttention", "rope_attention", "cpu", 1) in report.ran
    # Part of the step of their block.
    assert Idle("blocks.0.norm2", "LayerNorm", 0) in report.idle


@everything_served
def test_the_backend_is_the_one_that_served():
    model = nn.LayerNorm(8)
    report = evakernels.accelerate(model)
    with evakernels.use_backend("reference"), report.watch():
        model(torch.randn(2, 8))
    assert report.ran == [Ran("", "LayerNorm", "layer_norm", "reference", 1)]


@native
@pytest.mark.parametrize("with_rich", [True, False])
def test_a_call_that_ran_its_own_code_is_told(with_rich, monkeypatch):
    model = nn.Sequential(nn.GELU("tanh"), nn.GELU("tanh"), nn.GELU("tanh"))
    report = evakernels.accelerate(model)
    with report.watch():
        model[0](torch.randn(2, 8))
        model[1](torch.randn(2, 8, dtype=torch.float64))
    assert report.ran == [Ran("0", "GELU", "gelu", "cpu", 1)]
    assert report.idle == [Idle("1", "GELU", 1, "float64 on cpu"), Idle("2", "GELU", 0)]
    assert report.headline == "2 of 3 modules, 1 ran their own code (float64 on cpu)"
    if not with_rich:
        monkeypatch.setattr("evakernels.dropin._report.find_spec", lambda name: None)
    lines = [line.split() for line in str(report).splitlines()]
    assert any({"GELU", "gelu", "cpu"} <= set(line) for line in lines)
    assert any({"own", "code:", "float64", "on", "cpu"} <= set(line) for line in lines)
    assert any({"never", "called"} <= set(line) for line in lines)


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
            lambda: nn.MultiheadAttention(16, 2, batch_first=True),
            lambda model, x: model(x, x, x, key_padding_mask=torch.zeros(2, 4, dtype=torch.bool)),
            "mask",
        ),
        (
            lambda: nn.LayerNorm(16),
            lambda model, x: torch.func.vmap(model)(x),
            "tensor subclass, transform or tracer",
        ),
    ],
)
def test_report_names_the_reason_of_own_code(build, call, reason):
    model = build()
    report = evakernels.accelerate(model, include=type(model).__name__, force=True)
    assert report.headline.startswith("1 of ")
    with report.watch():
        call(model, torch.randn(2, 4, 16))
    assert report.idle == [Idle("", type(model).__name__, 1, reason)]
    assert report.headline.startswith("0 of ")
    assert report.headline.endswith(f", 1 ran their own code ({reason})")


@native
def test_report_names_a_call_that_is_too_small():
    model = nn.GELU()
    report = evakernels.accelerate(model)
    with report.watch():
        model(torch.zeros(1, 8))
    assert report.idle == [Idle("", "GELU", 1, "too small")]


@native
def test_padding_mask_takes_blocks_from_the_report():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    config = transformers.ModernBertConfig(vocab_size=8, **sizes, **tokens)
    model = transformers.ModernBertModel(config).eval()
    report = evakernels.accelerate(model, include="*Attention", force=True)
    assert report.headline.startswith("2 of 2 blocks")
    with report.watch(), torch.no_grad():
        model(torch.ones(2, 6, dtype=torch.int64), torch.tensor([[1] * 6, [1] * 3 + [0] * 3]))
    assert {(idle.calls, idle.reason) for idle in report.idle} == {(1, "mask")}
    assert report.headline.startswith("0 of 2 blocks")


@native
def test_what_a_later_call_swapped_is_watched_too():
    model = nn.Sequential(nn.GELU("tanh"), nn.LayerNorm(8))
    report = evakernels.accelerate(model, include="GELU")
    evakernels.accelerate(model, include="LayerNorm", force=True)
    with report.watch():
        model(torch.randn(2, 8))
    assert Ran("1", "LayerNorm", "layer_norm", "cpu", 1) in report.ran


@native
def test_a_second_watch_starts_anew_and_a_call_outside_does_not_count():
    model, x = nn.GELU("tanh"), torch.randn(2, 8)
    report = evakernels.accelerate(model)
    for _ in range(2):
        with report.watch():
            model(x)
        model(x)
        assert report.ran == [Ran("", "GELU", "gelu", "cpu", 1)]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda report: pickle.loads(pickle.dumps(report))])
def test_a_report_can_be_copied_and_saved(copied):
    model = nn.Linear(2, 2)
    report = evakernels.accelerate(model)
    assert copied(report) == report
    with pytest.raises(RuntimeError, match="doesn't exist any more"), copied(report).watch():
        pass


def test_a_report_does_not_keep_its_model():
    report = evakernels.accelerate(nn.GELU("tanh"))
    with pytest.raises(RuntimeError, match="the model of this report doesn't exist any more"), report.watch():
        pass


@native
def test_an_error_inside_leaves_no_trace():
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


def test_compiled_code_asks_as_eager_code_does(monkeypatch):
    """Also about sizes, for each of which it is compiled, and about tensors that aren't torch's own."""
    monkeypatch.setitem(_gate._SERVED, ("add_norm", "cpu", torch.float32), 64)

    @torch.compile(fullgraph=True, backend="eager")
    def answer(x):
        return x + 1 if _gate.serves("add_norm", x) else x - 1

    assert answer(torch.zeros(63))[0] == -1
    assert answer(torch.zeros(64))[0] == 1
    assert answer(TwoTensor(torch.zeros(64), torch.zeros(64))).a[0] == -1
