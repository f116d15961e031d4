import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from evaclip.data.shard_writer import write_shard
from evaclip.demo import story as demo
from evaclip.errors import UserError
from evaclip.eval.results import Evaluation
from evaclip.train.recipes import RECIPES, get_recipe

COLORS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two styles of coloured squares as `evaclip data emoji` lays its shards out."""
    folder = tmp_path / "data"
    folder.mkdir()
    for style, size in (("twemoji", 24), ("openmoji", 40)):
        samples = []
        for number, color in enumerate(COLORS):
            picture = io.BytesIO()
            Image.new("RGB", (size, size), color).save(picture, "PNG")
            captions = json.dumps({"captions": [color, f"{color} square"]}).encode()
            samples.append((f"{number}", {"png": picture.getvalue(), "txt": color.encode(), "json": captions}))
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
def test_the_whole_story(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "_steps_per_second", lambda config: 1000.0)
    out = tmp_path / "runs" / "demo"
    html, png = demo.run_demo(out, data=data)
    assert (html, png) == (out / "report.html", out / "report.png")
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
    for number, phase in enumerate(("drawings", "training", "evaluation", "report"), 1):
        assert re.search(rf"^\[{number}/4\] {phase} \.\.\.$", printed, re.MULTILINE)
        assert re.search(rf"^\[{number}/4\] {phase}: \d+\.\d s$", printed, re.MULTILINE)
    for style in ("OpenMoji, a style never seen", "Twemoji, the drawings trained on"):
        # Of eight classes chance is 12.5 %.
        share, times = re.search(rf"^{style} +([\d.]+)% \((\d+) x chance\)", printed, re.MULTILINE).groups()
        assert int(times) == round(float(share) / 12.5)
    # The same folder again: the earlier demo is replaced.
    demo.run_demo(out, data=data)


@pytest.mark.usefixtures("small_recipe")
@pytest.mark.parametrize(("speed", "steps", "warmup"), [(10.0, 4, 2), (2 / 60, 2, 1), (0.001, 1, 0)])
def test_the_budget_shortens_but_never_lengthens(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, speed: float, steps: int, warmup: int
) -> None:
    monkeypatch.setattr(demo, "_steps_per_second", lambda config: speed)
    config = demo.demo_config(tmp_path / "run", data)
    schedule = demo.fit_to_budget(config, 1.0, say=lambda message: None).schedule
    assert (schedule.steps, schedule.warmup_steps) == (steps, warmup)


@pytest.mark.parametrize(("multiplies", "precision"), [(True, "amp_bf16"), (False, "fp32")])
def test_bfloat16_only_where_the_processor_multiplies_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, multiplies: bool, precision: str
) -> None:
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


def test_another_run_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("model: {name: EVA02-CLIP-B-16}\n")
    with pytest.raises(UserError, match="holds another run, which the demo would replace"):
        demo.run_demo(tmp_path)
    with pytest.raises(UserError, match="more than 0 minutes, got -1"):
        demo.run_demo(tmp_path, minutes=-1)
