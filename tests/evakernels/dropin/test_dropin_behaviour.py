"""Modules are replaced if they behave like their replacement."""

import copy
import gc
import subprocess
import sys
import threading
import warnings
import weakref
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from dropin_families import FAMILIES, accelerated, close, log_ops, ops_of, run
from open_clip.model import CLIP
from timm.layers import GluMlp, LayerScale, Mlp, SwiGLU, SwiGLUPacked
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AttentionInterface, LlamaConfig, LlamaModel
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.llama.modeling_llama import LlamaMLP

import evakernels
from evakernels import ChangedModuleWarning
from evakernels.dropin import _swap


def _same(self, x):
    """Other code that does the same."""
    hidden = F.silu(self.fc1_g(x)) * self.fc1_x(x)
    return self.drop2(self.fc2(self.norm(self.drop1(hidden))))


@pytest.fixture
def gated(monkeypatch):
    """Two MLPs of timm with another forward."""

    def build(forward):
        monkeypatch.setattr(SwiGLU, "forward", forward)
        return nn.Sequential(SwiGLU(8, 12), SwiGLU(8, 12)).eval()

    return build


def _is_left(model):
    return not any(isinstance(module, _swap.AcceleratedModule) for module in model.modules())


def _replaced(report):
    return {done.module for done in report.replaced}


# --- equal behaviour --------------------------------------------------------------------------------------------------


def test_second_call_returns_the_same_report(gated):
    model = gated(_same)
    first = evakernels.accelerate(model, force=True)
    assert "SwiGLU" in _replaced(first)
    assert evakernels.accelerate(model) == first


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last, None])
def test_gelu_keeps_layout_of_images(layout):
    x = torch.randn(2, 8, 4, 6)
    x = x.transpose(2, 3) if layout is None else x.contiguous(memory_format=layout)
    model = nn.Sequential(nn.GELU("tanh"))
    expected = model(x)
    evakernels.accelerate(model, force=True)
    torch.testing.assert_close(model(x), expected)
    assert model(x).stride() == expected.stride()


def test_pickle_in_another_process_is_untouched(tmp_path):
    model = nn.Sequential(nn.LayerNorm(8), nn.GELU("tanh"))
    evakernels.accelerate(model)
    torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys, torch, evakernels\n"
        f"model = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "print(any(c.__module__.startswith('evakernels') for m in model.modules() for c in type(m).__mro__))\n"
        "print(len(evakernels.accelerate(model).replaced))\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert out == ["False", str(len(evakernels.accelerate(model).replaced))]


def test_comparison_leaves_model_and_random_state(gated):
    model = gated(lambda self, x: _same(self, x))
    called = []
    model[0].register_forward_hook(lambda *args: called.append(args))
    values, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    evakernels.accelerate(model)
    assert called == []
    assert not model.training
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("context", ["meta", "no_grad", "inference", "fake"])
def test_comparison_ignores_the_callers_context(gated, context):
    model = gated(lambda self, x: _same(self, x))
    if context == "meta":
        with torch.device("meta"):
            report = evakernels.accelerate(model.to("meta"))
    else:
        contexts = {"no_grad": torch.no_grad, "inference": torch.inference_mode, "fake": FakeTensorMode}
        with contexts[context]():
            report = evakernels.accelerate(model)
    assert "SwiGLU" in _replaced(report)


def test_large_modules_are_compared_at_small_sizes():
    with torch.device("meta"):
        config = LlamaConfig(hidden_size=8192, intermediate_size=28672)
        model = nn.Sequential(LlamaMLP(config), nn.Linear(8192, 128000))
    assert _replaced(evakernels.accelerate(model, strict=True)) | {"Linear"} == {"LlamaMLP", "Linear"}


# --- different behaviour ----------------------------------------------------------------------------------------------


def _changes(self, x):
    y = _same(self, x)
    x.data.add_(1)
    return y


def _draws(self, x):
    torch.rand(1)
    return _same(self, x)


def _scaled_if(condition):
    return lambda self, x: _same(self, x) * (1.5 if condition(self, x) else 1.0)


