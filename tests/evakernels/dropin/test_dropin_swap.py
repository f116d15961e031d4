"""What a swapped module keeps, what is left alone, and the report."""

import copy
import sys

import pytest
import torch
import torch.nn.functional as F
from dropin_families import FAMILIES, close, pair
from dropin_family import log_ops, run
from timm.layers import Attention, GluMlp, LayerNorm, LayerScale, apply_rot_embed_cat
from timm.models.eva import EvaAttention, EvaBlock
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer

import evakernels


def _classes(model):
    return [type(module) for module in model.modules()]


# --- what is kept and what comes back -------------------------------------------------------------------------------


def test_modules_and_parameters_stay_the_same():
    model = FAMILIES["eva02"].build()
    modules, parameters = list(model.modules()), list(model.parameters())
    evakernels.accelerate(model)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert isinstance(model.blocks[0], EvaBlock)
    assert isinstance(model.blocks[0].attn.proj, nn.Linear)


# --- tracers -------------------------------------------------------------------------------------------------------


def test_transforms_and_jit_trace_run_own_code():
    family, model, untouched = pair("eva02")
    x = family.inputs(1)["x"]
    parameters = dict(model.named_parameters())
    close(vmap(lambda one: functional_call(model, parameters, (one[None],))[0])(x), untouched(x))
    close(torch.jit.trace(model, x, check_trace=False)(x), untouched(x))


@pytest.mark.parametrize("name", ["eva02", "vit"])
def test_torch_fx_traces_own_code(name):
    """The model's own options, such as `is_causal`, are proxies then."""
    family, model, untouched = pair(name)
    evakernels.accelerate(model.eval(), force=True)
    # Torch.fx doesn't read timm's own patch dropout either.
    model.patch_drop = None if name == "eva02" else nn.Identity()
    last = get_graph_node_names(model)[1][-1]
    x = family.inputs(1)["x"]
    close(create_feature_extractor(model, [last])(x)[last], untouched.eval()(x))


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


def test_torchscript_needs_restore():
    _, model, _ = pair("vit")
    with pytest.raises(RuntimeError, match=r"call evakernels.restore\(model\) first"):
        torch.jit.script(model)
    evakernels.restore(model)
    torch.jit.script(model)


# --- children that somebody watches or has replaced -----------------------------------------------------------------


@pytest.mark.parametrize("path", ["blocks.1.norm2", "blocks.1.mlp.norm", "blocks.1.drop_path1", "blocks.1.attn.proj"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_hook_on_child_is_called(path, training):
    family, model, untouched = pair("eva02")
    model.train(training), untouched.train(training)
    seen = []
    model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output))
    torch.testing.assert_close(run(family, model, 1), run(family, untouched, 1), rtol=1e-5, atol=1e-5)
    assert len(seen) == 1


def test_replaced_child_is_called():
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    family, model, untouched = pair("eva02")
    for m in (model, untouched):
        m.blocks[0].norm2, m.blocks[1].mlp.act, m.blocks[1].mlp.norm = Doubled(), nn.ReLU(), nn.Identity()
        m.blocks[0].attn.q_proj, m.blocks[0].attn.proj = Doubled(), Doubled()
    close(run(family, model, 1), run(family, untouched, 1))


@pytest.mark.parametrize("first", ["parametrize", "accelerate"])
def test_parametrized_modules_are_replaced(first):
    family, _, untouched = pair("eva02")
    layers = "blocks.0.attn.proj", "blocks.0.mlp.fc2", "blocks.1.attn.q_proj", "blocks.1.norm2"
    for name in layers:
        register_parametrization(untouched.get_submodule(name), "weight", nn.Tanh())
    model = copy.deepcopy(untouched)
    if first == "accelerate":
        model = FAMILIES["eva02"].build()
        evakernels.accelerate(model, force=True)
        for name in layers:
            register_parametrization(model.get_submodule(name), "weight", nn.Tanh())
    report = evakernels.accelerate(model, strict=True, force=True)
    assert {done.module for done in report.replaced if done.name in layers} == {"Linear", "LayerNorm"}
    close(run(family, model, 1), run(family, untouched, 1))
    close(run(family, copy.deepcopy(model), 1), run(family, untouched, 1))
    evakernels.restore(model)
    assert [type(m).__mro__[1:] for m in model.modules()] == [type(m).__mro__[1:] for m in untouched.modules()]
    for name in layers:
        remove_parametrizations(model.get_submodule(name), "weight")
        assert type(model.get_submodule(name)) in (nn.Linear, LayerNorm)


def test_mask_and_dropout_run_own_code():
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


