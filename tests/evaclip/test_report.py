import argparse
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evaclip.errors import UserError
from evaclip.eval.gallery import Found, Gallery, Query, Section, thumbnail
from evaclip.eval.results import DataFacts, Evaluation, ModelFacts
from evaclip.report import add_commands, write_report
from evaclip.report.charts import Bar, percent, short_number, times_chance
from evaclip.report.run_data import duration, loss_curve, read_run

CONFIG = """\
name: shapes
batch_size: 256
precision: fp32
model: {name: tiny}
data: {train: "data/<shards>.tar"}
loss: {name: clip}
optim: {name: adamw, lr: 0.001}
"""


def log_record(step: int, loss: float | None) -> dict[str, Any]:
    return {
        "step": step,
        "samples": step * 256,
        "epoch": step / 4,
        "loss": loss,
        "skipped": 0,
        "samples_per_second": 100.0 + step,
        "mfu": 0.25,
        "seconds": step * 2.0,
    }


def save_evaluations(folder: Path) -> None:
    model = ModelFacts("tiny", "runs/shapes/checkpoints/step_00000040/model.safetensors", 1_500_000, "ab" * 32)
    data = DataFacts("data", "f", 200, 0)
    zero_shot = {"samples": 200, "classes": 50, "top1": 0.4, "top5": 0.8, "chance_top1": 0.02}
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
    lines = [json.dumps(record) for record in [*records, {"step": 40, "eval": {"top1": 0.4}}]]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")
    return folder


class _Page(HTMLParser):
    """Collects the tags, all addresses and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "img":
            self.images.append(values)
        elif tag not in ("meta", "use", "br"):
            self.open.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data") and v]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("use", "meta"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v]

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_whole_and_needs_nothing_from_outside(run: Path) -> None:
    save_evaluations(run)
    save_gallery(run)
    html, png = write_report(run)
    text = html.read_text(encoding="utf-8")
    page = _Page(text)
    assert page.open == []
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert not re.search(r"<(script|link|iframe)\b", text)
    with Image.open(png) as poster:
        assert poster.format == "PNG"
        assert poster.width == 1800
        assert poster.height > poster.width
    assert sorted(path.name for path in run.glob("*report*")) == ["report.html", "report.png"]


def test_the_page_says_what_was_measured(run: Path) -> None:
    save_evaluations(run)
    save_gallery(run)
    text = " ".join(_Page(write_report(run)[0].read_text(encoding="utf-8")).words)
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


def test_the_right_pictures_are_framed(run: Path) -> None:
    save_gallery(run)
    images = _Page(write_report(run)[0].read_text(encoding="utf-8")).images
    assert [image.get("class") for image in images] == [None, "correct", None, None]


def test_the_charts_follow_the_theme(run: Path) -> None:
    save_evaluations(run)
    text = write_report(run)[0].read_text(encoding="utf-8")
    charts = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(charts) == 2
    for chart in charts:
        assert "var(--accent)" in chart
        assert "var(--chance)" in chart
        assert set(re.findall(r"#[0-9a-f]{6}", chart)) <= {"#000000"}
    for variable in set(re.findall(r"var\((--[a-z-]+)\)", text)):
        assert f"{variable}:" in text


def test_without_evaluations_the_report_says_so(run: Path) -> None:
    html, png = write_report(run)
    assert "Nothing has been evaluated yet" in html.read_text(encoding="utf-8")
    assert png.is_file()


def test_a_report_is_written_where_asked_and_twice_the_same(run: Path, tmp_path: Path) -> None:
    save_evaluations(run)
    first, _ = write_report(run, tmp_path / "a")
    second, _ = write_report(run, tmp_path / "b")
    assert first.parent == tmp_path / "a"
    assert first.read_bytes() == second.read_bytes()
    assert not (run / "report.html").exists()


def test_the_command_prints_both_paths(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    args = parser.parse_args(["report", str(run)])
    args.run(args)
    assert capsys.readouterr().out.split() == [str(run / "report.html"), str(run / "report.png")]


def test_groups_come_from_evaluations_in_the_order_of_tasks(run: Path) -> None:
    save_evaluations(run)
    groups = read_run(run).groups
    assert [group.title for group in groups] == [
        "Shapes & more: zero-shot",
        "Shapes & more: text finds picture",
        "Shapes & more: picture finds text",
    ]
    assert groups[0].bars == (Bar("top-1", 0.4, 0.02, main=True), Bar("top-5", 0.8, 0.1))
    assert [bar.label for bar in groups[1].bars] == ["first", "within 5", "within 10"]


def test_the_loss_curve_is_smoothed_by_a_trailing_mean() -> None:
    records = [log_record(step, float(step % 2)) for step in range(1, 201)]
    curve = loss_curve(records, 64, "clip")
    assert curve.smooth[0] == 1.0
    assert curve.smooth[3:] == [0.5] * 197
    assert curve.guessing == math.log(64)
    assert loss_curve(records, 64, "siglip").guessing is None


def test_folders_that_are_no_runs_are_told(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no run folder: it has no log\.jsonl"):
        write_report(tmp_path)
    (run / "log.jsonl").write_text(json.dumps(log_record(1, None)) + "\n")
    with pytest.raises(UserError, match="holds no losses yet"):
        write_report(run)


def test_numbers_have_the_digits_they_deserve() -> None:
    assert [percent(share) for share in (0, 0.00052, 0.0052, 0.0123, 0.063, 0.9)] == [
        "0 %",
        "0.052 %",
        "0.52 %",
        "1.2 %",
        "6.3 %",
        "90.0 %",
    ]
    assert times_chance(Bar("", 0.06, 0.0005)) == "120 ×"  # noqa: RUF001
    assert times_chance(Bar("", 0.0006, 0.0005)) == "1.2 ×"  # noqa: RUF001
    assert [short_number(value) for value in (12, 1_500, 2_000_000, 3e9)] == ["12", "1.5k", "2M", "3B"]
    assert [duration(seconds) for seconds in (4.4, 65, 3725)] == ["4 s", "1 min 5 s", "1 h 2 min"]
