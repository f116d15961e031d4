import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evaclip.errors import UserError
from evaclip.eval.results import DataFacts, Evaluation, ModelFacts, print_classes, print_evaluation


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


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    result = zero_shot()
    result.save(tmp_path / "deep" / "r.json")
    assert Evaluation.load(tmp_path / "deep" / "r.json") == result
    stored = json.loads((tmp_path / "deep" / "r.json").read_text())
    assert stored["versions"]["torch"]
    assert stored["machine"]["cores"] >= 1
    assert stored["date"].endswith("+00:00")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["r.json"]


@pytest.mark.parametrize("content", ["", "[1]", '{"task": "zero-shot"}', '{"model": {}, "data": {}}'])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"r\.json is no evaluation result"):
        Evaluation.load(path)


def test_the_table_shows_accuracy_beside_chance() -> None:
    text = printed(print_evaluation, zero_shot())
    assert "8 pictures, 1,000 classes" in text
    assert any("top-1" in line and "50.00 %" in line and "0.10 %" in line for line in text.splitlines())
    assert "2 of 10 samples could not be read" in text


def test_the_table_tells_of_unreadable_training_samples() -> None:
    metrics = {"samples": 8, "top1": 0.5, "top5": 1.0, "mean_per_class": 0.5, "chance_top1": 0.5, "strength": 1.0}
    text = printed(print_evaluation, evaluation("linear-probe", train_samples=20, train_unreadable=1, **metrics))
    assert "1 of 21 samples to train on could not be read" in text


def test_the_classes_come_worst_first() -> None:
    lines = printed(print_classes, zero_shot()).splitlines()
    red, blue = (next(i for i, line in enumerate(lines) if line.startswith(f"│ {name}")) for name in ("red", "blue"))
    assert red < blue
    assert "blue" in lines[red]
