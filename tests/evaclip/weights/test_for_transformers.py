"""`evaclip convert --to transformers`: folders that transformers loads."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
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


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies a repository's code into this folder."""
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def test_folder_gives_equal_logits(tmp_path: Path) -> None:
    model = lively(vision={"layers": 2}, text={"layers": 2})
    save_for_transformers(model, tmp_path / "tiny")
    loaded: Any = AutoModel.from_pretrained(tmp_path / "tiny", trust_remote_code=True).eval()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8))
    processor = AutoProcessor.from_pretrained(tmp_path / "tiny")
    inputs = processor(text=TEXTS, images=picture, padding="max_length", return_tensors="pt")
    pixels = EvalTransform(model.config.vision.image_size, model.config.preprocess)(picture)[None]
    with torch.no_grad():
        expected = model.get_logits(pixels, get_tokenizer("tiny")(TEXTS))[0]
        torch.testing.assert_close(loaded(**inputs | {"pixel_values": pixels}).logits_per_image, expected)
        torch.testing.assert_close(loaded(**inputs).logits_per_image, expected, atol=0.05, rtol=0)
    features = loaded.get_text_features(inputs["input_ids"])
    torch.testing.assert_close(features, model.encode_text(get_tokenizer("tiny")(TEXTS)))
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_convert_command_writes_folder_and_card(tmp_path: Path) -> None:
    save_file(lively().state_dict(), tmp_path / "tiny.safetensors")
    call = ["convert", str(tmp_path / "tiny.safetensors"), str(tmp_path / "out"), "--to", "transformers"]
    assert main([*call, "--model", "tiny"]) == 0
    assert "library_name: transformers" in (tmp_path / "out/README.md").read_text()
    assert (tmp_path / "out/modeling_evaclip.py").exists()
    assert main([*call, "--model", "tiny"]) != 0  # the files exist
    assert main([*call, "--model", "tiny", "--force"]) == 0


@pytest.mark.parametrize(
    ("options", "reason"), [({"vision": {"image_size": (32, 48)}}, "square"), ({"preprocess": {"crop": 0.9}}, "crop")]
)
def test_other_preprocessing_is_an_error(options: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        save_for_transformers(lively(**options), tmp_path / "out")
    assert not list(tmp_path.glob("out/*"))
