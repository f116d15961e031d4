"""torch's features on accelerated models: a small model of each library and kind."""

import copy
import dataclasses
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from dropin_families import assert_same_gradients, close, pair
from dropin_family import gradients, log_ops, ops_of, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

import evakernels
from evakernels import backends

KINDS = (
    "eva02",
    "eva02-packed",
    "dinov3",
    "perception-encoder",
    "vit",
    "vit-swiglu",
    "open-clip",
    "open-clip-custom",
    "open-clip-eva",
    "clip",
    "siglip",
    "siglip2",
    "dinov3-vit",
    "llama",
)
BLOCKS = ("Block", "EncoderLayer", "DecoderLayer", "ViTLayer")

every_kind = pytest.mark.parametrize("name", KINDS)


def _pair(name):
    """The family, called as a user does it, an accelerated model and an untouched one."""
    family, model, untouched = pair(name)
    if hasattr(untouched, "forward_features"):
        family = dataclasses.replace(family, features=lambda model, inputs: model(**inputs))
    return family, model, untouched


def _blocks(model):
    return [module for module in model.modules() if type(module).__name__.endswith(BLOCKS)]


def _drop_nothing(model):
    """Compiled code draws other numbers."""
    for module in model.modules():
        for rate in ("prob", "drop_prob"):
            if hasattr(module, rate):
                setattr(module, rate, 0.0)


def _classes(model):
    return [type(module) for module in model.modules()]


def _fill(model, source):
    """With the parameters and buffers of `source`, those that no state dict has included."""
    with torch.no_grad():
        for new, old in (
            (model.named_parameters(), source.named_parameters()),
            (model.named_buffers(), source.named_buffers()),
        ):
            for (_, target), (_, value) in zip(new, old, strict=True):
                target.copy_(value)


# --- names, copies, pickles -----------------------------------------------------------------------------------------


@every_kind
def test_state_dict_is_unchanged(name):
    _, model, untouched = _pair(name)
    before, after = untouched.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    untouched.load_state_dict(after, strict=True)
    model.load_state_dict(before, strict=True)
    assert repr(model) == repr(untouched)


@every_kind
def test_restore_returns_untouched_model(name):
    family, model, untouched = _pair(name)
    changed = sum(a is not b for a, b in zip(_classes(model), _classes(untouched), strict=True))
    assert evakernels.restore(model) == changed > 0
    assert _classes(model) == _classes(untouched)
    assert ops_of(family, model) == set()
    assert torch.equal(run(family, model, 1), run(family, untouched, 1))
    assert evakernels.restore(model) == 0


@every_kind
def test_copy_and_pickle_run_on_the_ops(name):
    family, model, _ = _pair(name)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    expected, ops = run(family, model, 1), ops_of(family, model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)):
        assert _classes(other) == _classes(model)
        assert torch.equal(run(family, other, 1), expected)
        assert ops_of(family, other) == ops


# --- dtypes and devices ---------------------------------------------------------------------------------------------


@every_kind
def test_dtype_may_change_afterwards(name):
    family, model, untouched = _pair(name)
    close(run(family, model.half().float(), 1), run(family, untouched.half().float(), 1))
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in family.inputs(1).items()}
    model, untouched = model.double(), untouched.double()
    with log_ops() as ops:
        actual = family.features(model, inputs)
    assert torch.equal(actual, family.features(untouched, inputs))
    assert ops == set()


# SigLIP2 reads the shapes of its images, which have no values there, to place their embeddings.
@pytest.mark.parametrize("name", [name for name in KINDS if name != "siglip2"])
def test_fake_and_meta_tensors_run_own_code(name):
    """On meta, and fake ones of a CPU: the untouched code runs."""
    family, model, untouched = _pair(name)
    inputs = family.inputs(1)
    shape = family.features(untouched, inputs).shape
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, log_ops() as ops:
        out = family.features(model, {key: mode.from_tensor(value) for key, value in inputs.items()})
    assert (out.shape, out.device.type, ops) == (shape, "cpu", set())
    out = family.features(model.to("meta"), {key: value.to("meta") for key, value in inputs.items()})
    assert (out.shape, out.device.type) == (shape, "meta")


@every_kind
def test_model_built_on_meta_matches_untouched(name):
    family, _, untouched = _pair(name)
    model = copy.deepcopy(untouched).to("meta")
    report = evakernels.accelerate(model, force=True)
    assert not [left for left in report.left if "on meta" in left.reason]
    _fill(model.to_empty(device="cpu"), untouched)
    close(run(family, model, 1), run(family, untouched, 1))
    assert ops_of(family, model.train()) == family.ops


@every_kind
def test_autocast_matches_untouched(name):
    family, model, untouched = _pair(name)
    with torch.no_grad():
        exact = run(family, untouched, 1)
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = run(family, model, 1), run(family, untouched, 1)
    assert ours.dtype == theirs.dtype
    assert (ours - exact).norm() <= 1.5 * (theirs - exact).norm()


# --- compilers ------------------------------------------------------------------------------------------------------


