"""A run with averaged weights gives these at every door, and files and cards say so."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoModel

import evaclip
from evaclip import Encoder
from evaclip.commands.main import main
from evaclip.loading import load_model
from evaclip.weights import load_weights
from evaclip.weights.files import load_state_dict

PIXELS = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def features(model: Any) -> Tensor:
    return model.eval().encode_image(PIXELS, normalize=True)


@pytest.mark.parametrize("average", [True, False])
def test_every_door_has_the_same_weights(average: bool, averaged_run: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    expected, other = (features(load_model(str(averaged_run), average=each).model) for each in (average, not average))
    assert (expected - other).abs().max() > 1e-4
    raw, kind = ([], "moving average of the steps") if average else (["--no-average"], "of the last step")
    source = averaged_run if average else averaged_run / "checkpoints/step_00000003/model.safetensors"
    found = {
        "create_model": features(evaclip.create_model("tiny", source)),
        "create_model_and_transforms": features(evaclip.create_model_and_transforms("tiny", source)[0]),
        "create_model_from_pretrained": features(evaclip.create_model_from_pretrained("tiny", source)[0]),
        "load_model": features(load_model(f"tiny:{averaged_run}", average=average).model),
        "Encoder": Encoder(f"tiny:{source}", device="cpu", precision="fp32").images(list(PIXELS)),
    }
    if average:
        found["create_model of a run"] = features(evaclip.create_model(str(averaged_run)))
    cards = []
    for layout in ("original", "open_clip", "safetensors"):
        file = tmp_path / f"{layout}.safetensors"
        assert main(["convert", str(averaged_run), str(file), "--to", layout, *raw]) == 0
        load_weights(model := evaclip.create_model("tiny"), load_state_dict(file))
        found[f"convert --to {layout}"] = features(model)
        with safe_open(file, "pt") as stream:
            assert stream.metadata()["weights"] == kind
        cards.append(file.with_name(f"{file.name}.md"))
    folder, program = tmp_path / "folder", tmp_path / "image.pt2"
    assert main(["convert", str(averaged_run), str(folder), "--to", "transformers", *raw]) == 0
    loaded: Any = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert main(["export", str(averaged_run), str(program), "--tower", "image", *raw]) == 0
    with torch.no_grad():
        found["convert --to transformers"] = normalize(loaded.eval().get_image_features(PIXELS), dim=-1)
        found["export"] = normalize(torch.export.load(program).module()(PIXELS), dim=-1)
    for name, each in found.items():
        torch.testing.assert_close(each, expected, msg=f"{name} has other weights")
    for card in (*cards, folder / "README.md", program.with_name(f"{program.name}.md")):
        text = card.read_text()
        assert f"- **Weights:** {kind}\n" in text
        assert ("## Evaluation" in text) == average
