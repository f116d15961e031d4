"""Configurations: names, options, and errors."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path

import pytest

from evaclip import CLIPConfig, Preprocess, TextConfig, VisionConfig, get_config, list_models
from evaclip.errors import UserError
from evaclip.model.config import ALIASES, override

EVA_CLIP = {
    "EVA01-CLIP-B-16", "EVA01-CLIP-g-14", "EVA01-CLIP-g-14-plus", "EVA02-CLIP-B-16", "EVA02-CLIP-L-14",
    "EVA02-CLIP-L-14-336", "EVA02-CLIP-bigE-14", "EVA02-CLIP-bigE-14-plus", "EVA-CLIP-8B", "EVA-CLIP-8B-plus",
    "EVA-CLIP-18B",
}  # fmt: skip


def test_list_models() -> None:
    assert set(list_models()) == EVA_CLIP | {"tiny", "emoji"}


def test_get_config_of_alias() -> None:
    for alias, name in ALIASES.items():
        assert get_config(alias) == get_config(name)


def test_config_round_trip() -> None:
    for name in list_models():
        config = get_config(name)
        assert override(CLIPConfig(), config.to_dict()) == config


def test_override_nested_options() -> None:
    config = override(get_config("tiny"), {"embed_dim": 64, "vision": {"layers": 1}})
    assert (config.embed_dim, config.vision.layers) == (64, 1)
    assert dataclasses.replace(config.vision, layers=3) == get_config("tiny").vision


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual": {}}, "unknown model option 'visual'"),
        ({"vision": {"widht": 3}}, "did you mean 'vision.width'"),
        ({"vision": {"mlp": "gel"}}, "did you mean 'gelu'"),
        ({"vision": {"rope": "yes"}}, "vision.rope must be true or false"),
        ({"vision": {"patch_dropout": 1.0}}, "vision.patch_dropout"),
        ({"vision": {"layers": 0}}, "vision.layers"),
        ({"vision": {"layers": True}}, "vision.layers"),
        ({"vision": {"heads": 5}}, "vision.width .* got 128"),
        ({"vision": {"image_size": 30}}, "vision.image_size 30"),
        ({"vision": {"width": 132, "heads": 66}}, "multiple of 4 with rope, got 2"),
        ({"vision": {"norm": "rms_norm"}}, "sub_norm needs"),
        ({"text": {"norm_eps": -1.0}}, "text.norm_eps"),
        ({"vision": {"mlp_ratio": math.inf}}, "vision.mlp_ratio"),
        ({"vision": TextConfig()}, "vision must be a mapping"),
        ({"preprocess": {"std": [1, 1]}}, "preprocess.std"),
        ({"preprocess": {"std": [1, 1, 0]}}, "preprocess.std"),
        ({"preprocess": {"resize": "crop"}}, "unknown preprocess.resize"),
    ],
)
def test_override_wrong_options(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(get_config("tiny"), changes)


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_config("tiny").vision.layers = 5  # type: ignore[misc]
    assert hash(VisionConfig()) == hash(VisionConfig())
    assert Preprocess() == Preprocess(mean=[0.48145466, 0.4578275, 0.40821073])  # type: ignore[arg-type]


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
