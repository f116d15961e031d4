"""Optimizers and whole models: their inputs, and the plain model."""

from functools import partial
from typing import Any

import open_clip
import pytest
import timm
import torch
from bench_case_checks import draw, gradients, moved

from benchmarks.accuracy import as_double, relative_error
from benchmarks.cases import models
from benchmarks.cases._open_clip import PlainClip
from benchmarks.measure import saved_bytes
from benchmarks.operation import get_operation
from benchmarks.shapes import parse_shape
from evaclip import create_model, get_config, list_models
from evaclip.errors import UserError
from evaclip.model.config import ALIASES
from evaclip.tokenizer import Tokenizer
from evaclip.weights import to_open_clip

pytestmark = pytest.mark.usefixtures("few_parameters")


@pytest.mark.parametrize("name", ["lamb_step", "adamw_step"])
def test_optimizers_move_parameters_and_state_alike(name):
    op, shape = get_operation(name), parse_shape("tiny b1")
    ours, plain = draw(op, shape), as_double(draw(op, shape))
    assert relative_error(moved(op.ours, ours), moved(op.eager, plain)) <= 5e-5
    for buffers in ("exp_avgs", "exp_avg_sqs", "steps"):
        assert relative_error(ours[buffers], plain[buffers]) <= 1e-6, buffers
    assert {float(step) for step in ours["steps"]} == {11.0}


def test_models_get_same_parameters_and_new_samples() -> None:
    op, shape = get_operation("clip_step"), parse_shape("tiny b2")
    models.parameters_of.cache_clear()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        state = torch.random.get_rng_state()
        first, second = (draw(op, shape, seed=seed) for seed in (0, 1))
        assert torch.equal(torch.random.get_rng_state(), state)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(first["parameters"], second["parameters"], strict=True))
    assert not torch.equal(first["images"], second["images"])
    assert not torch.equal(first["texts"], second["texts"])
    assert all(values.is_leaf and values.abs().min() > 0 for values in first["parameters"])


def test_captions_are_as_long_as_in_use() -> None:
    texts = draw(get_operation("encode_text"), parse_shape("eva02-b16:text b256"))["samples"]
    assert texts.shape == (256, 77)
    assert (texts[:, 0] == Tokenizer().start_id).all()
    lengths = (texts != 0).sum(-1)
    assert torch.equal(texts.argmax(-1), lengths - 1)  # the end token is the largest
    assert 11 < lengths.double().mean() < 16


def test_recomputing_step_is_the_same_step() -> None:
    op, shape = get_operation("clip_step"), parse_shape("tiny b3")
    inputs = draw(op, shape)
    again = op.variants["recompute activations"]
    assert relative_error(gradients(op, again, inputs), gradients(op, op.ours, inputs)) <= 1e-6
    kept = [saved_bytes(partial(function, **inputs), torch.device("cpu")) for function in (again, op.ours)]
    assert kept[0] < 0.7 * kept[1]


@pytest.mark.parametrize("name", ["encode_image", "encode_text"])
def test_towers_refuse_dropped_patches(name: str) -> None:
    with pytest.raises(UserError, match="dropped in training only"):
        draw(get_operation(name), parse_shape("tiny b1 drop50"))


@pytest.mark.parametrize("name", ["encode_image", "encode_text", "clip_step"])
def test_default_models_are_open_clips(name: str) -> None:
    op = get_operation(name)
    for shape in map(parse_shape, {*op.shapes["cpu"], *op.shapes["cuda"]}):
        models.check_comparable("", shape.config)
    with pytest.raises(UserError, match=r"'emoji@48 b1': .* pools by mean and has 8,192; expected another model"):
        draw(op, parse_shape("emoji@48 b1"))


# --- the plain model ------------------------------------------------------------------------------------------------


# Of the published models none takes the mean of its patches, which the plain model can't.
@pytest.mark.parametrize("name", [name for name in list_models() if get_config(name).vision.pool == "token"])
def test_plain_model_has_our_parameters(name: str) -> None:
    ours = create_model(name, device="meta", vision={"layers": 2}, text={"layers": 2})
    plain = PlainClip(ours.config, torch.device("cpu"))
    expected = {key: values.shape for key, values in to_open_clip(ours.state_dict()).items()}
    assert {key: values.shape for key, values in plain.named_parameters()} == expected
    assert not any(buffer.is_meta for buffer in plain.buffers())


@pytest.mark.parametrize(
    "name",
    [
        "EVA02-B-16",
        "EVA01-g-14",
        *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("EVA02-L-14-336", "EVA02-E-14")),
    ],
)
def test_plain_model_is_open_clips(name: str) -> None:
    """Layer by layer, as both print themselves."""
    theirs: Any = open_clip.get_model_config(name)
    vision, width = theirs["vision_cfg"], theirs["embed_dim"]
    plain = PlainClip(get_config(ALIASES[name]), torch.device("cpu"))
    with torch.device("meta"):
        trunk = timm.create_model(vision["timm_model_name"], num_classes=width, global_pool=vision["timm_pool"])
        text = open_clip.transformer.TextTransformer(**theirs["text_cfg"], output_dim=width)
    assert repr(plain.visual["trunk"]) == repr(trunk)
    assert repr(plain.text) == repr(text)


def test_plain_model_has_open_clips_tables() -> None:
    trunk: Any = timm.create_model("eva02_base_patch16_clip_224", depth=1)
    plain: Any = PlainClip(create_model("EVA02-B-16", device="meta", vision={"layers": 1}).config, torch.device("cpu"))
    assert torch.equal(plain.visual["trunk"].rope.pos_embed, trunk.rope.pos_embed)
    assert torch.equal(plain.text.attn_mask, open_clip.transformer.TextTransformer(layers=1).attn_mask)
