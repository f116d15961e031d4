"""Configurations: names, options, and what is said about wrong ones."""

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


def test_ships_all_models() -> None:
    assert set(list_models()) == EVA_CLIP | {"tiny", "emoji"}


def test_every_alias_leads_to_a_model() -> None:
    for alias, name in ALIASES.items():
        assert get_config(alias) == get_config(name)


def test_options_survive_the_way_through_plain_data() -> None:
    for name in list_models():
        config = get_config(name)
        assert override(CLIPConfig(), config.to_dict()) == config


def test_override_changes_nested_options_only() -> None:
    config = override(get_config("tiny"), {"embed_dim": 64, "vision": {"layers": 1}})
    assert (config.embed_dim, config.vision.layers) == (64, 1)
    assert dataclasses.replace(config.vision, layers=3) == get_config("tiny").vision


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"visual": {}}, "unknown model option 'visual'"),
        ({"vision": {"widht": 3}}, "did you mean 'vision.width'"),
        ({"vision": 3}, "expected a mapping"),
        ({"vision": {"mlp": "gel"}}, "did you mean 'gelu'"),
        ({"vision": {"rope": "yes"}}, "vision.rope is 'yes'; expected true or false"),
        ({"vision": {"patch_dropout": 1.0}}, "vision.patch_dropout is 1.0; expected 0 <= rate < 1"),
        ({"vision": {"layers": 0}}, "vision.layers is 0; expected a positive integer"),
        ({"vision": {"layers": True}}, "expected a positive integer"),
        ({"vision": {"heads": 5}}, "vision.width 128 isn't a multiple of heads 5"),
        ({"vision": {"image_size": 30}}, "vision.image_size 30 isn't a multiple of patch_size 8"),
        ({"vision": {"width": 132, "heads": 66}}, "multiple of 4; it is 2"),
        ({"vision": {"norm": "rms_norm"}}, "sub_norm needs"),
        ({"text": {"norm_eps": -1.0}}, "text.norm_eps is -1.0; expected a positive number"),
        ({"vision": {"patch_size": (16, 16)}}, r"vision.patch_size is \(16, 16\); expected a positive integer"),
        ({"vision": {"mlp_ratio": math.inf}}, "vision.mlp_ratio is inf; expected a positive number"),
        ({"vision": TextConfig()}, r"vision is TextConfig\(.*; expected a mapping of its options"),
        ({"preprocess": {"std": [1, 1]}}, "expected 3 numbers"),
        ({"preprocess": {"std": [1, 1, 0]}}, "expected positive numbers"),
        ({"preprocess": {"resize": "crop"}}, "unknown preprocess.resize"),
    ],
)
def test_wrong_options_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        override(get_config("tiny"), changes)


def test_configurations_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        get_config("tiny").vision.layers = 5  # type: ignore[misc]
    assert hash(VisionConfig()) == hash(VisionConfig())
    assert Preprocess() == Preprocess(mean=[0.48145466, 0.4578275, 0.40821073])  # type: ignore[arg-type]


def test_what_computes_nothing_does_not_import_torch(tmp_path: Path) -> None:
    """Its import takes seconds: neither the package has it, nor reading a configuration, nor a run's numbers."""
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
