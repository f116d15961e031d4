"""What a swapped module keeps: names, values, hooks, and everything that torch does with modules."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from dropin_families import FAMILIES
from dropin_family import gradients, ops_of, run
from timm.models.eva import Eva, EvaAttention, EvaBlock
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.func import functional_call, vmap
from torch.utils.checkpoint import checkpoint

import evakernels
from evakernels.dropin import Report, _form, _gate

SOME = ["eva02", "dinov3", "vit"]
some_families = pytest.mark.parametrize("name", SOME)
everything_served = pytest.mark.usefixtures("everything_served")


def _pair(name):
    family = FAMILIES[name]
    untouched = family.build()
    model = copy.deepcopy(untouched)
    evakernels.accelerate(model)
    return family, model, untouched


def _classes(model):
    return [type(module) for module in model.modules()]


def _close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


# --- what is kept and what comes back -------------------------------------------------------------------------------


@some_families
def test_the_state_dict_is_the_same_before_and_after(name):
    _, model, untouched = _pair(name)
    before, after = untouched.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    untouched.load_state_dict(after, strict=True)
    model.load_state_dict(before, strict=True)
    assert repr(model) == repr(untouched)


def test_modules_and_parameters_stay_the_same_objects():
    model = FAMILIES["eva02"].build()
    modules, parameters = list(model.modules()), list(model.parameters())
    evakernels.accelerate(model)
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert isinstance(model.blocks[0], EvaBlock)
    assert isinstance(model.blocks[0].attn.proj, nn.Linear)


@everything_served
@some_families
def test_restore_takes_it_back(name):
    family, model, untouched = _pair(name)
    changed = sum(a is not b for a, b in zip(_classes(model), _classes(untouched), strict=True))
    assert evakernels.restore(model) == changed > 0
    assert _classes(model) == _classes(untouched)
    assert ops_of(family, model) == set()
    assert torch.equal(run(family, model, 1), run(family, untouched, 1))
    assert evakernels.restore(model) == 0


def test_a_second_call_changes_nothing_and_reports_the_same():
    model = FAMILIES["eva02"].build()
    first, classes = evakernels.accelerate(model), _classes(model)
    assert evakernels.accelerate(model) == first
    assert _classes(model) == classes


@everything_served
@some_families
def test_a_copy_and_a_pickle_run_on_the_ops_too(name):
    family, model, _ = _pair(name)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    expected = run(family, model, 1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert _classes(other) == _classes(model)
        assert torch.equal(run(family, other, 1), expected)
        assert ops_of(family, other) == ops_of(family, model)


@everything_served
def test_a_copy_is_changed_on_its_own():
    _, model, _ = _pair("eva02")
    classes = _classes(model)
    evakernels.restore(copy.deepcopy(model))
    assert _classes(model) == classes


# --- what torch does with modules -----------------------------------------------------------------------------------


@everything_served
@some_families
def test_a_model_may_change_its_dtype_afterwards(name):
    family, model, untouched = _pair(name)
    _close(run(family, model.half().float(), 1), run(family, untouched.half().float(), 1))
    inputs = {key: value.double() for key, value in family.inputs(1).items()}
    model, untouched = model.double(), untouched.double()
    torch.manual_seed(0)
    assert torch.equal(family.features(model, inputs), family.features(untouched, inputs))


def test_a_model_may_move_to_another_device():
    _, model, _ = _pair("eva02")
    model = model.to("meta")
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 5)


@everything_served
@some_families
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_it_compiles_without_a_graph_break(name, training):
    """Patches and paths are not dropped: compiled code draws other numbers."""
    torch._dynamo.reset()
    family, model, _ = _pair(name)
    for module in model.modules():
        for rate in ("prob", "drop_prob"):
            if hasattr(module, rate):
                setattr(module, rate, 0.0)
    model.train(training)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs = family.inputs(1)
    expected, actual = model(**inputs), compiled(**inputs)
    _close(actual, expected)
    assert ops_of(family, model) >= {"rope_attention", "add_layer_norm"}
    if training:
        _close(torch.autograd.grad(actual.sum(), model.cls_token), torch.autograd.grad(expected.sum(), model.cls_token))


@everything_served
@some_families
def test_it_compiles_with_everything_dropped_too(name):
    torch._dynamo.reset()
    family, model, _ = _pair(name)
    torch.compile(model.train(), fullgraph=True, backend="aot_eager")(**family.inputs(1)).sum().backward()


@everything_served
@some_families
def test_under_autocast_the_result_is_that_of_the_untouched_model(name):
    family, model, untouched = _pair(name)
    exact = run(family, untouched, 1)
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = run(family, model, 1), run(family, untouched, 1)
    assert ours.dtype == theirs.dtype
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


@everything_served
@some_families
def test_checkpointing_gives_the_same_gradients(name):
    family, model, _ = _pair(name)
    expected = gradients(family, model.train(), 3)
    model.set_grad_checkpointing(True)
    actual = gradients(family, model, 3)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@everything_served
def test_a_block_under_torchs_checkpoint():
    _, model, _ = _pair("vit")
    x = torch.randn(2, 17, 64, requires_grad=True)
    block = model.blocks[0]
    whole = torch.autograd.grad(block(x).sum(), x)
    assert torch.equal(torch.autograd.grad(checkpoint(block, x, use_reentrant=False).sum(), x)[0], whole[0])


@everything_served
def test_transforms_and_tracers_see_the_untouched_code():
    family, model, untouched = _pair("eva02")
    x = family.inputs(1)["x"]
    parameters = dict(model.named_parameters())
    _close(vmap(lambda one: functional_call(model, parameters, (one[None],))[0])(x), untouched(x))
    _close(torch.jit.trace(model, x, check_trace=False)(x), untouched(x))


def test_torchscript_asks_for_the_restored_model():
    _, model, _ = _pair("vit")
    with pytest.raises(RuntimeError, match=r"call evakernels.restore\(model\) first"):
        torch.jit.script(model)
    evakernels.restore(model)
    torch.jit.script(model)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@everything_served
@some_families
@pytest.mark.parametrize("whole_blocks", [True, False], ids=["blocks", "every module"])
@pytest.mark.parametrize("first", ["shard", "accelerate"])
def test_fsdp2_before_and_after(name, whole_blocks, first, one_process):
    # Only a call of the model itself gathers its parameters.
    family = dataclasses.replace(FAMILIES[name], features=lambda model, inputs: model(**inputs))
    untouched = family.build()
    model = copy.deepcopy(untouched)

    def shard():
        for block in model.blocks:
            for module in () if whole_blocks else (block.norm2, block.attn.proj, block.mlp):
                fully_shard(module)
            fully_shard(block)
        fully_shard(model)

    steps = [shard, lambda: evakernels.accelerate(model)]
    for step in steps if first == "shard" else reversed(steps):
        step()
    assert isinstance(model.blocks[0], FSDPModule)
    assert type(model.blocks[0]).__name__ == "FSDP" + type(untouched.blocks[0]).__name__
    _close(run(family, model, 1), run(family, untouched, 1))
    expected = gradients(family, untouched.train(), 2)
    actual = {key: value.full_tensor() for key, value in gradients(family, model.train(), 2).items()}
    largest = max(float(g.abs().max()) for g in expected.values())
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-4, atol=1e-5 * largest)
    assert "rope_attention" in ops_of(family, model)
    evakernels.restore(model)
    assert isinstance(model.blocks[0], FSDPModule)
    assert ops_of(family, model) == set()
    _close(run(family, model, 1), run(family, untouched, 1).detach())


# --- children that somebody watches or has replaced -----------------------------------------------------------------


@everything_served
@pytest.mark.parametrize("path", ["blocks.1.norm2", "blocks.1.mlp.norm", "blocks.1.drop_path1", "blocks.1.attn.proj"])
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
def test_a_hook_on_a_child_is_called(path, training):
    family, model, untouched = _pair("eva02")
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

    family, model, untouched = _pair("eva02")
    for m in (model, untouched):
        m.blocks[0].norm2, m.blocks[1].mlp.act, m.blocks[1].mlp.norm = Doubled(), nn.ReLU(), nn.Identity()
    _close(run(family, model, 1), run(family, untouched, 1))


@everything_served
def test_a_forward_of_its_own_is_called():
    family, model, _ = _pair("eva02")
    called = []
    norm = model.blocks[0].norm2
    norm.forward = lambda x: called.append(x) or F.layer_norm(x, (64,), norm.weight, norm.bias, norm.eps)
    run(family, model, 1)
    assert len(called) == 1


@everything_served
def test_what_the_op_does_not_have_runs_as_before():
    """A mask, dropout of the weights, attention that isn't fused."""
    _, model, untouched = _pair("eva02")
    x, mask = torch.randn(2, 17, 64), torch.randn(17, 17)
    rope = model.rope.get_embed()
    ours, theirs = model.blocks[0].attn, untouched.blocks[0].attn
    _close(ours(x, rope=rope, attn_mask=mask), theirs(x, rope=rope, attn_mask=mask))
    _close(ours(x, rope=rope, is_causal=True), theirs(x, rope=rope, is_causal=True))
    for attention in (ours, theirs):
        attention.attn_drop.p = 0.5
        attention.train()
    results = []
    for attention in (ours, theirs):
        torch.manual_seed(0)
        results.append(attention(x, rope=rope))
    _close(*results)


