"""Whole models: inputs, open_clip's EVA-CLIP, and models of other libraries before and after `accelerate`."""

from typing import Any

import open_clip
import pytest
import timm
import torch
from bench_fakes import CPU, FakeTimer, draw, machine
from torch import nn

from benchmarks.candidates import candidates
from benchmarks.cases import dropin, models
from benchmarks.cases._open_clip import PlainClip
from benchmarks.measure import Case, measure
from benchmarks.operation import get_operation
from benchmarks.shapes import parse_shape
from evaclip import create_model, get_config, list_models
from evaclip.errors import UserError
from evaclip.model.config import ALIASES
from evaclip.weights import to_open_clip

QUICK = "timm/vit-b"
HALF_PADDED = "timm/naflexvit-b-p50", "transformers/siglip2-b-p50"
each_model = pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name == QUICK else pytest.mark.exhaustive)
        for name in (*dropin.MODELS, *HALF_PADDED)
    ],
)


@pytest.mark.parametrize("name", ["encode_image", "encode_text", "clip_step"])
def test_models_refuse_shapes_without_a_plain_model(name: str) -> None:
    op = get_operation(name)
    for shape in map(parse_shape, {*op.shapes["cpu"], *op.shapes["cuda"]}):
        models.check_comparable("", shape.config)
    with pytest.raises(UserError, match=r"'emoji@48 b1': .* pools by mean and has 8,192"):
        draw(op, parse_shape("emoji@48 b1"))
    if name != "clip_step":
        with pytest.raises(UserError, match="dropped in training only"):
            draw(op, parse_shape("tiny b1 drop50"))


# Of the published models none takes the mean of its patches, which the plain model can't.
@pytest.mark.parametrize("name", [name for name in list_models() if get_config(name).vision.pool == "token"])
def test_plain_model_has_our_parameters(name: str) -> None:
    ours = create_model(name, device="meta", vision={"layers": 2}, text={"layers": 2})
    plain = PlainClip(ours.config, CPU)
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
    plain = PlainClip(get_config(ALIASES[name]), CPU)
    with torch.device("meta"):
        trunk = timm.create_model(vision["timm_model_name"], num_classes=width, global_pool=vision["timm_pool"])
        text = open_clip.transformer.TextTransformer(**theirs["text_cfg"], output_dim=width)
    assert repr(plain.visual["trunk"]) == repr(trunk)
    assert repr(plain.text) == repr(text)


# --- models of other libraries --------------------------------------------------------------------------------------


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """timm/small, a model that is measured in a test."""

    def build(device: torch.device) -> nn.Module:
        from timm.models.eva import Eva

        model: nn.Module = Eva(
            img_size=224, patch_size=56, embed_dim=32, depth=2, num_heads=2, num_classes=5, use_rot_pos_emb=True,
            swiglu_mlp=True, scale_mlp=True, mlp_ratio=2, proj_drop_rate=0.5,
        )  # fmt: skip
        return model.to(device)

    model = dropin.Model(build, lambda module, images, texts: module(images))
    monkeypatch.setitem(dropin.MODELS, "timm/small", model)
    dropin._pair.cache_clear()
    dropin._frozen.cache_clear()


@each_model
def test_models_have_published_flops(name: str) -> None:
    """FLOPs of one sample, in 1e9, as their authors give them (a multiply-add as two)."""
    work = get_operation("dropin").work(dropin.parse(f"{name} b1"), 4)
    expected = {
        "timm/eva02-b": (35.1, 86), "timm/eva02-l": (162.0, 304), "timm/vit-b": (35.1, 87), "timm/dinov3-b": (47.3, 86),
        "open_clip/eva02-b-16": (41.1, 150), "open_clip/vit-b-32": (14.8, 151), "transformers/clip-b-16": (41.1, 150),
        "transformers/siglip-b": (46.4, 203), "timm/naflexvit-b-p50": (23.0, 87),
        "transformers/siglip2-b-p50": (23.0, 93),
    }[name]  # fmt: skip
    assert (work.forward.flops / 1e9, work.forward.bytes / 4e6) == pytest.approx(expected, rel=0.03)


@each_model
def test_all_parameters_are_trained(name: str) -> None:
    model, meta = dropin.model_of(name), torch.device("meta")
    module = model.build(meta).train()
    texts = torch.zeros(2, model.context, dtype=torch.int64, device=meta) if model.vocabulary else None
    outputs = model.encode(module, torch.zeros(2, 3, model.pixels, model.pixels, device=meta), texts)
    total = sum(output.sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert len(torch.autograd.grad(total, trained)) == len(trained)


def test_dropin_accepts_names_of_other_libraries() -> None:
    assert dropin.model_of("timm/vit_base_patch16_dinov3").pixels == 256
    model = dropin.model_of("open_clip/ViT-B-16-SigLIP-256")
    assert (model.pixels, model.vocabulary, model.context) == (256, 32_000, 64)
    for name in ("open_clip/ViT-C-32 b4", "timm/vit-b b4 t13", "open_clip/vit-b-32 b4 t78", "timm/vit-b"):
        with pytest.raises(UserError, match=r"timm/vit|t78|ViT-C"):
            dropin.parse(name)


@pytest.mark.parametrize(("name", "peer"), [("dropin", "none"), ("dropin_frozen", "compile-freezing")])
def test_dropin_has_right_results(name, peer, small_model, monkeypatch):
    """The arguments of torch.compile are tested uncompiled."""
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    op = get_operation(name)
    for mode in op.modes:
        case = Case(op, op.shape("timm/small b2"), mode, torch.float32, CPU)
        measure(case, candidates(op, "cpu", peers=[peer])[0], machine(), FakeTimer(), 0)
        assert {"untouched", "evakernels"} <= case.rows.keys()
        assert [row.failure for row in case.rows.values() if row.failure] == []
