"""What a swapped module keeps, what is left alone, and the report."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from dropin_families import FAMILIES, close, pair
from dropin_family import ops_of, run
from timm.layers import GluMlp, LayerNorm
from timm.models.eva import EvaAttention, EvaBlock
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from transformers.activations import GELUActivation

import evakernels
from evakernels import _native
from evakernels.dropin import Report, _gate

everything_served = pytest.mark.usefixtures("everything_served")


def _classes(model):
    return [type(module) for module in model.modules()]


# --- what is kept and what comes back -------------------------------------------------------------------------------


def test_modules_and_parameters_stay_the_same_objects():
    model = FAMILIES["eva02"].build()
    modules, parameters = list(model.modules()), list(model.parameters())
    evakernels.accelerate(model)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert isinstance(model.blocks[0], EvaBlock)
    assert isinstance(model.blocks[0].attn.proj, nn.Linear)


def test_a_second_call_changes_nothing_and_reports_the_same():
    model = FAMILIES["eva02"].build()
    first, classes = evakernels.accelerate(model), _classes(model)
    assert evakernels.accelerate(model) == first
    assert _classes(model) == classes


@everything_served
def test_a_copy_is_changed_on_its_own():
    _, model, _ = pair("eva02")
    classes = _classes(model)
    evakernels.restore(copy.deepcopy(model))
    assert _classes(model) == classes


# --- tracers -------------------------------------------------------------------------------------------------------


@everything_served
def test_transforms_and_tracers_see_the_untouched_code():
    family, model, untouched = pair("eva02")
    x = family.inputs(1)["x"]
    parameters = dict(model.named_parameters())
    close(vmap(lambda one: functional_call(model, parameters, (one[None],))[0])(x), untouched(x))
    close(torch.jit.trace(model, x, check_trace=False)(x), untouched(x))


@pytest.mark.parametrize("name", ["eva02", "vit"])
def test_torch_fx_traces_the_untouched_code(name):
    """The model's own options, such as `is_causal`, are proxies then."""
    family, model, untouched = pair(name)
    evakernels.accelerate(model.eval(), force=True)
    # Torch.fx doesn't read timm's own patch dropout either.
    model.patch_drop = None if name == "eva02" else nn.Identity()
    last = get_graph_node_names(model)[1][-1]
    x = family.inputs(1)["x"]
    close(create_feature_extractor(model, [last])(x)[last], untouched.eval()(x))


@everything_served
@pytest.mark.parametrize("name", ["eva02", "vit"])
def test_forward_mode_derivatives(name):
    """By dual numbers, which the fused ops see, and by the transform, under which the untouched code runs."""
    family, model, untouched = pair(name)
    (x,) = family.inputs(1).values()
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def by_duals(model):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent

    with sdpa_kernel(SDPBackend.MATH):  # the one of torch's attentions that has these
        expected = by_duals(untouched)
        close(by_duals(model), expected)
        close(jvp(model, (x,), (tangent,))[1], expected)


def test_torchscript_asks_for_the_restored_model():
    _, model, _ = pair("vit")
    with pytest.raises(RuntimeError, match=r"call evakernels.restore\(model\) first"):
        torch.jit.script(model)
    evakernels.restore(model)
    torch.jit.script(model)


# --- children that somebody watches or has replaced -----------------------------------------------------------------


