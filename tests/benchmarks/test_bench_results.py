"""Rows, verdicts and files; shapes by name and by sizes alone."""

import json
from pathlib import Path

import pytest
from bench_fakes import machine, row

import benchmarks.cases
from benchmarks.operation import get_operation, operations
from benchmarks.render import LEVEL, time_text, verdict_text
from benchmarks.results import Results, contests, read_results, verdict
from benchmarks.shapes import parse_shape, short_names
from evaclip.errors import UserError


def test_row_derived_numbers() -> None:
    measured = row(samples_ms=[[4.0, 1.0], [2.0, 3.0, 5.0]], bytes=6e6, flops=3e9, floor_ms=1.5)
    assert measured.median_ms == 3.0
    assert (measured.quantile_ms(0.2), measured.quantile_ms(0.8)) == (2.0, 4.0)
    assert measured.gigabytes_per_second == pytest.approx(2.0)
    assert measured.tflops == pytest.approx(1.0)
    assert measured.roofline == pytest.approx(0.5)


def test_results_round_trip(tmp_path: Path) -> None:
    rows = [row(), row(candidate="torch eager", failure="E: x")]
    results = Results(machine(notes=["busy"]), rows, {"apex": "absent"})
    results.write_json(tmp_path / "run.json")
    assert read_results(tmp_path / "run.json") == results
    stored = json.loads((tmp_path / "run.json").read_text())
    stored["rows"][0]["cosine"] = 0.99  # a field of earlier versions
    (tmp_path / "run.json").write_text(json.dumps(stored))
    assert read_results(tmp_path / "run.json") == results


def test_published_results_are_readable() -> None:
    for path in (benchmarks.ROOT / "benchmarks/results").glob("*.json"):
        assert contests(read_results(path).rows), path


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 0}', '{"format": 1, "rows": []}'])
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"run\.json"):
        read_results(path)
    with pytest.raises(UserError, match=r"missing\.json"):
        read_results(tmp_path / "missing.json")


@pytest.mark.parametrize(
    ("ours", "eager", "word"),
    [
        ([[1.0, 1.1]], [[2.0, 2.1]], "faster"),
        ([[2.0, 2.0]], [[1.0, 1.0]], "slower"),
        # A disturbance slows down both candidates of its round.
        ([[1.0, 9.0, 1.0]], [[1.2, 11.0, 1.2]], "faster"),
        ([[1.0, 1.0, 1.0, 1.0]], [[1.2, 0.9, 0.9, 1.2]], "level"),
        # Nearly all rounds are faster, the second pass is not.
        ([[1.0] * 9, [1.0]], [[1.1] * 9, [0.9]], "level"),
        # Ours is faster in nearly all rounds, but its median over both passes is the larger one.
        ([[1.8] * 8, [3.9] * 8], [[2.4] * 7 + [2.6], [6.7] * 5 + [2.3] * 3], "level"),
    ],
)
def test_verdict(ours: list[list[float]], eager: list[list[float]], word: str) -> None:
    (contest,) = contests([row(samples_ms=ours), row(samples_ms=eager, candidate="torch eager", kind="baseline")])
    assert verdict(contest).word == word
    assert (verdict_text(contest) == LEVEL) == (word == "level")
    assert ("(slower)" in verdict_text(contest)) == (word == "slower")


def test_best_peer_is_the_fastest_right_one() -> None:
    eager = row(candidate="torch eager", kind="baseline", samples_ms=[[3.0]])
    fast = row(candidate="fast", kind="peer", samples_ms=[], failure="wrong: NaN among the outputs")
    slow = row(candidate="slow", kind="peer", samples_ms=[[4.0]])
    int8 = row(candidate="int8", kind="quantized", samples_ms=[[1.0]])
    (contest,) = contests([row(samples_ms=[[2.0]]), eager, fast, slow, int8])
    assert (contest.rival, contest.fastest("peer")) == (eager, slow)
    assert contest.fastest("ours").candidate == "evakernels cpu"
    assert time_text(contest, "baseline", "peer") == "3.00 torch eager"
    (alone,) = contests([row(samples_ms=[[2.0]]), fast])
    assert time_text(alone, "baseline", "peer") == "wrong"
    assert verdict(alone) is None


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eva02-l14@224 b256", {"tokens": 257, "width": 1024, "heads": 16, "head_dim": 64, "hidden": 2730}),
        ("eva02-l14@224 b256 drop50", {"tokens": 129, "patches": 256, "kept_patches": 128}),
        ("eva-18b@224 b1", {"head_dim": 128}),
        ("eva02-l14:text b256", {"tokens": 77, "width": 768, "heads": 12, "patches": 0}),
    ],
)
def test_shape_sizes(name: str, expected: dict[str, int]) -> None:
    shape = parse_shape(name)
    assert {key: getattr(shape, key) for key in expected} == expected
    assert shape.name == name


def test_shape_names_of_models() -> None:
    assert parse_shape("eva02-l14-336 b2").pixels == 336
    assert parse_shape("EVA02-B16 b2").name == "eva02-b16@224 b2"
    names = short_names()
    assert len(set(names.values())) == len(names)
    assert all(parse_shape(f"{short} b1").model == short for short in names)


@pytest.mark.parametrize(
    "name",
    ["eva02-l14", "eva02-l15@224 b1", "eva02-l14@225 b1", "eva02-l14@224 b0", "eva02-l14@224 b1 drop100",
     "eva02-l14:text b1 drop50"],
)  # fmt: skip
def test_wrong_shape_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=r"eva02-l1|225 pixels"):
        parse_shape(name)


def test_every_operation_has_a_small_shape() -> None:
    for op in operations().values():
        shape = op.shape("small")
        assert shape.name == op.shape(op.small).name
        assert not op.raw_sizes or op.work(shape, 4).forward.bytes > 0
    with pytest.raises(UserError, match="token_dropout"):
        get_operation("token_dropout").shape("2x9x10x8")