# Compilation is slow: AOTAutograd runs for one model with a rotation and one without.
TRACED = ("eva02", "clip")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "eva02" else pytest.mark.exhaustive) for name in KINDS]
)
def test_training_compiles_without_graph_break(name):
    torch._dynamo.reset()
    family, model, _ = _pair(name)
    _drop_nothing(model.train())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if name in TRACED else "eager")
    expected = gradients(family, model, 1)
    actual = {key.removeprefix("_orig_mod."): value for key, value in gradients(family, compiled, 1).items()}
    assert_same_gradients(actual, expected)


@pytest.mark.parametrize("name", [pytest.param("eva02", marks=pytest.mark.exhaustive), "vit"])
def test_training_with_dropout_compiles(name):
    torch._dynamo.reset()
    family, model, _ = _pair(name)
    torch.compile(model.train(), fullgraph=True, backend="aot_eager")(**family.inputs(1)).sum().backward()


@pytest.mark.parametrize("called", [False, True], ids=["before", "after"])
def test_compiled_model_may_be_accelerated(called):
    torch._dynamo.reset()
    family, _, untouched = _pair("eva02")
    model = copy.deepcopy(untouched)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    if called:
        run(family, compiled, 1)
    evakernels.accelerate(model, force=True)
    ops = set()
    with torch.no_grad(), backends.observed_by(lambda op, backend: ops.add(op.removesuffix("_forward"))):
        actual = run(family, compiled, 1)
    assert {"rope_attention", "add_layer_norm", "swiglu"} <= ops
    close(actual, run(family, untouched, 1))


@pytest.mark.parametrize("name", ["eva02", "open-clip", "clip"])
def test_export_with_dynamic_batch_size(name):
    family, model, untouched = _pair(name)
    inputs = family.inputs(1)
    batches = {key: {0: torch.export.Dim.AUTO} for key in inputs}
    program = torch.export.export(model, (), inputs, dynamic_shapes=batches).module()
    twice = {key: torch.cat((value, value)) for key, value in inputs.items()}
    close(family.features(program, twice), family.features(untouched, twice))


# --- checkpointing and sharding -------------------------------------------------------------------------------------


# open_clip calls its custom block with more arguments than that takes.
@pytest.mark.parametrize("name", [name for name in KINDS if name != "open-clip-custom"])
def test_checkpointing_gives_equal_gradients(name):
    family, model, _ = _pair(name)
    calls = []
    child = next(_blocks(model)[-1].children())
    child.register_forward_hook(lambda module, args, output: calls.append(module))
    expected = gradients(family, model.train(), 3)
    if hasattr(model, "gradient_checkpointing_enable"):
        model.gradient_checkpointing_enable()
    else:
        model.set_grad_checkpointing(True)
    actual = gradients(family, model, 3)
    assert len(calls) == 3
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def _shard(model, whole_blocks):
    for block in _blocks(model):
        for child in () if whole_blocks else block.children():
            linears = [m for m in child.modules() if m is not child and type(m).__name__ == "Linear"]
            for module in (linears[-1:] if "ttention" not in type(child).__name__ else []) + [child]:
                if any(True for _ in module.parameters()):
                    fully_shard(module)
        fully_shard(block)
    # It takes no parameter without dimensions, as the temperature is.
    fully_shard(model, ignored_params={p for p in model.parameters() if p.dim() == 0})


def _whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@every_kind
@pytest.mark.parametrize(
    "whole_blocks", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["blocks", "every module"]
)
@pytest.mark.parametrize("first", [pytest.param("shard", marks=pytest.mark.exhaustive), "accelerate"])
def test_fsdp2_before_and_after_accelerate(name, whole_blocks, first, one_process):
    family, _, untouched = _pair(name)
    model = copy.deepcopy(untouched)
    steps = [lambda: _shard(model, whole_blocks), lambda: evakernels.accelerate(model, force=True)]
    for step in steps if first == "shard" else reversed(steps):
        step()
    block = _blocks(model)[0]
    assert isinstance(block, FSDPModule)
    assert type(block).__name__ == "FSDP" + type(_blocks(untouched)[0]).__name__
    close(run(family, model, 1), run(family, untouched, 1))
    expected = gradients(family, untouched.train(), 2)
    actual = {key: _whole(value) for key, value in gradients(family, model.train(), 2).items()}
    assert_same_gradients(actual, expected)
    # A fused step calls a norm that is sharded on its own.
    assert ops_of(family, model) == (family.ops if whole_blocks else family.ops - {"add_layer_norm"})
    evakernels.restore(model)
    assert isinstance(block, FSDPModule)
    assert ops_of(family, model) == set()


def test_fsdp1_matches_untouched(one_process):
    family, model, untouched = _pair("vit")
    sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    close(run(family, sharded, 1), run(family, untouched, 1))


def test_model_on_meta_is_sharded_then_filled(one_process):
    family, _, untouched = _pair("vit")
    model = copy.deepcopy(untouched).to("meta")
    evakernels.accelerate(model, force=True)
    _shard(model, whole_blocks=True)
    model.to_empty(device="cpu")
    set_model_state_dict(model, untouched.state_dict(), options=StateDictOptions(full_state_dict=True))
    close(run(family, model, 1), run(family, untouched, 1))
    assert ops_of(family, model.train()) == family.ops
