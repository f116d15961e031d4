"""`evaclip eval` on the command line, and models by name."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from eval_fakes import COLORS, ColorModel, ToTensor, evaclip, png, tokenize_colors, write_tar
from image_files import write_class_folders
from safetensors.torch import load_file

from evaclip.commands.main import main
from evaclip.data import open_source
from evaclip.errors import Refused, UserError
from evaclip.eval.features import FeatureOptions
from evaclip.eval.runs import Setting, run_probe, run_retrieval, run_zero_shot
from evaclip.loading import LoadedModel, load_model
from evaclip.report import write_report

pytestmark = pytest.mark.xdist_group("evaluation")


@pytest.fixture
def run(averaged_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(averaged_run, tmp_path / "run"))


def test_zero_shot_command(run: Path, color_shard: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names, out = run / "names.txt", run / "result.json"
    names.write_text("\n".join(COLORS))
    common = ("--data", color_shard, "--classes", names, "--title", "Eight Colours!", "--workers", 0)
    evaclip("eval", "zero-shot", run, *common, "--templates", "a {} square", "--show-classes", "--json", out)
    assert "zero-shot: Eight Colours!" in capsys.readouterr().out
    stored = json.loads(out.read_text())
    (result,) = (run / "evaluations").glob("zero-shot-eight-colours-*.json")
    assert result.read_text() == out.read_text()
    assert stored["metrics"]["samples"] == stored["metrics"]["classes"] == 8
    assert stored["prompts"] == {"classes": list(COLORS), "templates": ["a {} square"]}
    assert stored["model"]["origin"].endswith("ema.safetensors")
    evaclip("eval", "zero-shot", run, *common, "--caption-key", "cls", "--templates", "a {} square")
    assert json.loads(result.read_text())["metrics"] == stored["metrics"]


def test_results_of_other_settings_are_kept(run: Path, color_shard: Path) -> None:
    common = ("--data", color_shard, "--title", "Colours", "--workers", 0)
    for options in ((), ("--no-average",), ("--templates", "a {} square"), ()):
        evaclip("eval", "zero-shot", run, *common, *options)
    assert len(list((run / "evaluations").iterdir())) == 3
    page = write_report(run).read_text()
    for setting in ("moving average of the steps, {}", "of the last step, {}", "moving average of the steps, a {} squ"):
        assert f"8 classes, {setting}" in page


def test_retrieval_command_and_report(run: Path, color_shard: Path) -> None:
    evaclip("eval", "retrieval", run / "checkpoints" / "step_00000003", "--data", color_shard, "--workers", 0)
    (result,) = (run / "evaluations").iterdir()
    assert json.loads(result.read_text())["metrics"]["images"] == 8
    assert "images searched" in write_report(run).read_text()


@pytest.mark.parametrize(("task", "kind"), [("linear-probe", "clip"), ("knn", "image model")])
def test_probe_command(task: str, kind: str, run: Path, tmp_path: Path) -> None:
    for seed, part in enumerate(("train", "test")):
        write_class_folders(tmp_path / part, {"red": (150, 0, 0), "blue": (0, 0, 150)}, 6, seed)
    out = tmp_path / "probe.json"
    common = ("--train", tmp_path / "train", "--data", tmp_path / "test", "--cache", tmp_path / "cache")
    model: Path | str = run
    if kind == "image model":
        model = "eva02_tiny_patch14_224"  # with random weights
    evaclip("eval", task, model, *common, "--workers", 0, "--json", out)
    assert json.loads(out.read_text())["metrics"]["top1"] == 1.0
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_load_model_of_run(run: Path, tmp_path: Path) -> None:
    checkpoint = run / "checkpoints" / "step_00000003"
    for average, file in ((True, "ema.safetensors"), (False, "model.safetensors")):
        loaded = load_model(str(run), average=average)
        expected = load_file(checkpoint / file)["visual.head.weight"]
        assert torch.equal(loaded.model.state_dict()["visual.head.weight"], expected)
        assert loaded.origin.endswith(file)
        assert loaded.run == run
    assert loaded.name == "tiny"
    assert loaded.transform.size == loaded.model.config.vision.image_size

    checkpoint = Path(shutil.copytree(run / "checkpoints" / "step_00000003", tmp_path / "alone"))
    alone = load_model(str(checkpoint), average=False)
    assert alone.run is None
    named = load_model(f"tiny:{checkpoint / 'model.safetensors'}")
    assert torch.equal(named.model.text.text_projection, alone.model.text.text_projection)
    assert load_model("tiny").origin == "random weights"


def test_load_model_wrong_name(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder 'runs/none'; give a run folder"):
        load_model("runs/none")
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        load_model("tinny")
    (run / "checkpoints" / "step_00000003" / "model.json").unlink()
    with pytest.raises(UserError, match="give it as NAME:"):
        load_model(str(run))
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        load_model(str(tmp_path))


def test_retrieval_command_unreadable_samples(run, tmp_path, capsys):
    samples = {name: {"png": png(color), "txt": name.encode()} for name, color in COLORS.items()}
    samples["red"]["png"] = samples["blue"]["png"] = b"damaged"
    path = str(write_tar(tmp_path / "x.tar", samples))
    words = ["eval", "retrieval", str(run), "--data", path, "--workers", "0"]
    assert main(words) == 1
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: 2 of the 8 samples of")
    assert "R@1" not in captured.out
    assert main([*words, "--allow-unreadable", "--exif-orientation"]) == 0
    assert "2 of 8 samples could not be read" in capsys.readouterr().out
    (result,) = (run / "evaluations").iterdir()
    data = json.loads(result.read_text())["data"]
    assert (data["unreadable"], data["exif_orientation"]) == (2, True)


def test_wrong_arguments_are_noticed_before_loading(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", {"a": {"png": png((0, 0, 0)), "txt": b"black"}})
    (tmp_path / "file").touch()
    for option in ("--json", "--cache"):
        with pytest.raises(UserError, match=rf"^cannot write {tmp_path}/file/out\S*: Not a directory"):
            evaclip("eval", "zero-shot", "no-model", "--data", shard, option, tmp_path / "file" / "out")
    with pytest.raises(UserError, match=r"none\.tar"):
        evaclip("eval", "zero-shot", "no-model", "--data", tmp_path / "none.tar")
    with pytest.raises(UserError, match="batch_size"):
        evaclip("eval", "retrieval", "no-model", "--data", shard, "--batch-size", 0)
    with pytest.raises(UserError, match=r"lacks the placeholder|cannot read templates"):
        evaclip("eval", "zero-shot", "no-model", "--data", shard, "--templates", "a photo")


def shard(path: Path, unreadable: int) -> Path:
    """20 images of two colours, the first ones damaged."""
    names = list(COLORS)[:2]
    samples = {
        f"{number:03d}": {
            "png": b"damaged" if number < unreadable else png(COLORS[names[number % 2]], 4 + number),
            "txt": names[number % 2].encode(),
        }
        for number in range(20)
    }
    return write_tar(path, samples)


def setting(path: Path, **options: Any) -> Setting:
    loaded = LoadedModel("fake", "nowhere", ColorModel(), tokenize_colors, ToTensor())  # type: ignore[arg-type]
    features = FeatureOptions(batch_size=1, progress=False)
    return Setting(loaded, str(path), open_source(str(path)), "Two colours", features, **options)


@pytest.mark.parametrize(
    "run",
    [
        lambda setting: run_zero_shot(setting, None, ["{}"]),
        lambda setting: run_retrieval(setting)[0],
        lambda setting: run_probe("linear-probe", setting, setting.source, None),
        lambda setting: run_probe("knn", setting, setting.source, None),
    ],
    ids=["zero-shot", "retrieval", "linear-probe", "knn"],
)
def test_run_refuses_many_unreadable_samples(run: Any, tmp_path: Path) -> None:
    result = run(setting(shard(tmp_path / "few.tar", 2)))
    assert (result.data.samples, result.data.unreadable) == (18, 2)
    many = shard(tmp_path / "many.tar", 3)
    with pytest.raises(Refused, match=r"^3 of the 20 samples of \S*many.tar could not be read, more than 10%, .*allow"):
        run(setting(many))
    result = run(setting(many, allowed_unreadable=1.0))
    assert (result.data.samples, result.data.unreadable) == (17, 3)