# --- what is left ---------------------------------------------------------------------------------------------------


def _reason(report, name):
    return next(left.reason for left in report.left if left.name == name)


def test_a_subclass_that_changes_a_module_is_left():
    class Mine(EvaAttention):
        def forward(self, x, rope=None, attn_mask=None, is_causal=False):
            return 0.5 * super().forward(x, rope, attn_mask, is_causal)

    model = FAMILIES["eva02"].build()
    model.blocks[0].attn.__class__ = Mine
    report = evakernels.accelerate(model)
    assert _reason(report, "blocks.0.attn") == "a subclass of EvaAttention changed it"
    assert type(model.blocks[0].attn) is Mine


def test_a_forward_set_on_a_module_is_left():
    model = FAMILIES["eva02"].build()
    model.blocks[0].attn.forward = lambda x, **_: x
    report = evakernels.accelerate(model)
    assert _reason(report, "blocks.0.attn") == "its forward was replaced"
    assert type(model.blocks[0].attn) is EvaAttention


@pytest.mark.parametrize("changed", ["forward", "helper"])
def test_a_library_that_reads_differently_is_left(changed, monkeypatch):
    def forward(self, x, rope=None, attn_mask=None, is_causal=False):
        return x

    if changed == "forward":
        monkeypatch.setattr(EvaAttention, "forward", forward)
    else:
        monkeypatch.setattr("timm.layers.pos_embed_sincos.rot", lambda x: x)
    model = FAMILIES["eva02"].build()
    report = evakernels.accelerate(model)
    assert "unknown version" in _reason(report, "blocks.0.attn")
    assert type(model.blocks[0].attn) is EvaAttention
    assert any(done.module == "EvaBlock" for done in report.replaced)


