"""`evaclip report`: the page of a run, the comparison of several, and the text of a running one."""

import json
import os
import re
import shutil
import time
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from html_page import Page
from PIL import Image
from rich.console import Console

from evaclip.commands.main import main
from evaclip.eval.results import DataFacts, Evaluation, Found, Gallery, ModelFacts, Query, Section
from evaclip.eval.runs import thumbnail
from evaclip.report import write_report
from evaclip.report.text import render
from evaclip.runs.files import CONFIG_FILE, EVENTS_FILE, LOCK_FILE, LOG_FILE
from evaclip.runs.lock import Owner, RunLock
from evaclip.runs.log import read_log
from evaclip.train.trainer import train

CONFIG = """\
name: shapes
batch_size: 256
precision: fp32
model: {name: tiny}
data: {train: "data/<shards>.tar"}
loss: {name: clip}
optim: {name: adamw, lr: 0.001}
task: {name: contrastive}
schedule: {steps: 80}
"""


def log_record(step: int, loss: float | None) -> dict[str, Any]:
    return {
        "step": step, "samples": step * 256, "epoch": step / 4, "loss": loss, "lr": 1e-3 / step,
        "lr_visual": 2e-3 / step, "accuracy": 0.01 * step, "loss_scale": 65536.0 if step < 9 else 32768.0,
        "grad_norm": 2.0, "grad_norm_visual": 1.5, "grad_norm_text": 0.5, "skipped": 0, "bad_samples": step // 30,
        "samples_per_second": 100.0 + step, "mfu": 0.25,
        "seconds": step * 2.0,
    }  # fmt: skip


def save_evaluations(folder: Path) -> None:
    model = ModelFacts("tiny", "runs/shapes/checkpoints/step_00000040/model.safetensors", 1_500_000, "ab" * 32)
    data = DataFacts("data", "f", 200, 0)
    per_class = [
        {"name": f"<{n}>", "samples": 4, "top1": n / 50, "mistaken_for": "<0>" if n else None} for n in range(50)
    ]
    zero_shot = {"samples": 200, "classes": 50, "top1": 0.4, "top5": 0.8, "chance_top1": 0.02, "per_class": per_class}
    direction = {"recall": {"1": 0.1, "5": 0.3, "10": 0.6}, "chance": {"1": 0.005, "5": 0.025, "10": 0.05}}
    retrieval = {"images": 200, "captions": 400, "image_to_text": direction, "text_to_image": direction}
    for task, metrics in (("zero-shot", zero_shot), ("retrieval", retrieval)):
        evaluation = Evaluation(task, "Shapes & more", metrics, model, data, "t", "fp32", "cpu", 3.0)  # type: ignore[arg-type]
        evaluation.save(folder / "evaluations" / f"{task}.json")


def save_gallery(folder: Path) -> None:
    pictures = [thumbnail(Image.new("RGB", (40, 20), color)) for color in ("red", "green", "blue")]
    found = tuple(Found(f"k{i}", i == 1, picture) for i, picture in enumerate(pictures))
    queries = (Query("a <green> thing", 2, found), Query("far away", 77, found[:1]))
    section = Section("Drawn at random", "Not selected.", queries)
    Gallery("What was found", 200, (section,)).save(folder / "galleries" / "g.json")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "shapes"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    records = [log_record(step, 5.5 / step) for step in range(1, 41)]
    records.insert(3, log_record(3, None))
    write_lines(folder / "log.jsonl", [*records, {"step": 40, "eval": {"top1": 0.4, "samples": 200}}])
    return folder


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def save_events(folder: Path) -> None:
    machine = {"system": "Linux", "processor": "A <fast> one", "cores": 2, "gpus": ["GPU 9000"]}
    start = {"processes": 8, "machine": machine, "versions": {"torch": "9.9.9"}}
    events = [{"start": start}, {"message": "went <back> to step_00000010"}, {"end": "OSError: disk"}, {"start": start}]
    times = ({"time": f"2026-11-25T10:00:{second:02}+00:00", "step": second} for second in range(20))
    write_lines(folder / "events.jsonl", [{**next(times), **event} for event in events])


def test_report_without_evaluations_says_so(run: Path) -> None:
    """Unless there is a table of the validation while training."""
    nothing = "Nothing has been evaluated yet"
    assert nothing not in write_report(run).read_text(encoding="utf-8")
    losses = [record for record in read_log(run / LOG_FILE) if "eval" not in record]
    write_lines(run / LOG_FILE, losses)
    assert nothing in write_report(run).read_text(encoding="utf-8")


def test_report_shows_results_and_loads_nothing(run: Path) -> None:
    """Evaluations, the gallery, classes, validation and history, from a page without scripts or other files."""
    save_evaluations(run)
    save_gallery(run)
    assert write_report(run, run / "a").read_bytes() == write_report(run, run / "b").read_bytes()
    save_events(run)
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    words = " ".join(page.words)
    for expected in (
        "40.0 %", "Shapes & more: zero-shot", "place 77 of 200", "data/<shards>.tar", "10,240 (10.0 epochs)",
        "<49> 4 98% <0>", "top1 40.00% 40", "went <back> to step_00000010", "A <fast> one, 2 cores",
    ):  # fmt: skip
        assert expected in words, expected
    assert [image.get("class") for image in page.images] == [None, "correct", None, None]
    assert page.open == []
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert not re.search(r"<(script|link|iframe)\b", text)
    assert [path.name for path in run.glob("*report*")] == ["report.html"]


