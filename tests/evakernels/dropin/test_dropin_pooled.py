"""Towers that pool one token: their last block computes this token alone."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from dropin_families import OPEN_CLIP, TIMM, accelerated, assert_same_gradients, close, images
from op_checks import Recorder
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import evakernels

TOWERS = [name for name in TIMM if name not in ("vit-rms", "perception-encoder", "relative", "relative-post-norm")]
"""timm's families with a class token."""

END = 49
"""The end token of a text, the highest id."""


class Mixed(nn.Module):
    """Every token of its output depends on all."""

    def __init__(self, width, **options):
        super().__init__()
        self.fc = nn.Linear(width, width)

    def forward(self, x):
        return self.fc(x - x.mean(1, keepdim=True))


def vit(**options):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
    return VisionTransformer(**sizes, **options).eval()


@contextmanager
def record_tokens():
    """Fills a set with the numbers of tokens of the MLPs that run inside the `with` block."""
    found = set()
    with Recorder() as recorder:
        yield found
    names = {f"evakernels::{name}_forward" for name in ("gelu", "swiglu", "swiglu_mlp")}
    hidden = [args[0] for op, args in recorder.own_calls() if op.name() in names]
    found.update(x.shape[1] if x.dim() > 2 else 1 for x in hidden)


def features(model, seed, *args):
    torch.manual_seed(seed)
    out = model(*args)
    return out[:2] if isinstance(out, tuple) else (out,)


def results(model, seed, *args):
    """Features, and gradients of a loss in which each has a weight of its own."""
    model.zero_grad()
    parts = features(model, seed, *args)
    sum((part * torch.randn(part.shape, generator=torch.Generator().manual_seed(7))).sum() for part in parts).backward()
    return parts, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal_results(model, untouched, *args):
    for training in (False, True):
        (ours, gradients), (theirs, expected) = (results(m.train(training), 1, *args) for m in (model, untouched))
        close(ours, theirs)
        assert_same_gradients(gradients, expected)
        with torch.no_grad():
            close(features(model, 1, *args), theirs)


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_timm_tower_matches_untouched(name, checkpointing):
    untouched = TIMM[name].build()
    untouched.global_pool = "token"
    untouched.set_grad_checkpointing(checkpointing)
    model = accelerated(untouched)
    assert_equal_results(model, untouched, images(3)["x"])
    with record_tokens() as tokens:
        model(images(3)["x"])
    assert 1 in tokens


@pytest.mark.parametrize("name", OPEN_CLIP)
@pytest.mark.parametrize("lengths", [(12, 12, 12, 12), (3, 7, 5, 1)])
def test_open_clip_towers_match_untouched(name, lengths):
    untouched = OPEN_CLIP[name].build()
    model = accelerated(untouched)
    text = torch.randint(1, END, (4, 12), generator=torch.Generator().manual_seed(0))
    for row, length in zip(text, lengths, strict=True):
        row[length - 1], row[length:] = END, 0
    image = torch.randn(4, 3, 32, 32)
    assert_equal_results(model, untouched, image, text)
    with record_tokens() as tokens:
        model(image, text)
    assert {1, max(lengths)} <= tokens
    assert 12 not in tokens or max(lengths) == 12


@pytest.mark.parametrize(
    ("name", "path", "shape"),
    [
        ("open-clip", "transformer.resblocks.0.ln_1", (4, 12, 64)),
        ("vit", "blocks.1", (4, 19, 64)),
        ("vit", "blocks.1.mlp", (4, 19, 64)),
    ],
)
def test_hook_gets_all_tokens(name, path, shape):
    family = (TIMM | OPEN_CLIP)[name]
    model, seen = accelerated(family.build()), []
    model.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output.shape))
    inputs = family.inputs(1)
    if "text" in inputs:
        inputs["text"][:, 3], inputs["text"][:, 4:] = END, 0
    model(**inputs)
    assert seen == [shape]


class Quantized(torch.Tensor):
    """A weight without views, as those of quantisation libraries."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.split, torch.Tensor.chunk, torch.Tensor.__getitem__):
            raise NotImplementedError(func)
        if func is F.linear:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


@pytest.mark.parametrize("name", ["vit", "eva02", "eva02-packed"])
@pytest.mark.parametrize("quantizes_first", [True, False])
def test_quantized_weights_are_not_split(name, quantizes_first):
    model = TIMM[name].build().eval()
    x = images(1)["x"]
    expected = model(x).detach()

    def quantize():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                weight = layer.weight.detach().as_subclass(Quantized)
                layer.weight = nn.Parameter(weight, requires_grad=False)

    if quantizes_first:
        quantize()
    evakernels.accelerate(model, force=True)
    if not quantizes_first:
        quantize()
    with torch.no_grad():
        close(model(x), expected)


def test_forward_features_returns_all_tokens():
    untouched = vit()
    model = accelerated(untouched)
    x = images(1)["x"]
    close(model.forward_features(x), untouched.forward_features(x))
    close(model.forward_intermediates(x), untouched.forward_intermediates(x))


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (lambda model: None, {"exclude": "blocks.1"}, "its last block, Block, computes all tokens"),
        (lambda model: setattr(model, "norm", nn.BatchNorm1d(17)), {}, "BatchNorm1d may need all tokens"),
    ],
)
def test_tower_that_needs_all_tokens_is_left(change, options, reason):
    model = vit()
    change(model)
    report = evakernels.accelerate(model, **options, force=True)
    assert ("", reason) in [(left.name, left.reason) for left in report.left]
    assert not any(done.name == "" for done in report.replaced)


@pytest.mark.parametrize("compiled", [True, False])
def test_compiled_or_wrapped_blocks_match_untouched(compiled):
    untouched = OPEN_CLIP["open-clip"].build()
    model = accelerated(untouched)
    for tower in (model, model.visual):
        if compiled:
            for block in tower.transformer.resblocks:
                block.compile(backend="eager")
        else:
            tower.transformer = checkpoint_wrapper(tower.transformer)
    pair = torch.randn(4, 3, 32, 32), torch.randint(1, END, (4, 12))
    close(features(model, 1, *pair), features(untouched, 1, *pair))


def test_replaced_method_gets_all_tokens():
    model = accelerated(vit())
    model.pool = lambda x: x.mean(1)
    with record_tokens() as tokens:
        model(images(1)["x"])
    assert tokens == {17}


@pytest.mark.parametrize(
    ("options", "training"),
    [
        ({"global_pool": "avg"}, False),
        ({"attn_drop_rate": 0.1}, True),
        ({"mlp_layer": lambda in_features, **more: Mixed(in_features)}, False),
    ],
    ids=["mean", "dropout of attention", "mixed tokens"],
)
def test_tower_that_needs_more_tokens(options, training):
    untouched = vit(**options).train(training)
    model = accelerated(untouched)
    outputs = []
    for m in (model, untouched):
        torch.manual_seed(1)
        outputs.append(m(images(1)["x"]))
    close(*outputs)


def test_tower_with_frozen_weights():
    model = accelerated(vit())
    x = images(1)["x"]
    with torch.inference_mode():
        dense = model(x)
        evakernels.nn.freeze(model)
        close(model(x), dense)
