"""torch's features on accelerated models: a small model of each library and kind."""

import copy
import dataclasses
import pickle

import pytest
import torch
from dropin_families import assert_same_gradients, close, gradients, log_ops, ops_of, pair, run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

import evakernels
from evakernels import backends

QUICK = ("eva02", "vit", "open-clip", "clip", "dinov3-vit", "llama")
OTHERS = ("eva02-packed", "dinov3", "perception-encoder", "vit-swiglu", "open-clip-custom", "open-clip-eva", "siglip")
OTHERS += ("siglip2",)
BLOCKS = ("Block", "EncoderLayer", "DecoderLayer", "ViTLayer")


def kinds_but(*excluded):
    quick = [name for name in QUICK if name not in excluded]
    return quick + [pytest.param(name, marks=pytest.mark.exhaustive) for name in OTHERS if name not in excluded]


every_kind = pytest.mark.parametrize("name", kinds_but())


def _pair(name):
    """The family, called as a user does it, an accelerated model and an untouched one."""
    family, model, untouched = pair(name)
    if hasattr(untouched, "forward_features"):
        family = dataclasses.replace(family, features=lambda model, inputs: model(**inputs))
    return family, model, untouched


def _blocks(model):
    return [module for module in model.modules() if type(module).__name__.endswith(BLOCKS)]


def _classes(model):
    return [type(module) for module in model.modules()]


# --- names, copies, pickles -----------------------------------------------------------------------------------------


@every_kind
def test_restore_returns_untouched_model(name):
    family, model, untouched = _pair(name)
    before, after = untouched.state_dict(), model.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[key], after[key]) for key in before)
    model.load_state_dict(before, strict=True)
    assert repr(model) == repr(untouched)
    changed = sum(a is not b for a, b in zip(_classes(model), _classes(untouched), strict=True))
    assert evakernels.restore(model) == changed > 0
    assert _classes(model) == _classes(untouched)
    assert torch.equal(run(family, model, 1), run(family, untouched, 1))
    assert evakernels.restore(model) == 0


@every_kind
def test_copy_and_pickle_run_on_the_ops(name):
    family, model, _ = _pair(name)
    expected, ops = run(family, model, 1), ops_of(family, model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
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
@pytest.mark.parametrize("name", kinds_but("siglip2"))
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
    evakernels.accelerate(model, force=True)
    model.to_empty(device="cpu")
    of_both = zip([*model.parameters(), *model.buffers()], [*untouched.parameters(), *untouched.buffers()], strict=True)
    with torch.no_grad():
        for target, value in of_both:
            target.copy_(value)
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
    "name",
    [pytest.param(name, marks=[] if name == "eva02" else pytest.mark.exhaustive) for name in (*QUICK, *OTHERS)],
)
def test_training_compiles_without_graph_break(name):
    torch._dynamo.reset()
    family, model, _ = _pair(name)
    for module in model.train().modules():  # compiled code draws other numbers
        for rate in {"prob", "drop_prob"} & vars(module).keys():
            setattr(module, rate, 0.0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager" if name in TRACED else "eager")
    expected = gradients(family, model, 1)
    actual = {key.removeprefix("_orig_mod."): value for key, value in gradients(family, compiled, 1).items()}
    assert_same_gradients(actual, expected)


def test_compiled_model_may_be_accelerated():
    torch._dynamo.reset()
    family, _, untouched = _pair("eva02")
    model = copy.deepcopy(untouched)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    run(family, compiled, 1)
    evakernels.accelerate(model, force=True)
    ops = set()
    with torch.no_grad(), backends.observed_by(lambda op, backend: ops.add(op.removesuffix("_forward"))):
        actual = run(family, compiled, 1)
    assert {"rope_attention", "layer_norm", "swiglu"} <= ops
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
@pytest.mark.parametrize("name", kinds_but("open-clip-custom"))
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


def _shard(model, every_child):
    for block in _blocks(model):
        for child in block.children() if every_child else ():
            if any(True for _ in child.parameters()):
                fully_shard(child)
        fully_shard(block)
    # It takes no parameter without dimensions, as the temperature is.
    fully_shard(model, ignored_params={p for p in model.parameters() if p.dim() == 0})


@every_kind
@pytest.mark.parametrize(
    "every_child", [False, pytest.param(True, marks=pytest.mark.exhaustive)], ids=["blocks", "every module"]
)
@pytest.mark.parametrize("first", [pytest.param("shard", marks=pytest.mark.exhaustive), "accelerate"])
def test_fsdp2_before_and_after_accelerate(name, every_child, first, one_process):
    family, _, untouched = _pair(name)
    model = copy.deepcopy(untouched)
    steps = [lambda: _shard(model, every_child), lambda: evakernels.accelerate(model, force=True)]
    for step in steps if first == "shard" else reversed(steps):
        step()
    block = _blocks(model)[0]
    assert isinstance(block, FSDPModule)
    assert type(block).__name__ == "FSDP" + type(_blocks(untouched)[0]).__name__
    close(run(family, model, 1), run(family, untouched, 1))
    expected = gradients(family, untouched.train(), 2)
    actual = {
        key: value.full_tensor() if isinstance(value, DTensor) else value
        for key, value in gradients(family, model.train(), 2).items()
    }
    assert_same_gradients(actual, expected)
    # A fused step calls a norm that is sharded on its own.
    assert ops_of(family, model) == (family.ops - {"add_layer_norm"} if every_child else family.ops)
    evakernels.restore(model)
    assert isinstance(block, FSDPModule)
    assert ops_of(family, model) == set()


def test_fsdp1_matches_untouched(one_process):
    family, model, untouched = _pair("vit")
    sharded = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
    close(run(family, sharded, 1), run(family, untouched, 1))
