"""Modules whose source reads in no known way, as that of a library's next release may."""

import copy
import pickle
import re
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from dropin_families import FAMILIES, close
from dropin_family import gradients, log_ops, ops_of, run
from timm.layers import AttentionRope, LayerScale, SwiGLU
from timm.models.eva import EvaAttention, EvaBlock
from torch import nn
from transformers import AttentionInterface, LlamaConfig, LlamaModel
from transformers.models.clip.modeling_clip import CLIPAttention

import evakernels
from evakernels import UnknownFormWarning
from evakernels.dropin import _serve, _swap, _verify
from evakernels.dropin._rule import prepare


def _same(self, x):
    """Another source that does the same."""
    hidden = F.silu(self.fc1_g(x)) * self.fc1_x(x)
    return self.drop2(self.fc2(self.norm(self.drop1(hidden))))


@pytest.fixture
def gated(monkeypatch):
    """Two MLPs of timm's, as a later release could have them: the function takes the forward."""

    def build(forward):
        monkeypatch.setattr(SwiGLU, "forward", forward)
        return nn.Sequential(SwiGLU(8, 12), SwiGLU(8, 12)).eval()

    return build


def _classes(model):
    return [type(module) for module in model.modules()]


def _is_left(model):
    return not any(isinstance(module, _swap.Swapped) for module in model.modules())


# --- by default ------------------------------------------------------------------------------------------------------


@pytest.fixture
def later_attention(monkeypatch):
    """timm's EVA with an attention that reads differently and does the same."""
    own = EvaAttention.forward

    def forward(self, *args, **options):
        return own(self, *args, **options)

    monkeypatch.setattr(EvaAttention, "forward", forward)
    return FAMILIES["eva02"].build()


def test_what_is_unknown_is_left_with_a_warning(later_attention):
    with pytest.warns(UnknownFormWarning, match="0 of 2 blocks, .*: timm .*EvaAttention.forward reads differently"):
        report = evakernels.accelerate(later_attention)
    first = str(report).splitlines()[0]
    assert re.match(r"0 of 2 blocks, \d+ of \d+ modules: timm 1\.", first)
    assert first.endswith('is unknown; unknown="verify" tries by behaviour')
    assert {left.name for left in report.unknown} == {"blocks.0.attn", "blocks.1.attn"}
    assert type(later_attention.blocks[0].attn) is EvaAttention
    assert isinstance(later_attention.blocks[0], _swap.Swapped)


def test_what_is_known_is_counted_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, count in (("eva02", "2 of 2"), ("clip", "4 of 4"), ("open-clip", "4 of 4")):
            assert str(evakernels.accelerate(FAMILIES[name].build())).splitlines()[0].startswith(f"{count} blocks, ")


def test_the_warning_can_be_filtered(gated):
    model = gated(_same)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("ignore", UnknownFormWarning)
        evakernels.accelerate(model)
    assert seen == []


@pytest.mark.parametrize("unknown", ["skip", "verify"])
def test_strict_raises_and_changes_nothing(gated, unknown):
    model = gated(lambda self, x: 2 * _same(self, x))
    model.append(nn.LayerNorm(8))
    with pytest.raises(RuntimeError, match=r"accelerate: \d of \d modules: timm .* is unknown.*SwiGLU.forward reads"):
        evakernels.accelerate(model, unknown=unknown, strict=True, force=True)
    assert _is_left(model)


def test_a_warning_that_is_an_error_changes_nothing(gated):
    model = gated(_same)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnknownFormWarning):
            evakernels.accelerate(model, force=True)
    assert _is_left(model)


def test_an_error_half_way_changes_nothing(monkeypatch):
    model, calls = FAMILIES["eva02"].build(), []
    classes, set_class = _classes(model), _swap.set_class

    def fails_late(module, cls):
        calls.append(cls)
        if len(calls) == 5:
            raise MemoryError
        set_class(module, cls)

    monkeypatch.setattr(_swap, "set_class", fails_late)
    with pytest.raises(MemoryError):
        evakernels.accelerate(model)
    assert _classes(model) == classes