DIFFERENT = {
    "output": (lambda self, x: 1.0001 * _same(self, x), "output"),
    "gradient": (lambda self, x: 2 * _same(self, x) - _same(self, x).detach(), "gradients"),
    "training": (_scaled_if(lambda self, x: self.training), "output"),
    "evaluation": (_scaled_if(lambda self, x: not self.training), "output"),
    "no graph": (_scaled_if(lambda self, x: not torch.is_grad_enabled()), "output"),
    "bfloat16": (_scaled_if(lambda self, x: x.dtype == torch.bfloat16), "output"),
    "autocast": (_scaled_if(lambda self, x: torch.is_autocast_enabled("cpu")), "output"),
    "dtype": (lambda self, x: _same(self, x).float(), "output"),
    "input": (_changes, "input"),
    "random": (_draws, "random numbers"),
    "structure": (lambda self, x: (_same(self, x),), "structure"),
    "no gradient of its input": (lambda self, x: _same(self, x.detach()), "gradients"),
    "error": (lambda self, x: 1 // 0, "ZeroDivisionError"),
    "argument's name": (lambda self, hidden: _same(self, hidden), "TypeError"),
}


@pytest.mark.parametrize("how", DIFFERENT)
def test_different_module_is_left(gated, how):
    forward, part = DIFFERENT[how]
    model = gated(forward)
    with pytest.warns(ChangedModuleWarning, match="SwiGLU of timm"):
        report = evakernels.accelerate(model)
    assert [left.name for left in report.changed] == ["0", "1"]
    assert part in report.changed[0].reason
    assert [type(module) for module in model] == [SwiGLU, SwiGLU]


def _mixed(self, x):
    return self.fc2(self.act(self.fc1(x - x.mean(1, keepdim=True))))


PATCHES = {
    "helper of a helper": ("eva02", "timm.layers.pos_embed_sincos.rot", lambda x: x, "EvaAttention"),
    "method of a tower": (
        "vit",
        VisionTransformer,
        ("pool", lambda self, x, pool_type=None: x.mean(1)),
        "VisionTransformer",
    ),
    "text tower": ("open-clip", CLIP, ("encode_text", lambda self, text, normalize=False: text.float()), "CLIP"),
    "MLP that mixes tokens": ("vit", Mlp, ("forward", _mixed), "VisionTransformer"),
    "child that a step reads": ("vit", LayerScale, ("forward", lambda self, x: x), "LayerScale"),
}


@pytest.mark.parametrize("how", PATCHES)
def test_patched_code_is_noticed(how, monkeypatch):
    """Also after an unpatched module was accepted."""
    name, target, patch, left = PATCHES[how]
    family = FAMILIES[name]
    model = family.build()
    model.global_pool = "token"
    assert left not in {
        entry.module for entry in evakernels.accelerate(copy.deepcopy(model), strict=True, force=True).left
    }
    if isinstance(target, str):
        monkeypatch.setattr(target, patch)
    else:
        monkeypatch.setattr(target, *patch)
    swapped = copy.deepcopy(model)
    with pytest.warns(ChangedModuleWarning):
        report = evakernels.accelerate(swapped, force=True)
    assert left in {entry.module for entry in report.changed}
    inputs = family.inputs(1)
    outs = [m.eval()(**inputs) for m in (swapped, model)]
    close(*(out[:2] if isinstance(out, tuple) else (out,) for out in outs))


@pytest.mark.parametrize(("strict", "error"), [(True, RuntimeError), (False, ChangedModuleWarning)])
def test_strict_or_warning_as_error_changes_nothing(gated, strict, error):
    model = gated(lambda self, x: 2 * _same(self, x))
    model.append(nn.LayerNorm(8))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match="SwiGLU of timm"):
            evakernels.accelerate(model, strict=strict, force=True)
    assert _is_left(model)


