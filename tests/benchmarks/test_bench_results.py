"""Rows, their derived numbers, and the files."""

from pathlib import Path

import pytest
from bench_fakes import machine, row

from benchmarks.results import Results, read_results
from evaclip.errors import UserError


def test_derived_numbers() -> None:
    measured = row(samples_ms=[[4.0, 1.0], [2.0, 3.0, 5.0]], bytes=6e6, flops=3e9, floor_ms=1.5)
    assert measured.times == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert measured.median_ms == 3.0
    assert (measured.quantile_ms(0.2), measured.quantile_ms(0.8)) == (2.0, 4.0)
    assert measured.gigabytes_per_second == pytest.approx(2.0)
    assert measured.tflops == pytest.approx(1.0)
    assert measured.roofline == pytest.approx(0.5)


@pytest.mark.parametrize(("error", "broken"), [(2e-3, False), (2.1e-3, True), (float("nan"), True), (None, False)])
def test_the_error_rule(error: float | None, broken: bool) -> None:
    assert row(error=error, baseline_error=1e-3).breaks_error_rule is broken


def test_a_file_holds_everything(tmp_path: Path) -> None:
    results = Results(
        machine(notes=["busy"]), [row(), row(candidate="torch eager", failure="E: x")], {"apex": "absent"}
    )
    results.write_json(tmp_path / "run.json")
    assert read_results(tmp_path / "run.json") == results


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "can't read"),
        ("[]", "isn't a benchmark result of format"),
        ('{"format": 0}', "isn't a benchmark result of format"),
        ('{"format": 1, "rows": []}', "isn't a whole benchmark result"),
        ('{"format": 1, "rows": [{"op": 1}], "machine": {}, "absent": {}}', "isn't a whole benchmark result"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_results(path)
    with pytest.raises(UserError, match="can't read"):
        read_results(tmp_path / "missing.json")


def test_in_a_folder_the_file_is_named_after_the_run(tmp_path: Path) -> None:
    where = machine(name="NVIDIA H100 80GB HBM3", date="2026-11-24T19:00:00+00:00", commit="1ba15733d153+")
    Results(where, []).write_json(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["nvidia-h100-80gb-hbm3-2026-11-24-1ba15733d153.json"]
