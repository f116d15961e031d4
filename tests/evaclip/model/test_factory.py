"""Models, transforms and tokenizers by name."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_models import random_images, small_model

import evaclip
from evaclip import (
    CLIP,
    create_model,
    create_model_and_transforms,
    create_model_from_pretrained,
    create_vision_model,
    get_config,
    get_tokenizer,
)
from evaclip.errors import UserError
from evaclip.weights import describe_preprocess


def _checkpoint(folder: Path, model: CLIP) -> Path:
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    (folder / "preprocess.json").write_text(json.dumps(describe_preprocess(model.config)))
    return folder


@pytest.mark.parametrize("form", ["file", "pointer", "run"])
def test_create_model_of_checkpoint(form: str, tmp_path: Path) -> None:
    preprocess = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "resize": "squash"}
    model = create_model("tiny", preprocess=preprocess).eval()
    folder = _checkpoint(tmp_path / "checkpoints" / "step_00000007", model)
    (tmp_path / "checkpoints" / "latest").write_text("step_00000007\n")
    source = {
        "file": folder / "model.safetensors",
        "pointer": tmp_path / "checkpoints" / "latest",
        "run": tmp_path,
    }[form]
    again, train, evaluate = create_model_and_transforms("tiny", pretrained=str(source))
    assert again.config == model.config
    assert train.preprocess == evaluate.preprocess == model.config.preprocess
    assert evaluate.size == 32
    with torch.no_grad():
        assert torch.equal(again.eval().encode_image(random_images(2)), model.encode_image(random_images(2)))


@pytest.mark.parametrize(
    ("make", "name", "options", "overrides"),
    [
        (create_model, "tiny", {"vision": {"image_size": 64}}, {"vision": {"image_size": 48}}),
        (create_vision_model, "eva02_tiny_patch14_224", {"image_size": 56, "num_classes": 3}, {"image_size": 70}),
    ],
)
def test_create_model_as_trained(make, name, options, overrides, tmp_path, caplog):
    model = make(name, **options)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    stored = tmp_path / "model.json"
    stored.write_text(json.dumps({"name": name, **asdict(model.config)}))
    assert make(name, tmp_path).config == model.config
    assert not caplog.records
    for other, config in ((overrides, make(name, **overrides).config), ({"as_trained": False}, make(name).config)):
        assert make(name, tmp_path, **other).config == config
        assert "positions are resized from" in caplog.text
        caplog.clear()
    stored.write_text(json.dumps({"name": "another", **asdict(model.config)}))
    assert make(name, tmp_path).config == make(name).config


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_create_model_precision(precision: str, dtype: torch.dtype, tmp_path: Path) -> None:
    exact = small_model()
    folder = _checkpoint(tmp_path / "step", exact)
    for pretrained in (None, folder):
        model = create_model("tiny", pretrained=pretrained, precision=precision).eval()
        assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        rough = model.encode_image(random_images(2), normalize=True)
        assert rough.dtype == dtype
        expected = exact.encode_image(random_images(2), normalize=True)
    assert (rough.float() - expected).abs().max() < 0.03


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_name": "tinny"}, "unknown model 'tinny'; did you mean 'tiny'"),
        ({"precision": "fp8"}, "unknown precision 'fp8'; did you mean"),
        ({"device": "gpu"}, "device 'gpu' can't be used; accepted: cpu"),
        ({"pretrained": "nowhere/at/all"}, "no weights file or checkpoint folder 'nowhere/at/all'"),
        ({"pretrained": "eva_clip"}, "tiny has no released weights"),
        ({"model_name": "EVA02-L-14", "pretrained": "merged2b_s4b"}, "did you mean 'merged2b_s4b_b131k'"),
    ],
)
def test_create_model_wrong_arguments(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        create_model(**{"model_name": "tiny", "device": "meta", **arguments})


def test_public_names_exist() -> None:
    for name in evaclip.__all__:
        assert getattr(evaclip, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'create_modle'"):
        evaclip.create_modle  # noqa: B018
    assert get_config("tiny") is evaclip.get_config("tiny")


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run of another image size, with averaged weights."""
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000007"
    checkpoint.mkdir(parents=True)
    (checkpoint.parent / "latest").write_text("step_00000007\n")
    (tmp_path / "run" / "config.yaml").write_text("{}")
    model = create_model("tiny", vision={"image_size": 48, "layers": 1})
    (checkpoint / "model.json").write_text(json.dumps({"name": "tiny", **asdict(model.config)}))
    save_file(model.state_dict(), checkpoint / "model.safetensors")
    save_file({name: value + 1 for name, value in model.state_dict().items()}, checkpoint / "ema.safetensors")
    return tmp_path / "run"


@pytest.mark.parametrize("form", [".", "checkpoints/step_00000007"])
def test_create_model_of_run(form: str, run_folder: Path) -> None:
    model = create_model(str(run_folder / form))
    expected = create_model("tiny", run_folder / "checkpoints" / "step_00000007" / "ema.safetensors")
    assert model.config == expected.config
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    assert get_tokenizer(str(run_folder)).context_length == model.config.text.context_length
    assert create_model_from_pretrained(str(run_folder))[1].size == 48


@pytest.mark.parametrize(
    ("make", "name"), [(create_model, "EVA02-CLIP-B-16"), (create_vision_model, "eva02_tiny_patch14_224")]
)
def test_create_model_of_run_of_another_model(make, name, run_folder):
    with pytest.raises(UserError, match=f"pretrained must be weights of model {name!r}, got .* 'tiny'") as caught:
        make(name, run_folder, as_trained=False)
    assert len(str(caught.value)) < 300
