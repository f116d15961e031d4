import json
import math
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from html_page import Page
from matplotlib.figure import Figure
from PIL import Image

from evaclip.commands.main import main
from evaclip.errors import UserError
from evaclip.eval.results import DataFacts, Evaluation, Found, Gallery, ModelFacts, Query, Section
from evaclip.eval.runs import thumbnail
from evaclip.report import write_report
from evaclip.report.charts import Bar, Series, draw_loss, panels, percent, short_number, thinned, times_chance
from evaclip.report.page import render_page
from evaclip.report.run_data import duration, loss_curve, read_run
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


def test_report_loads_nothing_from_elsewhere(run: Path) -> None:
    save_evaluations(run)
    save_gallery(run)
    text = write_report(run).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert not re.search(r"<(script|link|iframe)\b", text)
    assert [path.name for path in run.glob("*report*")] == ["report.html"]


def test_the_page_says_what_was_measured(run: Path) -> None:
    save_evaluations(run)
    save_gallery(run)
    text = " ".join(Page(render_page(read_run(run))).words)
    for expected in (
        "40.0 %",
        "20 × chance",  # noqa: RUF001
        "Shapes & more: zero-shot",
        "200 pictures, 400 captions",
        "a <green> thing",
        "place 77 of 200",
        "data/<shards>.tar",
        "1,500,000",
        "guessing among 256: 5.55",
        "10,240 (10.0 epochs)",
    ):
        assert expected in text, expected


def test_report_shows_classes_and_validation(run: Path) -> None:
    save_evaluations(run)
    data = read_run(run)
    (rows,) = data.classes.values()
    assert [row[0] for row in rows] == [f"<{n}>" for n in (49, 48, 47, 46, 45, 4, 3, 2, 1, 0)]
    assert data.validation == [("top1", "40.00%", "40")]
    words = " ".join(Page(render_page(data)).words)
    for expected in ("<49> 4 98% <0>", "Validation while training", "top1 40.00% 40"):
        assert expected in words, expected


def test_report_has_no_credentials(run: Path) -> None:
    config = yaml.safe_load(CONFIG)
    config["data"]["train"] = address = "s3://bucket/00.tar?X-Amz-Signature=abc123"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    save_events(run)
    time = {"time": "2026-11-25T10:00:30+00:00", "step": 30}
    with (run / "events.jsonl").open("a") as file:
        file.write(json.dumps({**time, "message": f"changed since the checkpoint: data.train: {address} -> x.tar"}))
    text = render_page(read_run(run))
    assert "s3://bucket/00.tar" in text
    assert "abc123" not in text


@pytest.mark.parametrize("task", ["contrastive", "classification", "masked_image"])
def test_a_report_speaks_of_what_the_task_has(task: str, run: Path) -> None:
    (run / "config.yaml").write_text(f"{CONFIG}task: {{name: {task}}}\n")
    write_lines(run / "log.jsonl", [log_record(step, -0.1 * step) for step in (1, 2, 3)])
    data = read_run(run)
    words = " ".join(Page(render_page(data)).words)
    assert ("768 image-text pairs in" in words, "768 pictures in" in words) == (
        (True, False) if task == "contrastive" else (False, True)
    )
    assert ("guessing among 256" in words) == ("which of the batch's texts" in words) == (task == "contrastive")
    figure = Figure()
    draw_loss(figure.subplots(), data.curve)
    low, high = figure.axes[0].get_ylim()
    assert low < -0.3 <= 0 <= high


def test_the_right_pictures_are_framed(run: Path) -> None:
    save_gallery(run)
    images = Page(render_page(read_run(run))).images
    assert [image.get("class") for image in images] == [None, "correct", None, None]


def test_the_charts_follow_the_theme(run: Path) -> None:
    save_evaluations(run)
    text = render_page(read_run(run))
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) == 2 + 8
    assert all("var(--chance)" in chart for chart in charts[:2])
    for chart in charts:
        assert "var(--accent)" in chart
        assert set(re.findall(r"#[0-9a-f]{6}", chart)) <= {"#000000"}
    for variable in set(re.findall(r"var\((--[a-z0-9-]+)\)", text)):
        assert f"{variable}:" in text


def test_every_number_that_was_logged_has_a_chart(run: Path) -> None:
    figures = re.findall(r"<figcaption>(.*?)</figcaption>", render_page(read_run(run)))
    assert figures == [
        "Accuracy in the batch", "Learning rate", "Gradient norm", "Loss scale", "Samples a second",
        "Model FLOP/s over the peak (MFU)", "Left out so far", "Evaluation: top1",
    ]  # fmt: skip
    charts = {panel.title: panel.series for panel in panels(read_run(run).log)}
    assert [series.label for series in charts["Gradient norm"]] == ["all", "image tower", "text tower"]
    assert [series.label for series in charts["Learning rate"] if series.y] == ["image tower", "the rest"]
    assert charts["Evaluation: top1"][0] == Series("", [40 * 256], [0.4])


def test_long_logs_are_thinned_without_losing_a_peak() -> None:
    points = [(x, 100.0 if x == 77_777 else x % 7 / 7) for x in range(100_000)]
    kept = thinned(points)
    assert len(kept) <= 2000
    assert (77_777, 100.0) in kept
    assert kept == sorted(kept)
    assert thinned(points[:2000]) == points[:2000]


def test_the_history_and_the_machine_are_told(run: Path) -> None:
    save_events(run)
    data = read_run(run)
    assert [step for _, step, _ in data.events] == [0, 1, 2, 3]
    text = " ".join(Page(render_page(read_run(run))).words)
    for expected in (
        "25 November 2026, 10:00:01", "start of 8 processes", "went <back> to step_00000010", "OSError: disk",
        "8, started 2 times", "A <fast> one, 2 cores", "GPU 9000", "9.9.9", "no sign of life for",
    ):  # fmt: skip
        assert expected in text, expected


