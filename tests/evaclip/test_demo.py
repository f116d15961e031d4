import io
import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from evaclip.commands.main import build_parser, main
from evaclip.data.shard_writer import write_shard
from evaclip.demo import story as demo
from evaclip.errors import UserError
from evaclip.eval.results import Evaluation
from evaclip.loading import load_model
from evaclip.runtime.encoder import Encoder
from evaclip.runtime.indexing import describe
from evaclip.runtime.search import search
from evaclip.runtime.store import Store
from evaclip.runtime.text import text_encoder
from evaclip.train.recipes import RECIPES, get_recipe

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two styles of coloured squares as `evaclip data emoji` lays its shards out."""

    def drawn(color: str, side: int) -> bytes:
        picture = io.BytesIO()
        Image.new("RGBA", (side, side), color).save(picture, "PNG")
        return picture.getvalue()

    folder = tmp_path / "data"
    folder.mkdir()
    for style, size in (("twemoji", 24), ("openmoji", 40)):
        samples = []
        for number, color in enumerate(COLORS):
            captions = json.dumps({"captions": [color, f"{color} square"]}).encode()
            pictures = {"png": drawn(color, size), "large.png": drawn(color, 2 * size)}
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
def test_the_whole_story(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "_steps_per_second", lambda config: 1000.0)
    out = tmp_path / "runs" / "demo"
    html, pictures = demo.run_demo(out, data=data)
    assert (html, pictures) == (out / "report.html", out / "pictures.store")
    assert "place" in html.read_text() or "first" in html.read_text()
    results = {path.stem: Evaluation.load(path) for path in (out / "evaluations").iterdir()}
    assert sorted(results) == [
        "retrieval-openmoji-a-style-never-seen",
        "zero-shot-openmoji-a-style-never-seen",
        "zero-shot-twemoji-the-drawings-trained-on",
    ]
    assert results["retrieval-openmoji-a-style-never-seen"].metrics["captions"] == 16
    assert results["zero-shot-openmoji-a-style-never-seen"].metrics["chance_top1"] == 1 / 8
    printed = capsys.readouterr().out
    assert "the shards in" in printed
    for number, phase in enumerate(("drawings", "training", "evaluation", "report", "index"), 1):
        assert re.search(rf"^\[{number}/5\] {phase} \.\.\.$", printed, re.MULTILINE)
        assert re.search(rf"^\[{number}/5\] {phase}: \d+\.\d s$", printed, re.MULTILINE)
    for style in ("OpenMoji, a style never seen", "Twemoji, the drawings trained on"):
        # Of eight classes chance is 12.5 %.
        share, times = re.search(rf"^{style} +([\d.]+)% \((\d+) x chance\)", printed, re.MULTILINE).groups()
        assert int(times) == round(float(share) / 12.5)
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
def test_the_budget_shortens_but_never_lengthens(data, tmp_path, monkeypatch, speed, steps, warmup):
    monkeypatch.setattr(demo, "_steps_per_second", lambda config: speed)
    config = demo.demo_config(tmp_path / "run", data)
    schedule = demo.fit_to_budget(config, 1.0, say=lambda message: None).schedule
    assert (schedule.steps, schedule.warmup_steps) == (steps, warmup)


@pytest.mark.parametrize(("multiplies", "precision"), [(True, "amp_bf16"), (False, "fp32")])
def test_demo_precision_depends_on_the_processor(tmp_path, monkeypatch, multiplies, precision):
    monkeypatch.setattr("evaclip.machine.multiplies_bfloat16", lambda: multiplies)
    assert demo.demo_config(tmp_path / "run", tmp_path).precision == precision


@pytest.mark.usefixtures("small_recipe")
def test_the_speed_is_measured_by_training(data: Path, tmp_path: Path) -> None:
    assert demo._steps_per_second(demo.demo_config(tmp_path / "run", data)) > 0.05
    assert not (tmp_path / "run").exists()


def test_shards_that_are_missing_are_drawn(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[Path, tuple[str, ...]]] = []

    def record(folder: Path, styles: tuple[str, ...], size: int) -> None:
        drawn.append((folder, styles))

    monkeypatch.setattr("evaclip.demo.emoji.build_emoji", record)
    demo.draw_shards(data)
    assert drawn == []
    (data / "classes.txt").unlink()
    demo.draw_shards(data)
    assert drawn == [(data, ("twemoji", "openmoji"))]


def test_demo_without_onnx_has_no_text_tower(data, tmp_path, monkeypatch):
    """The server then has the model itself."""
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    monkeypatch.setattr("evaclip.runtime.encoder.load_model", lambda given, **how: load_model("tiny"))
    (tmp_path / "run").mkdir()
    assert not (demo.index_drawings(tmp_path / "run", data) / "text.onnx").exists()


@pytest.mark.parametrize("active", [True, False])
def test_the_last_line_is_a_command_that_serves(active, tmp_path, monkeypatch, capsys):
    programs = tmp_path / "my env/bin"
    programs.mkdir(parents=True)
    for name in ("python", "evaclip"):
        (programs / name).touch(mode=0o755)
    out = tmp_path / "my runs/demo"
    made = out / "report.html", out / "pictures.store"
    monkeypatch.setattr("evaclip.commands.demo.run_demo", lambda *args, **options: made)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.setenv("PATH", str(programs) if active else str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--out", str(out)]) == 0
    program, *words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert program == ("evaclip" if active else "my env/bin/evaclip")
    args = build_parser().parse_args(words)
    assert (args.store, args.open) == (out / "pictures.store", True)


def test_another_store_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_another_run_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {name: EVA02-CLIP-B-16}\n")
    with pytest.raises(UserError, match="holds another run, which the demo would replace"):
        demo.run_demo(tmp_path)
    with pytest.raises(UserError, match="more than 0 minutes, got -1"):
        demo.run_demo(tmp_path, minutes=-1)
