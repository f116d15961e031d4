"""Models for the hub: saved and pushed, loaded by open_clip and here, with equal features."""

import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
import yaml
from hub_server import Hub
from huggingface_hub import constants
from PIL import Image

import evaclip
from evaclip.errors import UserError
from evaclip.loading import load_model
from evaclip.model import vision_names
from evaclip.train.overrides import dump_yaml, resolve
from evaclip.train.recipes import get_recipe
from evaclip.train.tree import nest
from evaclip.weights.config_files import OPEN_CLIP_CONFIG_FILE, to_open_clip_config
from evaclip.weights.load import load_weights
from evaclip.weights.publish import SAFE_FILE, card_text, run_facts

NAME = "EVA02-B-16"
TEXTS = ["a photo of a cat", "two dogs"]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> evaclip.CLIP:
    """B/16 with one layer a tower, here and in timm, and another normalization."""
    monkeypatch.setitem(vision_names._SIZES, "eva02_base", {"layers": 1})
    monkeypatch.setattr(timm, "create_model", functools.partial(timm.create_model, depth=1))
    torch.manual_seed(0)
    text = {"layers": 1, "width": 64, "heads": 1, "vocab_size": 49408}
    options = {"vision": {"layers": 1, "drop_path": 0.1}, "text": text, "image_mean": (0.5, 0.4, 0.3)}
    model = evaclip.create_model(NAME, image_interpolation="bilinear", **options).eval()
    with torch.no_grad():
        model.visual.head.weight.mul_(1000)
    return model


@pytest.fixture
def folder(model: evaclip.CLIP, tmp_path: Path) -> Path:
    evaclip.save_for_hf(model, evaclip.get_tokenizer(NAME), evaclip.get_model_config(NAME), tmp_path / "mine")
    return tmp_path / "mine"