def test_a_return_to_a_checkpoint_is_marked(run: Path) -> None:
    records = [{**log_record(step, 2.0), "samples": place * 256} for place, step in enumerate((1, 2, 3, 2, 3), 1)]
    write_lines(run / "log.jsonl", records)
    assert read_run(run).curve.returns == (4 * 256,)
    text = render_page(read_run(run))
    assert "Vertical lines: the run went back" in text


def test_several_runs_stand_beside_each_other(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = [tmp_path / "other" / "shapes", tmp_path / "<third>"]
    for number, other in enumerate(others, 2):
        shutil.copytree(run, other)
        config = CONFIG.replace("lr: 0.001", f"lr: 0.00{number}")
        (other / "config.yaml").write_text(config)
        write_lines(other / "log.jsonl", [log_record(step, 1.0 * number) for step in range(1, 6)])
    folders = [str(run), *map(str, others)]
    assert main(["report", *folders, "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / "comparison.html")]
    text = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    words = " ".join(page.words)
    for expected in ("other/shapes", "<third>", "optim.lr", "0.002", "0.003", "2.0000", "Gradient norm: text tower"):
        assert expected in words, expected
    assert "batch_size" not in words
    for variable in set(re.findall(r"var\((--[a-z0-9-]+)\)", text)):
        assert f"{variable}:" in text
    assert main(["report", *folders]) == 2
    assert "--output must name a folder" in capsys.readouterr().err
    assert main(["report", folders[0], folders[0], "--output", str(tmp_path)]) == 2
    assert "the same run is given twice" in capsys.readouterr().err
    assert main(["report", folders[0], "--output", str(run / "config.yaml")]) == 2
    assert re.search(r"^error: cannot write \S+report.html: Not a directory", capsys.readouterr().err)


def test_a_run_of_the_trainer_has_a_report(run_config, tmp_path):
    """Nothing but what `evaclip train` leaves."""
    val = "{val: {data: {num_samples: 32, workers: 0}, samples: 8}}"
    config = run_config("schedule.steps=4", "log.progress=none", f"eval={{sets: {val}, every_steps: 2}}")
    train(config)
    text = render_page(read_run(tmp_path / "run"))
    figures = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    for expected in (
        "Tokens a second", "Update over weights, a step", "Memory, GiB", "Accuracy in the batch",
        "Evaluation: val/zero_shot_top1", "Evaluation: val/loss", "Evaluation: seconds",
    ):  # fmt: skip
        assert expected in figures
    assert "Loss scale" not in figures
    words = Page(text).words
    assert "start of 1 process" in words
    assert "ended: done" in words


def test_without_evaluations_the_report_says_so(run: Path) -> None:
    assert "Nothing has been evaluated yet" in write_report(run).read_text(encoding="utf-8")


def test_report_is_deterministic(run: Path, tmp_path: Path) -> None:
    save_evaluations(run)
    first = write_report(run, tmp_path / "a")
    second = write_report(run, tmp_path / "b")
    assert first.parent == tmp_path / "a"
    assert first.read_bytes() == second.read_bytes()
    assert not (run / "report.html").exists()


def test_the_command_prints_the_path(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out.split() == [str(run / "report.html")]


def test_report_groups_follow_the_order_of_tasks(run: Path) -> None:
    save_evaluations(run)
    found = replace(Evaluation.load(run / "evaluations" / "zero-shot.json"), task="classify")
    found.save(run / "evaluations" / "a.json")
    groups = read_run(run).groups
    assert [group.title for group in groups] == [
        "Shapes & more: zero-shot",
        "Shapes & more: classification",
        "Shapes & more: text finds picture",
        "Shapes & more: picture finds text",
    ]
    assert groups[0].bars == (Bar("top-1", 0.4, 0.02, main=True), Bar("top-5", 0.8, 0.1))
    assert [bar.label for bar in groups[2].bars] == ["first", "within 5", "within 10"]


def test_the_loss_curve_is_smoothed_by_a_trailing_mean() -> None:
    records = [log_record(step, float(step % 2)) for step in range(1, 201)]
    curve = loss_curve(records, 64, "clip")
    assert curve.smooth[0] == 1.0
    assert curve.smooth[3:] == [0.5] * 197
    assert curve.guessing == math.log(64)
    assert loss_curve(records, 64, "siglip").guessing is loss_curve(records, 64, None).guessing is None


def test_folders_that_are_no_runs_are_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run folder: it has no log\.jsonl"):
        write_report(tmp_path)
    (run / "log.jsonl").write_text(json.dumps(log_record(1, None)) + "\n")
    with pytest.raises(UserError, match="holds no losses yet"):
        write_report(run)


def test_numbers_have_the_digits_they_deserve() -> None:
    assert [percent(share) for share in (0, 0.00052, 0.0052, 0.0123, 0.063, 0.9)] == [
        "0 %", "0.052 %", "0.52 %", "1.2 %", "6.3 %", "90.0 %",
    ]  # fmt: skip
    assert times_chance(Bar("", 0.06, 0.0005)) == "120 ×"  # noqa: RUF001
    assert times_chance(Bar("", 0.0006, 0.0005)) == "1.2 ×"  # noqa: RUF001
    assert [short_number(value) for value in (12, 1_500, 2_000_000, 3e9)] == ["12", "1.5k", "2M", "3B"]
    assert [duration(seconds) for seconds in (4.4, 65, 3725)] == ["4 s", "1 min 5 s", "1 h 2 min"]


def test_no_report_waits_for_torch() -> None:
    code = "import sys, evaclip.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
