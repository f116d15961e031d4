"""Configurations: names, options, and errors."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_models import random_images, random_tokens, small_model

from evaclip import CLIPConfig, create_model, get_config, list_models
from evaclip.errors import UserError
from evaclip.model.config import override
from evaclip.model.flops import text_flops, vision_flops
from evakernels import backends


def test_config_round_trip() -> None:
    for name in list_models():
        config = get_config(name)
        assert override(CLIPConfig(), config.to_dict()) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual": {}}, "unknown model option 'visual'"),
        ({"vision": {"widht": 3}}, "did you mean 'vision.width'"),
        ({"vision": {"mlp": "gel"}}, "did you mean 'gelu'"),
        ({"vision": {"rope": "yes"}}, "vision.rope must be true or false"),
        ({"vision": {"layers": 0}}, "vision.layers"),
        ({"vision": {"heads": 5}}, "vision.width .* got 128"),
        ({"vision": {"image_size": 30}}, "vision.image_size 30"),
        ({"vision": {"width": 132, "heads": 66}}, "multiple of 4 with rope, got 2"),
        ({"vision": {"norm": "rms_norm"}}, "sub_norm needs"),
        ({"vision": {"mlp_ratio": math.inf}}, "vision.mlp_ratio"),
        ({"vision": {"prefix_tokens": 17}}, "vision.prefix_tokens"),
        ({"vision": {"prefix_tokens": 0}}, "vision.prefix_tokens"),
        ({"vision": {"pool": "attention"}}, "vision.mlp"),
        ({"vision": {"pool": "attention", "mlp": "gelu", "sub_norm": False}, "embed_dim": 64}, "embed_dim"),
        ({"text": {"mlp": "swiglu"}}, "text.mlp"),
        ({"preprocess": {"std": [1, 1, 0]}}, "preprocess.std"),
        ({"preprocess": {"resize": "crop"}}, "unknown preprocess.resize"),
    ],
)
def test_override_wrong_options(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(get_config("tiny"), changes)


def test_configuration_does_not_import_torch(tmp_path: Path) -> None:
    """Its import takes seconds: not for the package, a configuration, or the log of a run."""
    (tmp_path / "config.yaml").write_text("schedule: {steps: 20}\n")
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 4.0, "seconds": 1.0}\n')
    code = f"""if True:
        import sys, evaclip
        from evaclip.commands.main import main
        main(["train", "tiny", "--print-config"])
        main(["report", {str(tmp_path)!r}, "--text"])
        print("torch" in sys.modules, "create_model" in dir(evaclip))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "loss" in done.stdout
    assert done.stdout.split()[-2:] == ["False", "True"]


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
def test_parameters_state_and_flops(name: str) -> None:
    visual, text, entries, *flops = MODELS[name]
    model = create_model(name, device="meta", precision="bf16")
    assert sum(p.numel() for p in model.visual.parameters()) == visual
    assert sum(p.numel() for p in model.text.parameters()) == text
    assert sum(p.numel() for p in model.parameters()) == visual + text + 1
    assert len(model.state_dict()) == entries
    assert all(t.is_meta for t in model.state_dict().values())
    config = model.config
    computed = vision_flops(config.vision, config.embed_dim), text_flops(config.text, config.embed_dim)
    assert [round(each / 1e9, 2) for each in computed] == flops


def test_model_calls_ops() -> None:
    model, called = small_model(), set()
    with backends.observed_by(lambda op, backend: called.add(op)), torch.no_grad():
        model(random_images(1), random_tokens(1))
    for op in ("rope_attention", "swiglu", "layer_norm", "token_dropout"):
        assert f"{op}_forward" in called
