"""The scripts in `examples`: folders for other programs, loaded as those do, and the life cycle of a model."""

import json
import re
import runpy
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tokenizers
import torch
from lively_model import lively
from PIL import Image

from evaclip import get_tokenizer
from evaclip.demo import emoji
from evaclip.errors import UserError
from evaclip.model.clip import CLIP
from evaclip.transforms import EvalTransform

EXAMPLES = Path(__file__).parents[2] / "examples"

TEXTS = ["A photo of a cat's  dinner, 2 dishes!", "", "word " * 40]


@pytest.fixture
def model() -> CLIP:
    return lively(vision={"layers": 2}, text={"layers": 2})


def write(program: str, model: CLIP, folder: Path, **kind: object) -> None:
    runpy.run_path(str(EXAMPLES / f"export_{program}.py"))["write"](model, folder, **kind)


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8))


def cosine(a: np.ndarray, b: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(torch.from_numpy(a), b, dim=-1).min().item()


def encoded(model: CLIP, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    transform = EvalTransform(model.config.vision.image_size, model.config.preprocess)
    with torch.no_grad():
        images = model.encode_image(transform(picture())[None], normalize=True)
        return images, model.encode_text(get_tokenizer("tiny")(texts), normalize=True)


def test_immich_example(model: CLIP, tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    write("immich", model, folder)
    images, texts = encoded(model, TEXTS)
    # As its OpenClipVisualEncoder and OpenClipTextualEncoder do.
    given = json.loads((folder / "visual/preprocess_cfg.json").read_text())
    assert given["resize_mode"] == "shortest"
    size, resample = given["size"], Image.Resampling[given["interpolation"].upper()]
    resized = picture().resize((size, int(40 / 32 * size)), resample)
    cropped = resized.crop((0, int(resized.height / 2 - size / 2), size, int(resized.height / 2 - size / 2) + size))
    pixels = (np.asarray(cropped, np.float32) / 255 - given["mean"]) / given["std"]
    visual = onnxruntime.InferenceSession(folder / "visual/model.onnx")
    (found,) = visual.run(None, {"image": pixels.astype(np.float32).transpose(2, 0, 1)[None]})
    assert cosine(found, images) > 0.999
    length = json.loads((folder / "config.json").read_text())["text_cfg"]["context_length"]
    pad = json.loads((folder / "textual/tokenizer_config.json").read_text())["pad_token"]
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "textual/tokenizer.json"))
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=length)
    textual = onnxruntime.InferenceSession(folder / "textual/model.onnx")
    for text, expected in zip(TEXTS, texts, strict=True):
        tokens = np.array([tokenizer.encode(" ".join(text.split())).ids], dtype=np.int32)
        assert cosine(textual.run(None, {"text": tokens})[0], expected[None]) > 0.9999


def test_transformers_js_example(model: CLIP, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    folder = tmp_path / "tiny"
    write("transformers_js", model, folder, dtype="fp16")
    images, texts = encoded(model, TEXTS)
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.projection_dim, config.text_config.vocab_size) == ("clip", 128, 49408)
    pixels = AutoImageProcessor.from_pretrained(folder)(picture(), return_tensors="np")
    vision = onnxruntime.InferenceSession(folder / "onnx/vision_model_fp16.onnx")
    assert cosine(vision.run(["image_embeds"], {"pixel_values": pixels["pixel_values"]})[0], images) > 0.999
    tokenizer = AutoTokenizer.from_pretrained(folder)
    given = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="np")
    text = onnxruntime.InferenceSession(folder / "onnx/text_model_fp16.onnx")
    found = text.run(["text_embeds"], {"input_ids": given["input_ids"].astype(np.int64)})[0]
    assert cosine(found, texts) > 0.9999


def test_tokenizer_file_equals_tokenizer(model: CLIP) -> None:
    ours = get_tokenizer("tiny")
    file = ours.to_tokenizers()
    texts = [*TEXTS, "Ünïcödé ÀÉ 日本語 12345", "it's we'll 'tis\tnew\nline", "<end_of_text> a", "😀!!??..."]
    for text, row in zip(texts, ours(texts), strict=True):
        found = np.array(file.encode(text).ids)
        used = min(2 + len(ours.encode(text)), len(row))
        assert found[:used].tolist() == row[:used].tolist(), text
        assert (found[used:] == ours.end_id).all()


@pytest.mark.parametrize("program", ["immich", "transformers_js"])
@pytest.mark.parametrize(
    ("options", "reason"), [({"vision": {"image_size": (32, 48)}}, "square"), ({"preprocess": {"crop": 0.9}}, "crop")]
)
def test_export_examples_refuse_models(program: str, options: dict[str, object], reason: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        write(program, lively(**options), tmp_path / "tiny")
    assert not list(tmp_path.iterdir())


SCRIPT = Path(__file__).parents[2] / "examples" / "life_cycle" / "life_cycle.py"


@pytest.mark.slow
@pytest.mark.exhaustive
def test_life_cycle_example_runs_once(tmp_path, monkeypatch, capsys):
    """On 160 of the concepts, with narrow towers: all else is the example's own."""
    concepts = emoji.load_concepts()[:160]
    monkeypatch.setattr(emoji, "load_concepts", lambda skin_tones=False: concepts)
    told = subprocess.run([sys.executable, SCRIPT, "--help"], check=True, capture_output=True, text=True).stdout
    assert "--seeds" in told
    spec = spec_from_file_location("life_cycle", SCRIPT)
    script = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    script.TOWER |= {"width": 64, "heads": 2}
    script.BATCH, script.LARGE_BATCH = 32, 128
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--seeds", "0", "--steps", "10"])
    script.main()
    first = capsys.readouterr().out
    script.main()
    again = capsys.readouterr().out
    table = first[first.index("| what |") :]
    rows = re.findall(r"^\| (.+) \| (zero-shot top-\d|top-\d) \| (\d+\.\d\d) \| - \|$", table, re.MULTILINE)
    assert len(rows) == 16
    assert again.endswith(table)
    trained = re.compile(r"^step \d+/\d+  loss", re.MULTILINE)
    assert len(trained.findall(first)) >= 8
    assert not trained.search(again)
    starts = [line for line in first.splitlines() if line.startswith("$ evaclip train")]
    assert len(starts) == 11
    assert "pretrained: runs/life/clip-0" in starts[1]
    assert "model.pretrained_image=runs/life/mim-0" in starts[2]
    assert "model.pretrained_image=runs/life/clip-from-mim-0" in starts[-1]