class Scaled(nn.LayerNorm):
    """A norm with a factor in a buffer, an attribute or a list of attributes."""

    def __init__(self, kind, factor):
        super().__init__(64)
        self.kind = kind
        if kind == "buffer":
            self.register_buffer("factor", torch.tensor(factor))
        elif kind == "integer buffer":
            self.register_buffer("factor", torch.tensor([int(factor)]))
        elif kind == "tensor":
            self.factor = torch.tensor(factor)
        elif kind == "function":
            self.function = (lambda y: 3 * y) if factor == 3.0 else (lambda y: y)
        else:
            self.factor = {"of": {"which": [factor]}} if kind == "nested" else factor

    def forward(self, input):
        y = super().forward(input)
        if self.kind == "function":
            return self.function(y)
        return y * (self.factor["of"]["which"][0] if self.kind == "nested" else self.factor)


@pytest.mark.parametrize("kind", ["buffer", "integer buffer", "tensor", "function", "nested", "float"])
@pytest.mark.parametrize("factors", [(3.0, 1.0), (1.0, 3.0)])
def test_values_of_each_instance_are_compared(kind, factors):
    untouched, x = nn.Sequential(*(Scaled(kind, factor) for factor in factors)), torch.randn(8, 64)
    for model, own in zip(accelerated(untouched), untouched, strict=True):
        close(model(x), own(x))
        if kind in ("buffer", "tensor"):
            for norm in (model, own):
                norm.factor = torch.tensor(5.0)
            close(model(x), own(x))


def test_values_of_another_model_are_compared():
    for factor in (1, 3):
        untouched, x = Scaled("integer buffer", factor), torch.randn(8, 64)
        close(accelerated(untouched)(x), untouched(x))


def test_table_of_another_layout_is_left():
    family, untouched = FAMILIES["eva02"], FAMILIES["eva02"].build()
    untouched.blocks[1].attn.rotate_half = True  # the table stays interleaved
    model = copy.deepcopy(untouched)
    report = evakernels.accelerate(model, force=True)
    assert "blocks.1.attn" in {left.name for left in report.left}
    assert "blocks.0.attn" in {done.name for done in report.replaced}
    close(run(family, model, 1), run(family, untouched, 1))


# --- what comparisons leave alone -------------------------------------------------------------------------------------


class _Observer(nn.LayerNorm):
    """Notes the state of the process while it is compared, drawing a random number or not."""

    states: ClassVar[list] = []
    draws = False

    def forward(self, input):
        self.states.append((torch.get_default_dtype(), torch.initial_seed()))
        y = super().forward(input)
        return y + 0 * torch.rand(1) if self.draws else y


@pytest.mark.parametrize("draws", [False, True])
def test_comparison_changes_no_default(draws, monkeypatch):
    monkeypatch.setattr(_Observer, "states", [])
    monkeypatch.setattr(_Observer, "draws", draws)
    torch.manual_seed(123)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        evakernels.accelerate(nn.Sequential(_Observer(64)), force=True)
    finally:
        torch.set_default_dtype(torch.float32)
    dtypes, seeds = zip(*_Observer.states, strict=True)
    assert set(dtypes) == {torch.float64}
    assert draws or set(seeds) == {123}  # a module that draws can only use the default generator
    assert torch.equal(torch.get_rng_state(), state)


def test_comparison_leaves_other_threads_alone():
    """A small call of another model runs its own code while modules are compared."""
    other = nn.Sequential(nn.GELU())
    evakernels.accelerate(other)
    seen = []

    def ops_of_other():
        with log_ops() as ops:
            other(torch.zeros(1, 8))
        return ops

    class Last(nn.Linear):
        def forward(self, x):
            thread = threading.Thread(target=lambda: seen.append(ops_of_other()))
            thread.start(), thread.join()
            return super().forward(x)

    expected, mlp = ops_of_other(), SwiGLU(8, 12)
    mlp.fc2 = Last(12, 8)
    evakernels.accelerate(mlp)
    assert seen
    assert all(ops == expected for ops in seen)


