"""What a swapped module keeps, what is left alone, and the report."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from dropin_families import FAMILIES, accelerated, close, log_ops, pair, run
from open_clip.transformer import Attention as OpenClipAttention
from timm.layers import Attention, GluMlp, LayerNorm
from timm.models.eva import EvaAttention, EvaBlock
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from transformers import LlamaConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.llama.modeling_llama import LlamaMLP

import evakernels

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
    """The fused ops see dual numbers; under the transform the untouched code runs."""
    family, model, untouched = pair(name)
    (x,) = family.inputs(1).values()
    tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    with sdpa_kernel(SDPBackend.MATH):  # the only torch attention with these derivatives
        _, expected = jvp(untouched, (x,), (tangent,))
        close(jvp(model, (x,), (tangent,))[1], expected)
        with forward_ad.dual_level():
            close(forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent))).tangent, expected)


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


def _record(models, register):
    """The names and shapes that hooks on all calls see, of each of the models."""
    family, *models = models
    found = []
    for m in models:
        seen, names = [], {module: name for name, module in m.named_modules()}

        def note(module, args, output, names=names, seen=seen):
            shapes = [tuple(x.shape) for x in (*args, output) if isinstance(x, torch.Tensor)]
            # transformers' rotary function may be a module, which no model lists.
            seen.append((names.get(module, type(module).__name__), shapes))

        handles = register(m, note)
        try:
            m.eval()(**family.inputs(1))  # timm's features are all tokens, its output pools one
        finally:
            for handle in handles:
                handle.remove()
        found.append(seen)
    return found


def _hook_all(model, hook):
    return [module.register_forward_hook(hook) for module in model.modules()]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "register", [_hook_all, lambda model, hook: [register_module_forward_hook(hook)]], ids=["local", "global"]
)
def test_hooks_see_untouched_calls(name, register):
    """The same modules in the same order, with inputs and outputs of the same shapes."""
    actual, expected = _record(pair(name), register)
    assert actual == expected


@pytest.mark.parametrize(
    ("cls", "name"),
    [(Attention, "q_norm"), (Attention, "k_norm"), (OpenClipAttention, "ln_q"), (OpenClipAttention, "ln_k")],
)
def test_hook_on_head_norm_gets_heads_first(cls, name):
    untouched = cls(32, num_heads=4, qk_norm=True, norm_layer=LayerNorm).eval()
    model = accelerated(untouched)
    x = torch.randn(2, 5, 32)
    for m in (model, untouched):
        getattr(m, name).register_forward_hook(lambda module, args, output: output.index_fill(1, torch.tensor(2), 0))
    close(model(x), untouched(x))


def test_hook_on_activation_runs_before_up_projection():
    untouched = LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=12))
    model = accelerated(untouched)
    orders = []
    for m in (model, untouched):
        orders.append([])
        for child in (m.act_fn, m.up_proj):
            child.register_forward_hook(lambda module, args, output, order=orders[-1]: order.append(type(module)))
        m(torch.randn(2, 32))
    assert [cls.__name__ for cls in orders[0]] == [cls.__name__ for cls in orders[1]]


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
    family, swapped, untouched = pair("eva02")
    layers = "blocks.0.attn.proj", "blocks.1.norm2"
    for model in (swapped, untouched):
        for name in layers:
            register_parametrization(model.get_submodule(name), "weight", nn.Tanh())
    model = swapped if first == "accelerate" else copy.deepcopy(untouched)
    report = evakernels.accelerate(model, strict=True, force=True)
    assert {done.module for done in report.replaced if done.name in layers} == {"Linear", "LayerNorm"}
    close(run(family, model, 1), run(family, untouched, 1))
    evakernels.restore(model)
    assert [type(m).__mro__[1:] for m in model.modules()] == [type(m).__mro__[1:] for m in untouched.modules()]
    for name in layers:
        remove_parametrizations(model.get_submodule(name), "weight")
        assert type(model.get_submodule(name)) in (nn.Linear, LayerNorm)


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
    assert _reason(evakernels.accelerate(nn.LayerNorm((3, 4)), force=True), "") == "it normalises 2 dimensions"
    report = evakernels.accelerate(nn.LayerNorm(8, dtype=torch.float64), force=True)
    assert _reason(report, "") == "no kernels are for float64 on cpu"
    gated = nn.Sequential(GluMlp(8, 12, act_layer=nn.Sigmoid), GluMlp(8, 12, act_layer=nn.SiLU, use_conv=True))
    report = evakernels.accelerate(gated)
    assert [_reason(report, name) for name in "01"] == ["its activation is Sigmoid", "it is made of convolutions"]


# --- older releases ---------------------------------------------------------------------------------------------------


class OldAttention(Attention):
    """timm's before 1.0.16, without a norm behind attention and without a mask."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        del self.norm

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.proj_drop(self.proj(x))


class OldEncoderLayer(CLIPEncoderLayer):
    """transformers' before 5, which returns a tuple."""

    def forward(self, hidden_states, attention_mask=None):
        x = hidden_states + self.self_attn(self.layer_norm1(hidden_states), attention_mask)[0]
        return (x + self.mlp(self.layer_norm2(x)),)


@pytest.mark.parametrize(
    ("build", "op"),
    [
        (lambda: OldAttention(64, 2), "rope_attention"),
        (lambda: OldEncoderLayer(FAMILIES["clip"].build().config.vision_config), "add_layer_norm"),
    ],
)
def test_module_of_older_release_is_replaced(build, op):
    untouched = build().eval()
    model = copy.deepcopy(untouched)
    assert "" in {done.name for done in evakernels.accelerate(model, force=True).replaced}
    x = torch.randn(2, 9, 64)
    with log_ops() as ops:
        close(model(x), untouched(x))
    assert op in ops


def test_model_must_be_a_module():
    for function in (evakernels.accelerate, evakernels.restore):
        with pytest.raises(TypeError, match="model must be"):
            function([])


# --- report ----------------------------------------------------------------------------------------------------------


def test_accelerate_imports_no_other_library():
    code = (
        "import sys, torch, evakernels\n"
        "evakernels.accelerate(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)))\n"
        "print([m for m in ('timm', 'transformers', 'open_clip', 'rich') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