def test_only_the_two_answers_are_taken():
    with pytest.raises(ValueError, match='accelerate: unknown=\'try\'; accepted: "skip", "verify"'):
        evakernels.accelerate(nn.Linear(2, 2), unknown="try")


# --- tried by behaviour ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("everything_served")
def test_what_behaves_equally_is_taken(later_attention):
    family, untouched = FAMILIES["eva02"], copy.deepcopy(later_attention)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = evakernels.accelerate(later_attention, unknown="verify", strict=True)
    assert re.fullmatch(r"2 of 2 blocks, \d+ of \d+ modules, 2 by behaviour", report.headline)
    assert [done.name for done in report.replaced if done.verified] == ["blocks.0.attn", "blocks.1.attn"]
    assert ops_of(family, later_attention) >= {"rope_attention", "add_layer_norm", "swiglu"}
    close(run(family, later_attention, 1), run(family, untouched, 1))
    expected = gradients(family, untouched, 2)
    for key, gradient in gradients(family, later_attention, 2).items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-4)


def test_what_was_taken_stays_so_in_copies_and_later_calls(gated):
    model = gated(_same)
    first = evakernels.accelerate(model, unknown="verify", force=True)
    assert sum(done.verified for done in first.replaced) == 2
    classes = _classes(model)
    assert evakernels.accelerate(model).replaced == first.replaced
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert _classes(other) == classes
    assert evakernels.restore(model) > 0
    assert type(model[0]) is SwiGLU


def _returns_float(self, x):
    return _same(self, x).float()


def _changes(self, x):
    y = _same(self, x)
    x.data.add_(1)
    return y


def _draws(self, x):
    torch.rand(1)
    return _same(self, x)


def _raises(self, x):
    raise ValueError("later")


def _scaled_if(condition):
    return lambda self, x: _same(self, x) * (1.5 if condition(self, x) else 1.0)


DIFFERENT = {
    "output": (lambda self, x: 1.0001 * _same(self, x), "its output differs in float32"),
    "form": (lambda self, x: (_same(self, x),), "the form of its output differs in float32"),
    "gradient": (lambda self, x: 2 * _same(self, x) - _same(self, x).detach(), "its gradients differ in float32"),
    "no gradient of its input": (lambda self, x: _same(self, x.detach()), "its gradients differ in float32"),
    "training": (_scaled_if(lambda self, x: self.training), "its output differs in float32 in training"),
    "evaluation": (_scaled_if(lambda self, x: not self.training), "its output differs in float32$"),
    "no graph": (_scaled_if(lambda self, x: not torch.is_grad_enabled()), "its output differs in float32"),
    "float64": (_scaled_if(lambda self, x: x.dtype == torch.float64), "its output differs in float64"),
    "bfloat16": (_scaled_if(lambda self, x: x.dtype == torch.bfloat16), "its output differs in bfloat16"),
    "float16": (_scaled_if(lambda self, x: x.dtype == torch.float16), "its output differs in float16"),
    "autocast": (_scaled_if(lambda self, x: torch.is_autocast_enabled("cpu")), "its output differs .* under autocast"),
    "dtype": (_returns_float, "the dtype or shape of its output differs in float64"),
    "input": (_changes, "what it makes of its input differs in float32"),
    "random": (_draws, "the random numbers that it draws differ in float32"),
    "error": (_raises, "its own code raises ValueError: later"),
}


@pytest.mark.parametrize("how", DIFFERENT)
def test_what_behaves_differently_is_refused(gated, how):
    forward, reason = DIFFERENT[how]
    model = gated(forward)
    with pytest.warns(UnknownFormWarning, match="is unknown and behaves differently"):
        report = evakernels.accelerate(model, unknown="verify")
    assert len(report.unknown) == 2
    assert re.search(f"tried: {reason}", report.unknown[0].reason), report.unknown[0].reason
    assert [type(module) for module in model] == [SwiGLU, SwiGLU]