def test_other_models_keep_their_fused_steps(monkeypatch):
    """Only modules that behave differently are called; all others are fused, in whatever order models come."""
    family, own = FAMILIES["vit"], LayerScale.forward
    monkeypatch.setattr(LayerScale, "forward", lambda self, x: own(self, x) * (2 if hasattr(self, "twice") else 1))
    first, changed = family.build(), family.build()
    changed.blocks[0].ls1.twice = True
    untouched = copy.deepcopy(changed)
    evakernels.accelerate(first, force=True)
    ops = ops_of(family, first)
    with pytest.warns(ChangedModuleWarning, match="LayerScale of timm"):
        report = evakernels.accelerate(changed, force=True)
    assert [left.name for left in report.changed] == ["blocks.0.ls1"]
    assert ops_of(family, first) == ops
    evakernels.accelerate(family.build(), force=True)
    for model in (changed, copy.deepcopy(changed)):
        close(run(family, model, 1), run(family, untouched, 1))
    evakernels.restore(changed)
    assert [vars(a).keys() for a in changed.modules()] == [vars(b).keys() for b in untouched.modules()]


# --- classes that no replacement names --------------------------------------------------------------------------------


def test_subclass_is_compared():
    class Mine(SwiGLU):
        forward = _same

    class Doubled(SwiGLU):
        def forward(self, x):
            return 2 * _same(self, x)

    model = nn.Sequential(Mine(8, 12), Doubled(8, 12))
    report = evakernels.accelerate(model, strict=True)  # it isn't the library's
    assert [left.name for left in report.left if left.name in "01"] == ["1"]
    assert isinstance(model[0], _swap.AcceleratedModule)
    assert type(model[1]) is Doubled


@pytest.mark.parametrize(("factor", "count"), [(1, 1), (2, 0)])
def test_class_with_the_same_attributes_is_compared(factor, count):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 12), nn.Linear(8, 12), nn.Linear(12, 8)
            self.act_fn = nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * factor

    report = evakernels.accelerate(nn.Sequential(Gated()), strict=True)
    assert [done.module for done in report.replaced].count("Gated") == count
    assert "Gated" not in {left.module for left in report.left}


# --- arguments --------------------------------------------------------------------------------------------------------


def test_unknown_argument_runs_the_original(gated):
    def forward(self, x, factor=1.0, **options):
        return _same(self, x) * factor * options.get("more", 1.0)

    model = gated(forward)
    report = evakernels.accelerate(model, force=True)
    assert "SwiGLU" in _replaced(report)
    mlp, untouched, x = model[0], copy.deepcopy(model[0]), torch.randn(2, 3, 8)
    evakernels.restore(untouched)
    for args, options in (((x,), {}), ((x, 2.0), {}), ((x,), {"factor": 3.0}), ((x,), {"more": 3.0}), ((), {"x": x})):
        close(mlp(*args, **options), untouched(*args, **options))
    with log_ops() as ops:
        mlp(x, factor=1.0)
    assert "swiglu" in ops
    with log_ops() as ops:
        mlp(x, factor=2.0)
    assert "swiglu" not in ops


GATED = {
    "timm": lambda: SwiGLU(8, 12, norm_layer=nn.LayerNorm),
    "packed": lambda: SwiGLUPacked(8, 24, bias=False),
    "gate-last": lambda: GluMlp(8, 24, act_layer=nn.SiLU),
    "llama": lambda: LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2)),
}


@pytest.mark.parametrize("name", GATED)
def test_padded_mlp_keeps_results_and_state(name, monkeypatch):
    monkeypatch.setenv("EVAKERNELS_PAD_HIDDEN", "1")
    mlp, x = GATED[name](), torch.randn(2, 3, 8)
    untouched, state = copy.deepcopy(mlp), {key: value.shape for key, value in mlp.state_dict().items()}
    evakernels.accelerate(mlp, force=True)
    with log_ops() as ops:
        close(mlp(x), untouched(x))
    for model in (mlp, untouched):
        model(x).square().sum().backward()
    close([p.grad for p in mlp.parameters()], [p.grad for p in untouched.parameters()])
    with torch.no_grad():
        close(mlp(x), untouched(x))
    assert "swiglu_mlp" in ops
    assert {key: value.shape for key, value in mlp.state_dict().items()} == state


# --- what counts -----------------------------------------------------------------------------------------------------