def test_forward_set_on_module_is_left():
    model = FAMILIES["eva02"].build()
    model.blocks[0].attn.forward = lambda x, **_: x
    report = evakernels.accelerate(model)
    assert _reason(report, "blocks.0.attn") == "its forward was replaced"
    assert type(model.blocks[0].attn) is EvaAttention


def test_report_names_unsupported_options():
    assert _reason(evakernels.accelerate(nn.LayerNorm((3, 4))), "") == "it normalises 2 dimensions"
    gated = nn.Sequential(GluMlp(8, 12, act_layer=nn.Sigmoid), GluMlp(8, 12, act_layer=nn.SiLU, use_conv=True))
    report = evakernels.accelerate(gated)
    assert [_reason(report, name) for name in "01"] == ["its activation is Sigmoid", "it is made of convolutions"]


# --- older releases ---------------------------------------------------------------------------------------------------


class OldEvaAttention(EvaAttention):
    """timm's before 1.0.16, without norms of queries and keys and without `head_dim`."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        del self.q_norm, self.k_norm, self.head_dim

    def forward(self, x, rope=None, attn_mask=None):
        q, k, v = (
            p(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if rope is not None:
            q, k = (torch.cat((t[:, :, :1], apply_rot_embed_cat(t[:, :, 1:], rope)), 2) for t in (q, k))
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(self.norm(x)))


class OldAttention(Attention):
    """timm's before 1.0.16, without a norm behind attention and without a mask."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        del self.norm

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x))


class OldCLIPAttention(CLIPAttention):
    """transformers' before 5, with two masks."""

    def forward(self, hidden_states, attention_mask=None, causal_attention_mask=None, output_attentions=False):
        masks = [mask for mask in (attention_mask, causal_attention_mask) if mask is not None]
        return super().forward(hidden_states, sum(masks) if masks else None)


class OldEncoderLayer(CLIPEncoderLayer):
    """transformers' before 5, which returns a tuple."""

    def __init__(self, config):
        super().__init__(config)
        self.self_attn = OldCLIPAttention(config)

    def forward(self, hidden_states, attention_mask, causal_attention_mask, output_attentions=False):
        masks = attention_mask, causal_attention_mask
        branch, weights = self.self_attn(self.layer_norm1(hidden_states), *masks, output_attentions)
        x = hidden_states + branch
        x = x + self.mlp(self.layer_norm2(x))
        return (x, weights) if output_attentions else (x,)


def _old_encoder_layer():
    return OldEncoderLayer(FAMILIES["clip"].build().config.vision_config)


@pytest.mark.parametrize(
    ("build", "op", "args"),
    [
        (lambda: OldEvaAttention(64, 2, qkv_fused=False, norm_layer=nn.LayerNorm), "rope_attention", ()),
        (lambda: OldAttention(64, 2), "rope_attention", ()),
        (_old_encoder_layer, "add_layer_norm", (None, None)),
        (_old_encoder_layer, "add_layer_norm", (torch.zeros(1, 1, 9, 9), None)),
        (_old_encoder_layer, "add_layer_norm", (None, None, True)),
    ],
)
def test_module_of_older_release_is_replaced(build, op, args):
    untouched = build().eval()
    model = copy.deepcopy(untouched)
    assert "" in {done.name for done in evakernels.accelerate(model, force=True).replaced}
    x = torch.randn(2, 9, 64)
    with log_ops() as ops:
        actual = model(x, *args)
    torch.testing.assert_close(actual[0], untouched(x, *args)[0], rtol=1e-5, atol=1e-5)
    assert (len(actual), op in ops) == (len(untouched(x, *args)), args[2:] == ())


@pytest.mark.usefixtures("old_names")
def test_tower_of_older_timm_ends_early():
    model = FAMILIES["vit"].build()
    report = evakernels.accelerate(model, force=True)
    assert "VisionTransformer" in {done.module for done in report.replaced}


@pytest.fixture
def old_names(monkeypatch):
    """timm's before 1.0.22, whose LayerScale is in the file of its model."""
    monkeypatch.setattr(LayerScale, "__module__", "timm.models.vision_transformer")
    monkeypatch.delattr("timm.layers.layer_scale.LayerScale")


def test_model_must_be_a_module():
    for function in (evakernels.accelerate, evakernels.restore):
        with pytest.raises(TypeError, match="model must be"):
            function([])


# --- report ----------------------------------------------------------------------------------------------------------


def test_accelerate_imports_no_other_library():
    import subprocess

    code = (
        "import sys, torch, evakernels\n"
        "evakernels.accelerate(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)))\n"
        "print([m for m in ('timm', 'transformers', 'open_clip', 'rich') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
