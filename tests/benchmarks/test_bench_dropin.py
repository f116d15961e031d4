"""Other people's models, before and after `evakernels.accelerate`."""

from pathlib import Path

import pytest
import torch
from bench_case_checks import build
from torch import nn

from benchmarks import cli
from benchmarks.cases import dropin
from benchmarks.operation import Draw, get_operation
from benchmarks.results import read_results
from evaclip.errors import UserError

CPU = torch.device("cpu")
QUICK = "timm/vit-b"
each_model = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == QUICK else pytest.mark.exhaustive) for name in dropin.MODELS]
)


def small(device: torch.device) -> nn.Module:
    from timm.models.eva import Eva

    model: nn.Module = Eva(
        img_size=224, patch_size=56, embed_dim=32, depth=2, num_heads=2, num_classes=5, use_rot_pos_emb=True,
        swiglu_mlp=True, scale_mlp=True, mlp_ratio=2, proj_drop_rate=0.5,
    )  # fmt: skip
    return model.to(device)


@pytest.fixture(autouse=True)
def _small_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dropin.Model(small, lambda module, images, texts: module(images))
    monkeypatch.setitem(dropin.MODELS, "timm/small", model)
    dropin._pair.cache_clear()


@each_model
def test_models_have_published_flops(name: str) -> None:
    """FLOPs of one sample, in 1e9, as their authors give them (a multiply-add as two)."""
    flops, parameters = dropin._counted(name)
    expected = {
        "timm/eva02-b": (35.1, 86), "timm/eva02-l": (162.0, 304), "timm/vit-b": (35.1, 87), "timm/dinov3-b": (47.3, 86),
        "open_clip/eva02-b-16": (41.1, 150), "open_clip/vit-b-32": (14.8, 151), "transformers/clip-b-16": (41.1, 150),
        "transformers/siglip-b": (46.4, 203),
    }[name]  # fmt: skip
    assert (flops / 1e9, parameters / 1e6) == pytest.approx(expected, rel=0.03)


@each_model
def test_all_parameters_are_trained(name: str) -> None:
    model = dropin.MODELS[name]
    with torch.device("meta"):
        module = model.build(torch.device("meta")).train()
        texts = torch.zeros(2, model.context, dtype=torch.int64) if model.vocabulary else None
        outputs = model.encode(module, torch.zeros(2, 3, model.pixels, model.pixels), texts)
    total = sum(output.sum() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert len(torch.autograd.grad(total, trained)) == len(trained)


def test_other_models_by_their_own_names() -> None:
    assert dropin.model_of("timm/vit_base_patch16_dinov3").pixels == 256
    model = dropin.model_of("open_clip/ViT-B-16-SigLIP-256")
    assert (model.pixels, model.vocabulary, model.context) == (256, 32_000, 64)
    # Pools by attention with a learned query.
    assert dropin._counted("timm/vit_pe_core_tiny_patch16_384")[1] == pytest.approx(6.14e6, rel=0.01)
    with pytest.raises(UserError, match="open_clip/ViT-C-32"):
        dropin.parse("open_clip/ViT-C-32 b4")


def test_texts_that_end_early() -> None:
    shape = dropin.parse("open_clip/vit-b-32 b4 t13")
    assert shape.name == "open_clip/vit-b-32 b4 t13"
    for name in ("timm/vit-b b4 t13", "open_clip/vit-b-32 b4 t78", "timm/vit-b", "timm/vit-c b4"):
        with pytest.raises(UserError, match=r"timm/vit|t78"):
            dropin.parse(name)
    texts = dropin._samples(shape, Draw(torch.float32, CPU, torch.Generator()))["texts"]
    assert (texts.argmax(-1) == 12).all()
    assert not texts[:, 13:].any()


def test_both_share_parameters_and_agree() -> None:
    op = get_operation("dropin")
    inputs = op.inputs(dropin.parse("timm/small b2"), Draw(torch.float32, CPU, torch.Generator()))
    before, after = inputs["pair"].plain.module.model, inputs["pair"].ours.module.model
    assert [id(p) for p in before.parameters()] == [id(p) for p in after.parameters()]
    assert type(before.blocks[0].attn) is not type(after.blocks[0].attn) or (
        before.blocks[0].attn.forward.__func__ is not after.blocks[0].attn.forward.__func__
    )
    torch.testing.assert_close(op.ours(**inputs), op.eager(**inputs), rtol=1e-5, atol=1e-5)


def test_dropin_is_measured(tmp_path: Path) -> None:
    command = ["model", "dropin", "--shape", "timm/small b2", "--dtype", "float32", "--peer", "none"]
    command += ["--passes", "1", "--seconds", "0.01"]
    assert cli.main([*command, "--json", str(tmp_path / "run.json")]) == 0
    rows = read_results(tmp_path / "run.json").rows
    assert {row.candidate for row in rows} == {"untouched", "evakernels"}
    assert {row.mode for row in rows} == {"forward", "training"}
    assert not [row.failure for row in rows if row.failure]


def test_frozen_models_agree_with_untouched() -> None:
    operation, shape = get_operation(dropin.FROZEN), dropin.parse("timm/small b2")
    dropin._frozen.cache_clear()
    inputs = operation.inputs(shape, Draw(torch.float32, CPU, torch.Generator()))
    with torch.no_grad():
        expected = operation.eager(**inputs)
        for run in (operation.ours, build(dropin.FROZEN, "compile-freezing", shape)):
            torch.testing.assert_close(run(**inputs), expected, rtol=1e-4, atol=1e-5)