def test_report_has_no_credentials(run: Path) -> None:
    config = yaml.safe_load(CONFIG)
    config["data"]["train"] = address = "s3://bucket/00.tar?X-Amz-Signature=abc123"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    save_events(run)
    time = {"time": "2026-11-25T10:00:30+00:00", "step": 30}
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({**time, "message": f"changed since the checkpoint: data.train: {address} -> x.tar"}))
    text = write_report(run).read_text(encoding="utf-8")
    assert "s3://bucket/00.tar" in text
    assert "abc123" not in text


def test_comparison_of_several_runs(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = [tmp_path / "other" / "shapes", tmp_path / "<third>"]
    for number, other in enumerate(others, 2):
        shutil.copytree(run, other)
        config = CONFIG.replace("lr: 0.001", f"lr: 0.00{number}")
        (other / "config.yaml").write_text(config)
        write_lines(other / "log.jsonl", [log_record(step, 1.0 * number) for step in range(1, 6)])
    folders = [str(run), *map(str, others)]
    assert main(["report", *folders, "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / "comparison.html")]
    page = Page((tmp_path / "out" / "comparison.html").read_text(encoding="utf-8"))
    words = " ".join(page.words)
    for expected in ("other/shapes", "<third>", "optim.lr", "0.002", "0.003", "2.0000", "Gradient norm: text tower"):
        assert expected in words, expected
    assert main(["report", *folders]) == 2
    assert "--output must name a folder" in capsys.readouterr().err
    assert main(["report", folders[0], folders[0], "--output", str(tmp_path)]) == 2
    assert "the same run is given twice" in capsys.readouterr().err
    assert main(["report", folders[0], "--output", str(run / "config.yaml")]) == 2
    assert re.search(r"^error: cannot write \S+report.html: Not a directory", capsys.readouterr().err)


def test_report_of_trained_run(run_config, tmp_path):
    """Nothing but what `evaclip train` leaves."""
    val = "{val: {data: {num_samples: 32, workers: 0}, samples: 8}}"
    config = run_config("schedule.steps=4", "log.progress=none", f"eval={{sets: {val}, every_steps: 2}}")
    train(config)
    text = write_report(tmp_path / "run").read_text(encoding="utf-8")
    figures = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert {"Tokens a second", "Accuracy in the batch", "Evaluation: val/zero_shot_top1"} <= set(figures)
    assert "Loss scale" not in figures
    assert "MFU" not in text
    assert "MFU" not in state(tmp_path / "run")
    words = Page(text).words
    assert "start of 1 process" in words
    assert "ended: done" in words


def write_run(folder: Path, losses: list[float | None]) -> None:
    folder.mkdir()
    (folder / CONFIG_FILE).write_text("schedule: {steps: 20}\n")
    records = [{"step": i + 1, "loss": loss, "seconds": 2.0 * (i + 1), "skipped": i} for i, loss in enumerate(losses)]
    write_lines(folder / LOG_FILE, [*records, {"step": len(losses), "eval": {"zero_shot_top1": 0.25}}])


def test_report_text_of_running_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", [4.0, 3.0, None, 2.0])
    assert main(["report", str(tmp_path / "run"), "--text"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "run, step 4 of 20, 0:00:08 so far, about 0:00:32 to go" in text
    assert "█▅ ▁" in text
    assert re.search(r"zero_shot_top1, step 4 +│ +25\.00%", text)


def test_report_wrong_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ([], ["--text"]):
        assert main(["report", str(tmp_path), *options]) == 2
        assert "is not a run folder" in capsys.readouterr().err
    (tmp_path / CONFIG_FILE).write_text("name: x\n")
    assert main(["report", str(tmp_path), "--text"]) == 0  # it has not logged yet
    for log, options, reason in (("no JSON\n", ["--text"], LOG_FILE), ('{"step": 1, "loss": null}\n', [], "no losses")):
        (tmp_path / LOG_FILE).write_text(log)
        assert main(["report", str(tmp_path), *options]) == 2
        assert reason in capsys.readouterr().err


def add_events(folder: Path, *events: dict[str, Any]) -> None:
    start = {"start": {"processes": 2}}
    times = [f"2026-11-27T00:00:{second:02d}+00:00" for second in range(60)]
    lines = [{"time": time, "step": 4, **event} for time, event in zip(times, (start, *events), strict=False)]
    write_lines(folder / EVENTS_FILE, lines)


def age(folder: Path, seconds: float) -> None:
    """Makes all files that old."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - seconds,) * 2)


def state(folder: Path) -> str:
    """The text report on a wide terminal, in one line."""
    console = Console(width=400, file=StringIO())
    console.print(render(folder, 400, None))
    return " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]


def test_report_of_a_locked_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder, [4.0, 3.0])
    add_events(folder)
    with RunLock(folder):
        assert "to go" in state(folder)
        age(folder, 7200)
        assert "its lock is held, but nothing was written for 2 h 0 min" in state(folder)
    (folder / LOCK_FILE).write_text(json.dumps(asdict(Owner.of_this_process())))
    age(folder, 7200)
    assert "no sign of life for 2 h 0 min" in state(folder)


def test_report_text_of_ended_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder, [4.0, 3.0])
    for events, expected in (
        ([{"end": None}], "ended: done"),
        ([{"message": "stopped by a signal; ..."}, {"end": None}], "ended: stopped by a signal"),
        ([{"end": "ValueError: no"}], "ended by an error: ValueError: no"),
    ):
        add_events(folder, *events)
        assert expected in state(folder)
        assert "to go" not in state(folder)
    with RunLock(folder):
        assert "starting again" in state(folder)
