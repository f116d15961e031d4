"""`evaclip convert --to transformers`: folders that transformers loads."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hub_server import Hub, serving
from lively_model import lively
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoModel, AutoProcessor

from evaclip import get_tokenizer
from evaclip.commands.main import main
from evaclip.errors import UserError
from evaclip.transforms import EvalTransform
from evaclip.weights.for_transformers import save_for_transformers

TEXTS = ["a cat", "two dishes on a table"]
FROM_HUB = """
import json
import PIL.Image
from transformers import AutoModel, AutoProcessor, pipeline

name, labels, picture = "owner/name", ["a cat", "a table"], PIL.Image.new("RGB", (40, 32), "red")
model, processor = (auto.from_pretrained(name, trust_remote_code=True) for auto in (AutoModel, AutoProcessor))
logits = model(**processor(text=labels, images=picture, padding=True, return_tensors="pt")).logits_per_image
classify = pipeline("zero-shot-image-classification", model=name, trust_remote_code=True)
scores = {found["label"]: found["score"] for found in classify(picture, labels, hypothesis_template="{}")}
print(json.dumps([logits[0].tolist(), [scores[label] for label in labels]]))
"""


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies a repository's code into this folder."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_folder_matches_model(tmp_path: Path) -> None:
    """Outputs of a `CLIPModel`, with the bias of SigLIP's loss, and the card."""
    model = lively(vision={"layers": 2}, text={"layers": 2}, init_logit_bias=-3.0)
    save_for_transformers(model, tmp_path / "tiny", facts={"license": "mit"})
    assert "license: mit" in (tmp_path / "tiny/README.md").read_text()
    loaded: Any = AutoModel.from_pretrained(tmp_path / "tiny", trust_remote_code=True).eval()
    pixels, tokens = torch.randn(1, 3, 32, 32), get_tokenizer("tiny")(TEXTS)
    processor = AutoProcessor.from_pretrained(tmp_path / "tiny")
    inputs = processor(text=TEXTS, padding="max_length", return_tensors="pt")
    with torch.no_grad():
        out, expected = loaded(**inputs, pixel_values=pixels), model.get_logits(pixels, tokens)
        torch.testing.assert_close([out.logits_per_image, out.logits_per_text], list(expected))
        torch.testing.assert_close(out.image_embeds, model.encode_image(pixels, normalize=True))
        torch.testing.assert_close(out.text_embeds, model.encode_text(tokens, normalize=True))
        torch.testing.assert_close(loaded.get_image_features(pixels), model.encode_image(pixels))
        torch.testing.assert_close(loaded.get_text_features(inputs["input_ids"]), model.encode_text(tokens))
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in again.state_dict().items())


@pytest.mark.parametrize(
    ("part", "option", "name"),
    [
        ("text", {"hf_tokenizer_name": "google/siglip2-base-patch16-naflex"}, "text.hf_tokenizer_name"),
        ("text", {"causal": False}, "text.causal"),
        ("vision", {"image_size": (32, 48)}, "square"),
        ("preprocess", {"max_patches": 9}, "preprocess.max_patches"),
        ("preprocess", {"crop": 0.9}, "preprocess.crop"),
    ],
)
def test_folder_refuses_unsupported_models(tmp_path: Path, part: str, option: dict[str, Any], name: str) -> None:
    with pytest.raises(UserError, match=name):
        save_for_transformers(lively(**{part: option}), tmp_path / "tiny")
    assert not (tmp_path / "tiny").exists()


def test_convert_command_writes_folder_and_card(tmp_path: Path) -> None:
    save_file(lively().state_dict(), tmp_path / "tiny.safetensors")
    call = ["convert", str(tmp_path / "tiny.safetensors"), str(tmp_path / "out"), "--to", "transformers"]
    assert main([*call, "--model", "tiny"]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "library_name: transformers" in card
    assert 'AutoModel.from_pretrained("out", trust_remote_code=True)' in card
    assert (tmp_path / "out/modeling_evaclip.py").exists()
    assert main([*call, "--model", "tiny"]) != 0  # the files exist
    assert main([*call, "--force"]) == 0  # the model is found by its shapes


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_processor_matches_transform(resize: str, interpolation: str, tmp_path: Path) -> None:
    """To three of 255 levels: the libraries round differently."""
    model = lively(preprocess={"resize": resize, "interpolation": interpolation})
    save_for_transformers(model, tmp_path / "out")
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 6, 3), dtype=np.uint8)).resize((96, 144))
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    expected = EvalTransform(32, model.config.preprocess)(image)
    for mode in ("RGB", "RGBA"):
        pixels = processor(images=image.convert(mode), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(pixels, expected, atol=3 / 255 / 0.26, rtol=0)


def test_processor_crops_odd_excess(tmp_path: Path) -> None:
    model = lively()
    save_for_transformers(model, tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    levels = np.random.default_rng(0).integers(0, 256, (32, 39, 3), dtype=np.uint8)
    for width in range(32, 40):
        image = Image.fromarray(levels[:, :width])
        pixels = processor(images=image, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(pixels, EvalTransform(32, model.config.preprocess)(image))


@pytest.mark.slow
def test_folder_loads_from_a_hub(tmp_path: Path) -> None:
    """In a new process, outside of the source tree and with an empty cache."""
    model = lively(vision={"layers": 2}, text={"layers": 2})
    save_for_transformers(model, tmp_path / "name")
    with serving(Hub({("owner/name", file.name): file.read_bytes() for file in (tmp_path / "name").iterdir()})) as hub:
        environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "0"}
        done = subprocess.run([sys.executable, "-c", FROM_HUB], cwd=tmp_path, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    logits, scores = map(torch.tensor, json.loads(done.stdout))  # no question whether to trust the code
    pixels = EvalTransform(model.config.vision.image_size, model.config.preprocess)(Image.new("RGB", (40, 32), "red"))
    expected = model.get_logits(pixels[None], get_tokenizer("tiny")(["a cat", "a table"]))[0][0]
    torch.testing.assert_close(logits, expected, atol=0.05, rtol=0)
    torch.testing.assert_close(scores, logits.softmax(0), atol=1e-5, rtol=0)


def test_missing_package_is_named_with_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_for_transformers(lively(), tmp_path / "alone")
    monkeypatch.setitem(sys.modules, "evaclip.model.clip", None)
    with pytest.raises(ImportError, match=r"evakernels\[hf\]"):
        AutoModel.from_pretrained(tmp_path / "alone", trust_remote_code=True)
