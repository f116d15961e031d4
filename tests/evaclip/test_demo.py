"""`evaclip demo`: drawings, a short training, evaluation, a report and a store."""

import hashlib
import io
import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from image_files import as_file
from PIL import Image
from test_transforms import PLAIN, drawing

from evaclip.commands.main import build_parser, main
from evaclip.data.shard_writer import write_shard
from evaclip.demo import story as demo
from evaclip.errors import UserError
from evaclip.eval.results import Evaluation
from evaclip.runtime.encoder import Encoder
from evaclip.runtime.indexing import describe
from evaclip.runtime.search import search
from evaclip.runtime.store import Store
from evaclip.runtime.text import text_encoder
from evaclip.train.recipes import RECIPES, get_recipe
from evaclip.train.tasks.task import training_transform

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two styles of coloured squares as `evaclip data emoji` lays its shards out."""
    folder = tmp_path / "data"
    folder.mkdir()
    for style, size in (("twemoji", 24), ("openmoji", 40)):
        samples = []
        for number, color in enumerate(COLORS):
            captions = json.dumps({"captions": [color, f"{color} square"]}).encode()
            drawn = {"png": size, "large.png": 2 * size}
            pictures = {name: as_file(Image.new("RGBA", (side, side), color)) for name, side in drawn.items()}
            samples.append((f"{number}", {**pictures, "txt": color.encode(), "json": captions}))
        write_shard(folder / f"{style}-00000.tar", samples)
    (folder / "classes.txt").write_text("\n".join(COLORS))
    return folder


@pytest.fixture
def small_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demo's recipe, small enough for a test."""
    recipe = get_recipe("emoji")
    vision = {"image_size": 32, "width": 32, "layers": 1, "heads": 2}
    text = {"width": 32, "layers": 1, "heads": 2}
    small = replace(
        recipe,
        batch_size=8,
        precision="fp32",
        model=replace(recipe.model, options={"vision": vision, "text": text}),
        data=replace(recipe.data, workers=0),
        schedule=replace(recipe.schedule, steps=4, epochs=None, warmup_steps=2),
        log=replace(recipe.log, every_steps=1, tensorboard=False, progress="none"),
    )
    monkeypatch.setitem(RECIPES, "emoji", lambda: small)


@pytest.mark.usefixtures("small_recipe")
def test_demo_from_shards_to_store(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_steps_per_second", lambda config: 1000.0)
    out = tmp_path / "runs" / "demo"
    html, pictures = demo.run_demo(out, data=data)
    assert (html, pictures) == (out / "report.html", out / "pictures.store")
    assert "place" in html.read_text() or "first" in html.read_text()
    results = {path.stem.rpartition("-")[0]: Evaluation.load(path) for path in (out / "evaluations").iterdir()}
    assert sorted(results) == [
        "retrieval-openmoji-a-style-never-seen",
        "zero-shot-openmoji-a-style-never-seen",
        "zero-shot-twemoji-the-drawings-trained-on",
    ]
    assert results["retrieval-openmoji-a-style-never-seen"].metrics["captions"] == 16
    assert results["zero-shot-openmoji-a-style-never-seen"].metrics["chance_top1"] == 1 / 8
    printed = capsys.readouterr().out
    assert "the shards in" in printed
    assert "[5/5] index: " in printed
    with Store.open(pictures) as earlier:
        first = earlier.model["weights"]
        assert len(earlier) == 2 * len(COLORS)
        query = text_encoder(earlier)(["red square"])
        rows = earlier.rows(search(earlier, query, top=16)[1][0])
        assert {row.caption for row in rows} == set(COLORS)
        assert {tuple(row.metadata["captions"]) for row in rows} == {(color, f"{color} square") for color in COLORS}
        assert {Image.open(io.BytesIO(row.thumbnail)).width for row in rows} == {48, 80}  # what is drawn large
    # The same folder again: the earlier demo is replaced, and its store is one of the new weights.
    recipe = RECIPES["emoji"]()
    monkeypatch.setitem(RECIPES, "emoji", lambda: replace(recipe, seed=recipe.seed + 1))
    demo.run_demo(out, data=data)
    with Store.open(pictures) as now:
        assert now.model["weights"] != first
        now.require_model({"given": str(out), **describe(Encoder(str(out), precision="fp32"))})
        assert len(now) == 2 * len(COLORS)
    assert [path.name for path in out.parent.iterdir()] == ["demo"]


@pytest.mark.usefixtures("small_recipe")
@pytest.mark.parametrize(("speed", "steps", "warmup"), [(10.0, 4, 2), (2 / 60, 2, 1), (0.001, 1, 0)])
def test_demo_budget_only_shortens(data, tmp_path, monkeypatch, speed, steps, warmup):
    monkeypatch.setattr(demo, "_steps_per_second", lambda config: speed)
    config = demo.demo_config(tmp_path / "run", data)
    schedule = demo.fit_to_budget(config, 1.0, say=lambda message: None).schedule
    assert (schedule.steps, schedule.warmup_steps) == (steps, warmup)


def test_demo_prints_serve_command(tmp_path, monkeypatch, capsys):
    out = tmp_path / "my runs/demo"
    made = out / "report.html", out / "pictures.store"
    monkeypatch.setattr("evaclip.commands.demo.run_demo", lambda *args, **options: made)
    assert main(["demo", "--out", str(out)]) == 0
    _, *words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    args = build_parser().parse_args(words)
    assert (args.store, args.open) == (out / "pictures.store", True)


def test_demo_keeps_another_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "draw_shards", lambda *args: pytest.fail("the demo begins"))
    store = tmp_path / "pictures.store"
    store.mkdir()
    (store / "letter.txt").write_text("mine")
    with pytest.raises(UserError, match="isn't a demo's store"):
        demo.run_demo(tmp_path)
    (store / "letter.txt").unlink()
    Store.create(store, {"name": "EVA02-CLIP-B-16", "dim": 8}).close()
    with pytest.raises(UserError, match="isn't a demo's store"):
        demo.run_demo(tmp_path)
    assert Store.exists(store)


def test_demo_keeps_another_run(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {name: EVA02-CLIP-B-16}\n")
    with pytest.raises(UserError, match="holds another run, which the demo would replace"):
        demo.run_demo(tmp_path)
    with pytest.raises(UserError, match="more than 0 minutes, got -1"):
        demo.run_demo(tmp_path, minutes=-1)


def test_drawing_transform_is_unchanged() -> None:
    transform = training_transform(get_recipe("emoji").data, 32, PLAIN)
    digest = hashlib.sha256()
    for seed in range(16):
        digest.update((transform(drawing(), seed) * 255).round().to(torch.uint8).numpy().tobytes())
    assert digest.hexdigest() == "2ca93bc2376b06ba5c5c2f3fb413013267824c0dd91d84c5ff95d3f008b62208"