def test_trying_leaves_the_model_and_the_random_numbers_alone(gated):
    model = gated(_same)
    called = []
    model[0].register_forward_hook(lambda *args: called.append(args))
    values, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    evakernels.accelerate(model, unknown="verify")
    assert called == []
    assert not model.training
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_modules_that_are_built_alike_are_tried_once(gated, monkeypatch):
    tried, difference = [], _verify._difference
    monkeypatch.setattr(_verify, "_difference", lambda *args: tried.append(args[0]) or difference(*args))
    model = gated(_same).extend([SwiGLU(8, 16)])
    evakernels.accelerate(model, unknown="verify")
    assert sorted(module.fc2.in_features for module in tried) == [12, 16]


def test_a_model_on_meta_is_tried_with_values_of_its_copy(gated):
    model = gated(_same).to("meta")
    assert [done.module for done in evakernels.accelerate(model, unknown="verify").replaced].count("SwiGLU") == 2
    assert all(p.is_meta for p in model.parameters())


def test_a_subclass_is_tried_too():
    class Mine(SwiGLU):
        forward = _same

    class Doubled(SwiGLU):
        def forward(self, x):
            return 2 * _same(self, x)

    model = nn.Sequential(Mine(8, 12), Doubled(8, 12))
    report = evakernels.accelerate(model)
    assert [left.reason for left in report.left if left.name in "01"] == ["a subclass of SwiGLU changed it"] * 2
    assert report.unknown == []  # it isn't the library's
    evakernels.accelerate(model, unknown="verify")
    assert isinstance(model[0], _swap.Swapped)
    assert type(model[1]) is Doubled


def test_what_the_op_lacks_is_not_tried(gated):
    model = nn.Sequential(SwiGLU(8, 12, act_layer=nn.ReLU))
    gated(_same)
    with pytest.warns(UnknownFormWarning):
        report = evakernels.accelerate(model, unknown="verify")
    assert report.unknown[0].reason.endswith("tried: its activation is ReLU")