def features(model: Any, preprocess: Any, tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    image = Image.linear_gradient("L").resize((300, 240)).convert("RGB")
    with torch.no_grad():
        return model.encode_image(preprocess(image)[None]), model.encode_text(tokenizer(TEXTS))


def assert_loaded(source: str, model: evaclip.CLIP) -> None:
    expected = features(model, evaclip.transforms.EvalTransform(224, model.config.preprocess), evaclip.get_tokenizer())
    for library in (evaclip, open_clip):
        loaded, preprocess = library.create_model_from_pretrained(source)
        for actual, each in zip(features(loaded, preprocess, library.get_tokenizer(source)), expected, strict=True):
            assert each.std() > 0.01
            torch.testing.assert_close(actual, each, atol=1e-5, rtol=1e-5)


def test_saved_folder_is_loaded(folder: Path, model: evaclip.CLIP) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", OPEN_CLIP_CONFIG_FILE, SAFE_FILE]
    assert_loaded(f"local-dir:{folder}", model)
    assert load_model(f"local-dir:{folder}").model.config == evaclip.create_model(f"local-dir:{folder}").config


def test_saved_logit_bias_is_loaded(model, tmp_path, caplog):
    biased = evaclip.CLIP(replace(model.config, init_logit_bias=-10.0))
    load_weights(biased, model.state_dict())
    assert biased.logit_bias == -10
    with torch.no_grad():
        biased.logit_bias.fill_(-7.5)
    evaclip.save_for_hf(biased.eval(), save_directory=tmp_path / "siglip")
    loads = [library.create_model(f"local-dir:{tmp_path / 'siglip'}") for library in (evaclip, open_clip)]
    # Weights with a bias make a model with one.
    text = biased.config.to_dict()["text"]
    loads.append(evaclip.create_model(NAME, tmp_path / "siglip" / SAFE_FILE, vision={"layers": 1}, text=text))
    for loaded in loads:
        assert loaded.logit_bias.item() == -7.5
    images, tokens = torch.randn(2, 3, 224, 224), evaclip.get_tokenizer()(TEXTS)
    with torch.no_grad():
        difference = biased.get_logits(images, tokens)[1] - model.get_logits(images, tokens)[1]
    torch.testing.assert_close(difference, torch.full((2, 2), -7.5), atol=1e-4, rtol=0)
    load_weights(model, biased.state_dict())
    assert model.logit_bias is None
    assert "logit_bias is left out" in caplog.text


@pytest.mark.parametrize("name", ["EVA01-g-14-plus", "EVA02-B-16", "EVA02-L-14-336", "EVA02-E-14-plus"])
def test_configuration_is_that_of_open_clip(name: str) -> None:
    ours, theirs = to_open_clip_config(evaclip.get_config(name))["model_cfg"], open_clip.get_model_config(name)
    # timm has two names for this tower.
    theirs["vision_cfg"]["timm_model_name"] = theirs["vision_cfg"]["timm_model_name"].replace(
        "giant_patch14_224", "giant_patch14_clip_224"
    )
    assert ours == theirs


def test_pushed_model_is_loaded(hub: Hub, model: evaclip.CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    address = evaclip.push_to_hf_hub(model, repo_id="mine", token="right", private=True, commit_message="First")
    assert address.startswith(f"{hub.url}/me/mine/commit/")
    assert hub.private == {"me/mine"}
    assert sorted(name for _, name in hub.files) == ["README.md", OPEN_CLIP_CONFIG_FILE, SAFE_FILE]
    assert 'create_model_from_pretrained("hf-hub:me/mine")' in hub.files["me/mine", "README.md"].decode()
    assert_loaded("hf-hub:me/mine", model)
    hub.files["me/mine", "README.md"] = b"written by hand"
    evaclip.push_to_hf_hub(model, repo_id="me/mine", token="right")
    assert hub.files["me/mine", "README.md"] == b"written by hand"


@pytest.mark.parametrize("token", [None, "wrong"])
def test_push_without_valid_token(hub: Hub, model: evaclip.CLIP, token: str | None) -> None:
    with pytest.raises(UserError, match=r"no valid token; run `hf auth login`, set HF_TOKEN"):
        evaclip.push_to_hf_hub(model, repo_id="me/mine", token=token)
    assert hub.files == {}


def test_push_offline_or_without_package(hub: Hub, model: evaclip.CLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="can't push to me/mine on the Hugging Face hub: HF_HUB_OFFLINE is set"):
        evaclip.push_to_hf_hub(model, repo_id="me/mine", token="right")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"package huggingface_hub is not installed: pip install 'evakernels\[clip\]'"):
        evaclip.push_to_hf_hub(model, repo_id="me/mine")


def test_model_unknown_to_open_clip_is_refused(hub: Hub, tmp_path: Path) -> None:
    larger = evaclip.create_model(NAME, force_image_size=448, device="meta")
    expected = r"open_clip can't load .*no such image tower; eva02_base_patch16_clip_224 differs in image_size=448\. "
    with pytest.raises(UserError, match=expected):
        evaclip.save_for_hf(larger, save_directory=tmp_path / "new")
    with pytest.raises(UserError, match=expected):
        evaclip.push_to_hf_hub(larger, repo_id="me/mine")
    cut = evaclip.create_model(NAME, device="meta", preprocess={"crop": 0.9})
    with pytest.raises(UserError, match=r"preprocess\.crop must be 1\.0 .* got 0\.9"):
        evaclip.save_for_hf(cut, save_directory=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert hub.requests == []


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run with two evaluations, on data behind a secret."""
    secret = "pipe:curl -H 'Authorization: Bearer abc123' https://host/{00..09}.tar"
    run, losses = tmp_path / "run", [{"step": s, "samples": 32 * s, "loss": 1 / s} for s in (5, 10)]
    run.mkdir()
    (run / "config.yaml").write_text(dump_yaml(resolve(get_recipe("tiny"), [nest("data.train", secret)])))
    records = [*losses, {"step": 10, "eval": {"zero_shot_top1": 0.1, "loss": None}}]
    (run / "log.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return run


def test_model_card_and_existing_files(folder: Path, model: evaclip.CLIP, run_folder: Path) -> None:
    before = (folder / SAFE_FILE).read_bytes()
    with pytest.raises(UserError, match=r"open_clip_model\.safetensors' exists"):
        evaclip.save_for_hf(model, save_directory=folder)
    card = {"license": "mit", "details": {"Data": ["a", "b"], "Seed": "secret"}, "citation": "@misc{x}"}
    options = {"skip_weights": True, "model_card": card, "overwrite": True}
    evaclip.save_for_hf(model, save_directory=folder, run=run_folder, **options)
    text = (folder / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert (header["library_name"], header["license"]) == ("open_clip", "mit")
    expected = (
        "- **Data:** a, b\n",
        "- **Steps:** 10 of 32 pairs, 320 in all\n",
        "| zero_shot_top1 | 0.1 |\n",
        "@misc{x}",
    )
    assert all(line in text for line in expected)
    assert "abc123" not in text
    assert (folder / SAFE_FILE).read_bytes() == before
    with pytest.raises(UserError, match="is not a run folder: it has no log"):
        evaclip.save_for_hf(model, save_directory=folder.with_name("new"), run=folder)


def test_card_of_a_classifier(run_folder: Path) -> None:
    config = resolve(get_recipe("finetune-eva02-ti-in1k"), [nest("data.train", "synthetic")])
    (run_folder / "config.yaml").write_text(dump_yaml(config))
    text = card_text(run_facts(run_folder), "mine")
    assert "pipeline_tag: image-classification" in text
    assert f"- **Steps:** 10 of {config.batch_size:,} images" in text
    assert "- **Loss:** cross-entropy, at the end 0.1\n" in text
    assert "pairs" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokenizer": open_clip.tokenize}, "tokenizer .* got a function"),
        ({"safe_serialization": "yes"}, "safe_serialization .* got 'yes'"),
        ({"model_card": {"licence": "mit"}}, "unknown part of a model card 'licence'; did you mean 'license'"),
    ],
)
def test_save_wrong_arguments(options: dict[str, Any], message: str, tmp_path: Path, model: evaclip.CLIP) -> None:
    with pytest.raises(UserError, match=message):
        evaclip.save_for_hf(model, **{"save_directory": tmp_path / "new", **options})


def test_load_unknown_configuration(folder: Path) -> None:
    path = folder / OPEN_CLIP_CONFIG_FILE
    content = json.loads(path.read_text())
    for change, message in (
        ({"vision_cfg": {"timm_model_name": "vit_base_patch16_224"}}, "unknown vision model 'vit_base_patch16_224'"),
        ({"quick_gelu": True}, "a model with quick_gelu=True doesn't exist here"),
    ):
        path.write_text(json.dumps({**content, "model_cfg": content["model_cfg"] | change}))
        with pytest.raises(UserError, match=message):
            evaclip.create_model(f"local-dir:{folder}")
    path.write_text("{")
    with pytest.raises(UserError, match="can't be read: "):
        evaclip.create_model(f"local-dir:{folder}")
