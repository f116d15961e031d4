"""Sizes and costs of all models, on the meta device, against published numbers."""

import pytest
import torch
from small_models import random_images, random_tokens, small_model

from evaclip import create_model, get_config
from evaclip.model.flops import flops_per_sample, text_flops, vision_flops
from evakernels import backends

# visual parameters, text parameters, entries of the state dict, 10^9 operations of an image, of a text.
# Entries are those of the released files without their rotary tables: two a block and two more.
MODELS = {
    "EVA01-CLIP-B-16": (86_201_600, 63_428_096, 338, 35.13, 5.96),
    "EVA01-CLIP-g-14": (1_012_588_928, 123_846_912, 678, 534.06, 13.30),
    "EVA01-CLIP-g-14-plus": (1_012_588_928, 354_032_640, 822, 534.06, 47.09),
    "EVA02-CLIP-B-16": (86_263_040, 63_428_096, 436 - 2 * 13, 35.13, 5.96),
    "EVA02-CLIP-L-14": (304_105_152, 123_650_304, 712 - 2 * 25, 162.00, 13.30),
    "EVA02-CLIP-L-14-336": (304_432_832, 123_650_304, 712 - 2 * 25, 381.86, 13.30),
    "EVA02-CLIP-bigE-14": (4_350_556_928, 354_032_640, 1134, 2264.33, 47.09),
    "EVA02-CLIP-bigE-14-plus": (4_350_556_928, 694_332_160, 1230, 2264.33, 97.86),
    "EVA-CLIP-8B": (7_526_088_704, 694_659_840, 684, 3899.20, 97.86),
    "EVA-CLIP-8B-plus": (7_529_234_432, 694_659_840, 684, 15963.97, 97.86),
    "EVA-CLIP-18B": (17_630_494_720, 694_987_520, 828, 9121.15, 97.86),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_and_state(name: str) -> None:
    visual, text, entries, _, _ = MODELS[name]
    model = create_model(name, device="meta", precision="bf16")
    assert sum(p.numel() for p in model.visual.parameters()) == visual
    assert sum(p.numel() for p in model.text.parameters()) == text
    assert sum(p.numel() for p in model.parameters()) == visual + text + 1
    assert len(model.state_dict()) == entries
    assert all(t.is_meta for t in model.state_dict().values())


@pytest.mark.parametrize("name", MODELS)
def test_flops(name: str) -> None:
    config = get_config(name)
    assert round(vision_flops(config.vision, config.embed_dim) / 1e9, 2) == MODELS[name][3]
    assert round(text_flops(config.text, config.embed_dim) / 1e9, 2) == MODELS[name][4]


def test_flops_of_kept_tokens() -> None:
    config = get_config("EVA02-CLIP-B-16")
    kept = 1 + 98
    macs = 196 * 768 * 3 * 16**2 + 768 * 512
    macs += 12 * (4 * kept * 768**2 + 2 * kept**2 * 768 + 3 * kept * 768 * 2048)
    assert vision_flops(config.vision, 512, token_keep=0.5) == 2 * macs
    assert flops_per_sample(config, 0.5) == 2 * macs + text_flops(config.text, 512)


def _with_bias(*modules: str) -> set[str]:
    return {f"{module}.{kind}" for module in modules for kind in ("weight", "bias")}


@pytest.mark.parametrize("name", ["tiny", "EVA02-CLIP-L-14"])
def test_layer_ids(name: str) -> None:
    model = create_model(name, device="meta")
    for tower, blocks in ((model.visual, "blocks"), (model.text, "transformer.resblocks")):
        layers = tower.layers
        assert tower.num_layer_ids == layers + 2
        ids = {parameter: tower.layer_id(parameter) for parameter, _ in tower.named_parameters()}
        assert set(ids.values()) == set(range(layers + 2))
        for parameter, layer in ids.items():
            if parameter.startswith(blocks):
                assert parameter.startswith(f"{blocks}.{layer - 1}.")
        embeddings = {p for p, layer in ids.items() if layer == 0}
        last = {p for p, layer in ids.items() if layer == layers + 1}
        if tower is model.visual:
            assert embeddings == {"cls_token", "pos_embed"} | _with_bias("patch_embed.proj")
            assert last == _with_bias("norm", "head")
        else:
            assert embeddings == {"positional_embedding", "token_embedding.weight"}
            assert last == {"text_projection"} | _with_bias("ln_final")


def test_model_calls_ops() -> None:
    model, called = small_model(), set()
    with backends.observed_by(lambda op, backend: called.add(op)), torch.no_grad():
        model(random_images(1), random_tokens(1))
    for op in ("rope_attention", "swiglu", "layer_norm", "add_layer_norm", "token_dropout"):
        assert f"{op}_forward" in called