def test_options_that_the_forward_lacks_are_named():
    model = Eva(
        img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=4, qkv_fused=False, attn_type="rope", num_kv_heads=2
    )
    assert _reason(evakernels.accelerate(model), "blocks.0.attn") == "2 query heads share a key"
    norm = nn.LayerNorm((3, 4))
    assert _reason(evakernels.accelerate(norm), "") == "it normalises 2 dimensions"


def test_what_is_as_fast_in_torch_is_left_and_said():
    report = evakernels.accelerate(nn.Sequential(nn.LayerNorm(8), nn.GELU()))
    assert [left.reason for left in report.left] == [
        "its own float32 on cpu is as fast",
        "exact GELU: torch's own is as fast",
    ]
    assert report.replaced == []


def test_only_modules_are_taken():
    for function in (evakernels.accelerate, evakernels.restore):
        with pytest.raises(TypeError, match=r"model is a list; accepted: a torch.nn.Module"):
            function([])


def test_small_calls_run_the_untouched_code():
    family, model, _ = _pair("vit")
    assert ops_of(family, model) == set()
    assert not _gate.serves("attention", torch.zeros(1, 4, 8, dtype=torch.bfloat16))


# --- report and forms -----------------------------------------------------------------------------------------------


def test_the_report_is_a_table():
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
    header, *lines = str(report).splitlines()
    assert header.split() == ["module", "count", "now", "runs", "backend", "left", "because"]
    assert any(line.split()[:3] == ["EvaBlock", "2", "add_layer_norm"] for line in lines)
    assert str(Report()).split() == header.split()


def test_a_fingerprint_sees_code_only():
    same = 'def f(self, x: int) -> int:\n    """Doc."""\n    # comment\n    return x + 1\n'
    assert _form.fingerprint("    def f(self, x):\n        return x + 1") == _form.fingerprint(same)
    assert _form.fingerprint("def f(self, x):\n    return x + 2") != _form.fingerprint(same)
    assert _form.fingerprint(
        '    def f(self):\n        """Doc\nto the left."""\n        return 1'
    ) != _form.fingerprint(same)
    assert _form.fingerprint("@nodes\ndef f(self, x):\n    return x + 1") != _form.fingerprint(same)


def test_importing_the_library_imports_none_of_the_others():
    import subprocess
    import sys

    code = (
        "import sys, torch, evakernels\n"
        "evakernels.accelerate(torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)))\n"
        "print([m for m in ('timm', 'transformers', 'open_clip', 'rich') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
