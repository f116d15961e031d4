"""Stored and printed results, and whole evaluations with unreadable samples."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from eval_fakes import COLORS, ColorModel, ToTensor, png, tokenize_colors, write_tar
from rich.console import Console

from evaclip.data import open_source
from evaclip.errors import Refused, UserError
from evaclip.eval.features import FeatureOptions
from evaclip.eval.results import DataFacts, Evaluation, ModelFacts, print_classes, print_evaluation
from evaclip.eval.runs import Setting, run_knn, run_linear_probe, run_retrieval, run_zero_shot
from evaclip.loading import LoadedModel


def evaluation(task: Any = "zero-shot", **metrics: Any) -> Evaluation:
    model = ModelFacts("tiny", "somewhere", 1234, "ab" * 32)
    data = DataFacts("data/*.tar", "f" * 32, 8, 2)
    return Evaluation(task, "Colours", metrics, model, data, "ToTensor()", "fp32", "cpu", 1.5)


def zero_shot() -> Evaluation:
    worst = {"name": "red", "samples": 4, "top1": 0.0, "top5": 0.5, "mistaken_for": "blue"}
    best = {"name": "blue", "samples": 4, "top1": 1.0, "top5": 1.0, "mistaken_for": None}
    return evaluation(
        samples=8, classes=1000, top1=0.5, top5=0.75, mean_per_class=0.5, chance_top1=0.001, chance_top5=0.005,
        per_class=[best, worst],
    )  # fmt: skip


def printed(function: Any, subject: Evaluation) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    function(subject, console)
    return console.export_text()


def test_evaluation_round_trip(tmp_path: Path) -> None:
    result = zero_shot()
    result.save(tmp_path / "deep" / "r.json")
    assert Evaluation.load(tmp_path / "deep" / "r.json") == result
    stored = json.loads((tmp_path / "deep" / "r.json").read_text())
    assert stored["versions"]["torch"]
    assert stored["machine"]["cores"] >= 1
    assert stored["date"].endswith("+00:00")


@pytest.mark.parametrize("content", ["", "[1]", '{"model": {}, "data": {}}'])
def test_evaluation_load_wrong_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"r\.json is no evaluation result"):
        Evaluation.load(path)


def test_print_evaluation_and_classes() -> None:
    text = printed(print_evaluation, zero_shot())
    assert "1,000 classes" in text
    assert any("top-1" in line and "50.00 %" in line and "0.10 %" in line for line in text.splitlines())
    assert "2 of 10 samples" in text
    metrics = {"samples": 8, "top1": 0.5, "top5": 1.0, "mean_per_class": 0.5, "chance_top1": 0.5, "strength": 1.0}
    text = printed(print_evaluation, evaluation("linear-probe", train_samples=20, train_unreadable=1, **metrics))
    assert "1 of 21 samples to train on" in text
    lines = printed(print_classes, zero_shot()).splitlines()
    red, blue = (next(i for i, line in enumerate(lines) if line.startswith(f"│ {name}")) for name in ("red", "blue"))
    assert red < blue
    assert "blue" in lines[red]


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
        lambda setting: run_linear_probe(setting, setting.source, None),
        lambda setting: run_knn(setting, setting.source, None),
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


def test_run_refuses_unreadable_training_samples(tmp_path: Path) -> None:
    good, bad = setting(shard(tmp_path / "good.tar", 0)), shard(tmp_path / "bad.tar", 5)
    with pytest.raises(Refused, match=r"5 of the 20 samples of .*bad\.tar"):
        run_linear_probe(good, open_source(str(bad)), None)
    few = open_source(str(shard(tmp_path / "few.tar", 1)))
    assert run_linear_probe(good, few, None).metrics["train_unreadable"] == 1