@everything_served
@pytest.mark.parametrize("path", ["blocks.1.norm2", "blocks.1.mlp.norm", "blocks.1.drop_path1", "blocks.1.attn.proj"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_a_hook_on_a_child_is_called(path, training):
    family, model, untouched = pair("eva02")
    model.train(training), untouched.train(training)
    seen = []
    model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(run(family, model, 1), run(family, untouched, 1), rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


@everything_served
def test_a_child_that_was_replaced_is_called():
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    family, model, untouched = pair("eva02")
    for m in (model, untouched):
        m.blocks[0].norm2, m.blocks[1].mlp.act, m.blocks[1].mlp.norm = Doubled(), nn.ReLU(), nn.Identity()
        m.blocks[0].attn.q_proj, m.blocks[0].attn.proj = Doubled(), Doubled()
    close(run(family, model, 1), run(family, untouched, 1))


@everything_served
@pytest.mark.parametrize("first", ["parametrize", "accelerate"])
def test_parametrized_modules_are_served_and_restored(first):
    family, _, untouched = pair("eva02")
    layers = "blocks.0.attn.proj", "blocks.0.mlp.fc2", "blocks.1.attn.q_proj", "blocks.1.norm2"
    for name in layers:
        register_parametrization(untouched.get_submodule(name), "weight", nn.Tanh())
    model = copy.deepcopy(untouched)
    if first == "accelerate":
        model = FAMILIES["eva02"].build()
        evakernels.accelerate(model)
        for name in layers:
            register_parametrization(model.get_submodule(name), "weight", nn.Tanh())
    report = evakernels.accelerate(model, strict=True)
    assert {done.module for done in report.replaced if done.name in layers} == {"Linear", "LayerNorm"}
    close(run(family, model, 1), run(family, untouched, 1))
    close(run(family, copy.deepcopy(model), 1), run(family, untouched, 1))
    evakernels.restore(model)
    assert [type(m).__mro__[1:] for m in model.modules()] == [type(m).__mro__[1:] for m in untouched.modules()]
    for name in layers:
        remove_parametrizations(model.get_submodule(name), "weight")
        assert type(model.get_submodule(name)) in (nn.Linear, LayerNorm)


@everything_served
def test_a_forward_of_its_own_is_called():
    family, model, _ = pair("eva02")
    called = []
    norm = model.blocks[0].norm2
    norm.forward = lambda x: called.append(x) or F.layer_norm(x, (64,), norm.weight, norm.bias, norm.eps)
    run(family, model, 1)
    assert len(called) == 1


@everything_served
def test_what_the_op_does_not_have_runs_as_before():
    """A mask, dropout of the weights, attention that isn't fused."""
    _, model, untouched = pair("eva02")
    x, mask = torch.randn(2, 17, 64), torch.randn(17, 17)
    rope = model.rope.get_embed()
    ours, theirs = model.blocks[0].attn, untouched.blocks[0].attn
    close(ours(x, rope=rope, attn_mask=mask), theirs(x, rope=rope, attn_mask=mask))
    close(ours(x, rope=rope, is_causal=True), theirs(x, rope=rope, is_causal=True))
    for attention in (ours, theirs):
        attention.attn_drop.p = 0.5
        attention.train()
    results = []
    for attention in (ours, theirs):
        torch.manual_seed(0)
        results.append(attention(x, rope=rope))
    close(*results)


# --- what is left ---------------------------------------------------------------------------------------------------


def _reason(report, name):
    return next(left.reason for left in report.left if left.name == name)


def test_a_forward_set_on_a_module_is_left():
    model = FAMILIES["eva02"].build()
    model.blocks[0].attn.forward = lambda x, **_: x
    report = evakernels.accelerate(model)
    assert _reason(report, "blocks.0.attn") == "its forward was replaced"
    assert type(model.blocks[0].attn) is EvaAttention


def test_options_that_the_forward_lacks_are_named():
    assert _reason(evakernels.accelerate(nn.LayerNorm((3, 4))), "") == "it normalises 2 dimensions"
    gated = nn.Sequential(GluMlp(8, 12, act_layer=nn.Sigmoid), GluMlp(8, 12, act_layer=nn.SiLU, use_conv=True))
    report = evakernels.accelerate(gated)
    assert [_reason(report, name) for name in "01"] == ["its activation is Sigmoid", "it is made of convolutions"]
    report = evakernels.accelerate(GELUActivation(use_gelu_python=True))
    assert _reason(report, "") == "it makes GELU of other functions"


def test_attention_of_timm_that_holds_no_head_dim_runs():
    """Before 1.0.26 it held none."""
    family, model, untouched = pair("eva02")
    evakernels.accelerate(model, force=True)
    for block in model.blocks:
        del block.attn.head_dim
    close(run(family, model, 1), run(family, untouched, 1))


def test_what_is_as_fast_in_torch_is_left_and_said(monkeypatch):
    monkeypatch.delitem(_gate._SERVED, ("layer_norm", "cpu", torch.float32), raising=False)
    report = evakernels.accelerate(nn.Sequential(nn.LayerNorm(8), nn.GELU()))
    wide = _gate.is_served("exact_gelu", "cpu", torch.float32)
    reasons = ["its own float32 on cpu is as fast", *([] if wide else ["its own is as fast"])]
    assert [left.reason for left in report.left] == reasons
    assert [done.module for done in report.replaced] == (["GELU"] if wide else [])


def test_without_avx512_less_is_served():
    wide, narrow = _gate.cpu_table("avx512_bf16"), _gate.cpu_table("avx2")
    assert _gate.cpu_table("avx512") is wide
    for faster in (_gate.cpu_table("avx512_bf16", amd=True), _gate.cpu_table("amx")):
        assert all(faster[op].get(dtype, least) <= least for op, t in wide.items() for dtype, least in t.items())
    assert _gate.cpu_table("avx2", amd=True) is narrow
    assert _gate.cpu_table("baseline") is _gate.cpu_table(None) is narrow
    assert torch.bfloat16 in wide["attention"].keys() - narrow["attention"].keys()
    assert all(narrow[op].get(dtype, least) >= least for op, table in wide.items() for dtype, least in table.items())
    isa = evakernels.info()["native"]["isa"]
    assert _native.active_isa() == isa
    served = {name for name, device, dtype in _gate._SERVED if (device, dtype) == ("cpu", torch.bfloat16)}
    assert _gate.is_served("attention", "cpu", torch.bfloat16) == (isa is not None)  # in training at least
    if isa is not None:
        assert served == {
            name for name, table in _gate.cpu_table(isa, _native.is_amd()).items() if torch.bfloat16 in table
        }


def test_only_modules_are_taken():
    for function in (evakernels.accelerate, evakernels.restore):
        with pytest.raises(TypeError, match=r"model is a list; accepted: a torch.nn.Module"):
            function([])


def test_small_calls_run_the_untouched_code():
    family, model, _ = pair("vit")
    assert ops_of(family, model) <= {"rope_attention"}  # which AMD's processors gain from at every size
    assert not _gate.serves("layer_norm", torch.zeros(1, 4, 8, dtype=torch.bfloat16))


# --- report ----------------------------------------------------------------------------------------------------------


def test_the_report_is_a_table(monkeypatch):
    monkeypatch.delitem(_gate._SERVED, ("layer_norm", "cpu", torch.float32), raising=False)
    report = evakernels.accelerate(FAMILIES["eva02"].build())
    blocks = [done for done in report.replaced if done.module == "EvaBlock"]
    assert [(b.name, b.op, b.backend) for b in blocks] == [(f"blocks.{i}", "add_layer_norm", "cpu") for i in range(2)]
    text = str(report)
    line = next(line for line in text.splitlines() if "EvaBlock" in line)
    assert "2" in line
    assert "add_layer_norm" in line
    assert "as fast" in next(line for line in text.splitlines() if "LayerNorm" in line)


def test_the_report_needs_no_rich(monkeypatch):
    report = evakernels.accelerate(FAMILIES["eva02"].build())
    monkeypatch.setattr("evakernels.dropin._report.find_spec", lambda name: None)
    headline, header, *lines = str(report).splitlines()
    assert headline == f"2 of 2 blocks, {len(report.replaced)} of {len(report.replaced + report.left)} modules"
    assert header.split() == ["module", "count", "can", "run", "backend", "left", "because"]
    assert any(line.split()[:3] == ["EvaBlock", "2", "add_layer_norm"] for line in lines)
    assert str(Report()).split() == ["0", "of", "0", "modules", *header.split()]


def test_importing_the_library_imports_none_of_the_others():
    import subprocess

    code = (
        "import sys, torch, evakernels\n"
        "evakernels.accelerate(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)))\n"
        "print([m for m in ('timm', 'transformers', 'open_clip', 'rich') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