@pytest.mark.parametrize(("forward", "taken"), [(lambda self, x: self.gamma * x, True), (lambda self, x: x, False)])
def test_children_that_a_step_reads_are_tried_as_well(monkeypatch, forward, taken):
    prepare()
    monkeypatch.delitem(_serve.ROLES, LayerScale)
    monkeypatch.setattr(LayerScale, "forward", forward)
    model = FAMILIES["vit"].build()
    with pytest.warns(UnknownFormWarning, match=r"0 of 2 blocks, .*: timm .*LayerScale.forward reads differently"):
        assert {left.module for left in evakernels.accelerate(model).unknown} == {"LayerScale"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = evakernels.accelerate(model, unknown="verify")
    assert (LayerScale in _serve.ROLES) == taken == (report.unknown == [])
    monkeypatch.setitem(_serve.ROLES, LayerScale, "layer_scale")


def test_a_class_that_moved_is_known_by_its_name_and_form(monkeypatch):
    model = FAMILIES["eva02"].build()
    monkeypatch.delattr(sys.modules["timm.models.eva"], "EvaBlock")
    report = evakernels.accelerate(model)
    assert [done.module for done in report.replaced].count(EvaBlock.__name__) == 2


@pytest.fixture
def rename(monkeypatch):
    """Gives a class another name, and perhaps another file, as a later release could."""
    before = []

    def renamed(cls, name, file=None):
        before.append((cls, cls.__name__, cls.__module__))
        monkeypatch.delattr(sys.modules[cls.__module__], cls.__name__)
        cls.__name__, cls.__module__ = name, file or cls.__module__

    yield renamed
    for cls, *names in before:
        cls.__name__, cls.__module__ = names


@pytest.mark.parametrize("unknown", ["skip", "verify"])
def test_a_class_that_has_another_name_is_not_passed_over(rename, unknown):
    model = FAMILIES["eva02-packed"].build()
    rename(EvaBlock, "EvaLayer")
    rename(EvaAttention, "EvaSelfAttention")
    with pytest.warns(
        UnknownFormWarning, match=r"0 of 2 blocks, .*: timm .* is unknown \(.*there is no timm.models.eva"
    ):
        report = evakernels.accelerate(model, unknown=unknown)
    assert {"EvaLayer", "EvaSelfAttention"} <= {left.module for left in report.unknown}
    assert {"GluMlp"} <= {done.module for done in report.replaced}
    with pytest.raises(RuntimeError, match=r"accelerate: 0 of 2 blocks.*there is no timm.models.eva.Eva"):
        evakernels.accelerate(model, unknown=unknown, strict=True)


def test_an_attention_that_has_another_name_in_another_file_is_not_passed_over(rename):
    model = FAMILIES["perception-encoder"].build()
    rename(AttentionRope, "RotaryAttention", "timm.layers.rotary")
    with pytest.raises(
        RuntimeError, match=r"accelerate: 0 of 2 blocks.*there is no timm.layers.attention.AttentionRope"
    ):
        evakernels.accelerate(model, strict=True)


def test_a_class_of_another_name_that_keeps_the_old_one_is_known(rename, monkeypatch):
    model = FAMILIES["eva02"].build()
    rename(EvaBlock, "EvaLayer")
    monkeypatch.setattr("timm.models.eva.EvaBlock", EvaBlock, raising=False)
    assert "EvaLayer" in {done.module for done in evakernels.accelerate(model, strict=True).replaced}


def test_models_without_what_is_gone_are_known(rename):
    rename(EvaBlock, "EvaLayer")
    rename(EvaAttention, "EvaSelfAttention")
    assert evakernels.accelerate(FAMILIES["vit"].build(), strict=True).headline.startswith("2 of 2 blocks")


# --- what counts -----------------------------------------------------------------------------------------------------


def test_a_block_counts_if_it_or_its_attention_was_replaced():
    build = FAMILIES["vit"].build
    assert evakernels.accelerate(build(), include="*.mlp.fc1").headline.startswith("0 of 2 blocks, ")
    assert evakernels.accelerate(build(), include="Attention", force=True).headline.startswith("2 of 2 blocks, 2 of ")
    report = evakernels.accelerate(build(), include="blocks.0", exclude="blocks.0.*")
    assert report.headline == f"1 of 2 blocks, 1 of {1 + len(report.left)} modules"


def test_an_attention_without_a_rule_is_told():
    report = evakernels.accelerate(FAMILIES["relative"].build())
    told = {(left.name, left.module) for left in report.left if left.reason == "no rule is for it"}
    assert told == {(f"blocks.{number}.attn", "RelPosAttention") for number in range(2)}


# --- transformers' own interface -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("everything_served")
def test_attention_behind_the_interface_needs_no_known_form(monkeypatch):
    own = CLIPAttention.forward
    code = own.__code__.replace(co_name="later")
    monkeypatch.setattr(CLIPAttention, "forward", type(own)(code, own.__globals__, "later", own.__defaults__))
    family, untouched = FAMILIES["clip"], FAMILIES["clip"].build()
    model = copy.deepcopy(untouched)
    report = evakernels.accelerate(model, include="CLIPAttention", strict=True)
    assert report.headline.startswith("4 of 4 blocks, 4 of ")
    assert ops_of(family, model) == {"rope_attention"}
    close(run(family, model, 1), run(family, untouched, 1))
    assert ops_of(family, untouched) == set()


def test_what_the_op_lacks_runs_the_librarys_own_code():
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = LlamaModel(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50)).eval()
    untouched = copy.deepcopy(model)
    evakernels.accelerate(model, force=True, include="LlamaAttention")
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


def test_what_somebody_else_has_registered_stays():
    before = AttentionInterface().get("sdpa")
    AttentionInterface.register("sdpa", lambda *args, **options: before(*args, **options))
    try:
        report = evakernels.accelerate(FAMILIES["clip"].build(), force=True)
    finally:
        AttentionInterface.register("sdpa", before)
    assert "CLIPAttention" not in {done.module for done in report.replaced}