def test_block_counts_if_its_attention_was_replaced():
    build = FAMILIES["vit"].build
    assert evakernels.accelerate(build(), include="*.mlp.fc1").headline.startswith("0 of 2 blocks, ")
    assert evakernels.accelerate(build(), include="Attention", force=True).headline.startswith("2 of 2 blocks, 2 of ")
    report = evakernels.accelerate(build(), include="blocks.0", exclude="blocks.0.*")
    assert report.headline == f"1 of 2 blocks, 1 of {1 + len(report.left)} modules"


def test_unsupported_attention_is_reported():
    report = evakernels.accelerate(FAMILIES["relative"].build())
    told = {(left.name, left.module) for left in report.left if left.reason == "not supported"}
    assert told == {(f"blocks.{number}.attn", "RelPosAttention") for number in range(2)}


# --- transformers' own interface -------------------------------------------------------------------------------------


def test_attention_interface_dispatches_to_op(monkeypatch):
    own = CLIPAttention.forward
    code = own.__code__.replace(co_name="later")
    monkeypatch.setattr(CLIPAttention, "forward", type(own)(code, own.__globals__, "later", own.__defaults__))
    family, untouched = FAMILIES["clip"], FAMILIES["clip"].build()
    model = copy.deepcopy(untouched)
    report = evakernels.accelerate(model, include="CLIPAttention", strict=True, force=True)
    assert report.headline.startswith("4 of 4 blocks, 4 of ")
    assert ops_of(family, model) == {"rope_attention"}
    close(run(family, model, 1), run(family, untouched, 1))
    assert ops_of(family, untouched) == set()


def test_options_that_the_op_lacks_run_own_code():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    untouched = LlamaModel(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50)).eval()
    model = accelerated(untouched, include="LlamaAttention")
    ids, mask = torch.randint(3, 49, (2, 6)), torch.ones(2, 6, dtype=torch.long)
    with log_ops() as ops:
        close(model(ids).last_hidden_state, untouched(ids).last_hidden_state)
    assert ops == {"rope_attention"}
    mask[0, 4:] = 0
    for options in ({"attention_mask": mask}, {"attention_mask": torch.zeros(2, 1, 6, 6)}):
        with log_ops() as ops:
            close(model(ids, **options).last_hidden_state, untouched(ids, **options).last_hidden_state)
        assert ops == set()
    cache = [m(ids, use_cache=True).past_key_values for m in (model, untouched)]  # one query, seven keys
    steps = [m(ids[:, :1], past_key_values=c) for m, c in zip((model, untouched), cache, strict=True)]
    close(steps[0].last_hidden_state, steps[1].last_hidden_state)


@pytest.mark.parametrize("name", ["clip", "dinov3-vit"])
def test_attention_of_another_implementation_is_left(name):
    model = FAMILIES[name].build()
    model.set_attn_implementation("eager")
    report = evakernels.accelerate(model, force=True)
    assert "its attn_implementation is eager, not sdpa" in {left.reason for left in report.left}
    assert "rope_attention" not in {done.op for done in report.replaced}


def test_other_registered_attention_stays():
    before = AttentionInterface().get("sdpa")
    AttentionInterface.register("sdpa", lambda *args, **options: before(*args, **options))
    try:
        report = evakernels.accelerate(FAMILIES["clip"].build(), force=True)
    finally:
        AttentionInterface.register("sdpa", before)
    assert "CLIPAttention" not in {done.module for done in report.replaced}


def test_restore_of_the_last_model_releases_sdpa():
    models = [FAMILIES["clip"].build() for _ in range(2)]
    gc.collect()
    evakernels.restore(models[0])  # what other tests left
    own = AttentionInterface().get("sdpa")
    assert own.__module__.startswith("transformers.")
    for model in models:
        evakernels.accelerate(model, force=True)
    copied = copy.deepcopy(models[0])
    for model in (*models, copied):
        assert AttentionInterface().get("sdpa") is not own
        evakernels.restore(model)
    assert AttentionInterface().get("sdpa") is own


def test_replaced_class_is_freed_with_its_modules():
    class Mine(nn.LayerNorm):
        pass

    model = nn.Sequential(Mine(8))
    evakernels.accelerate(model, force=True)
    replaced = weakref.ref(type(model[0]))
    assert issubclass(replaced(), Mine)
    evakernels.restore(model)
    gc.collect()
    assert replaced() is None
