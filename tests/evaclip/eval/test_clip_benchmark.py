"""clip_benchmark evaluates our models with the numbers of `evaclip eval`, on drawings from packages."""

import io
import json
import sys

import pytest
import torch
from eval_fakes import evaclip
from image_files import as_file
from PIL import Image
from safetensors.torch import save_file

import evaclip as package
import evakernels
from evaclip.data.shard_writer import write_shard
from evaclip.demo import emoji
from evaclip.eval import clip_benchmark

pytestmark = pytest.mark.xdist_group("evaluation")
TEMPLATES = ["a drawing of {}", "the emoji {}"]


@pytest.fixture(scope="module")
def concepts():
    return emoji.load_concepts()[::24]


@pytest.fixture(scope="module")
def pictures(concepts):
    """On white: transparent pixels are white here, and of the colour under them in webdataset."""
    drawings = emoji.style_drawings("twemoji")
    drawn = (Image.open(io.BytesIO(emoji.render_png(drawings[concept.key], 48)[0])) for concept in concepts)
    return [Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB") for image in drawn]


@pytest.fixture(scope="module")
def data(concepts, pictures, tmp_path_factory):
    """A folder in clip_benchmark's layout: each drawing with its class and, a line each, all its names."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "test").mkdir()
    (folder / "test" / "nshards.txt").write_text("1")
    (folder / "classnames.txt").write_text("\n".join(concept.names[0] for concept in concepts))
    prompts = "\n".join(template.format("{c}") for template in TEMPLATES)
    (folder / "zeroshot_classification_templates.txt").write_text(prompts)

    def samples():
        for label, (concept, picture) in enumerate(zip(concepts, pictures, strict=True)):
            facts = json.dumps({"captions": concept.names})
            members = {"cls": str(label), "txt": "\n".join(concept.names), "json": facts}
            yield concept.key, {"png": as_file(picture), **{name: text.encode() for name, text in members.items()}}

    write_shard(folder / "test" / "0.tar", samples())
    return folder


@pytest.fixture(scope="module")
def weights(concepts, pictures, tmp_path_factory):
    """A little trained: with equal features rounding would decide the order."""
    torch.manual_seed(0)
    model, _, preprocess = package.create_model_and_transforms("tiny")
    images = torch.stack([preprocess(picture) for picture in pictures])
    texts = package.get_tokenizer("tiny")([concept.names[0] for concept in concepts])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(12):
        optimizer.zero_grad()
        evakernels.clip_loss(*model(images, texts)[:2], model.logit_scale.exp()).backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return path


def measured_by_clip_benchmark(data, weights, tmp_path, *options):
    out = tmp_path / "theirs.json"
    where = ["--dataset", "wds/emoji", "--dataset_root", str(data), "--output", str(out)]
    what = ["--model", "tiny", "--pretrained", str(weights), "--no_amp", "--num_workers", "0", "--quiet"]
    clip_benchmark.main(["eval", *where, *what, *options])
    return json.loads(out.read_text())["metrics"]


def measured_by_evaclip(task, data, weights, tmp_path, *options):
    out = tmp_path / "ours.json"
    shard = data / "test" / "0.tar"
    evaclip("eval", task, f"tiny:{weights}", "--data", shard, "--workers", 0, "--json", out, *options)
    return json.loads(out.read_text())["metrics"]


def test_zero_shot_classification(data, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    theirs = measured_by_clip_benchmark(data, weights, tmp_path, "--task", "zeroshot_classification")
    templates = tmp_path / "templates.txt"
    templates.write_text("\n".join(TEMPLATES))
    options = ("--caption-key", "cls", "--classes", data / "classnames.txt", "--templates", templates)
    ours = measured_by_evaclip("zero-shot", data, weights, tmp_path, *options)
    assert 0 < ours["top5"] < 1
    assert ours["top1"] == pytest.approx(theirs["acc1"])
    assert ours["top5"] == pytest.approx(theirs["acc5"])
    assert ours["mean_per_class"] == pytest.approx(theirs["mean_per_class_recall"])


def test_retrieval(data, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", [])
    (data / "dataset_type.txt").write_text("retrieval")
    cutoffs = ("1", "5", "10")
    theirs = measured_by_clip_benchmark(data, weights, tmp_path, "--task", "zeroshot_retrieval", "--recall_k", *cutoffs)
    ours = measured_by_evaclip("retrieval", data, weights, tmp_path, "--caption-key", "json:captions")
    assert ours["captions"] > ours["images"]
    assert 0 < ours["text_to_image"]["recall"]["10"] < 1
    for k in cutoffs:
        assert ours["text_to_image"]["recall"][k] == pytest.approx(theirs[f"image_retrieval_recall@{k}"])
        assert ours["image_to_text"]["recall"][k] == pytest.approx(theirs[f"text_retrieval_recall@{k}"])
