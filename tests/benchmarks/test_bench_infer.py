"""Embeddings by engine, of a tiny model: who is measured, who is named, and what a wrong engine looks like."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import cli, engines, infer
from benchmarks.engines import ENGINES, Engine
from benchmarks.results import read_results


@pytest.fixture(autouse=True)
def without_pauses(monkeypatch, steady):
    monkeypatch.setattr(infer, "_PAUSE", 0)


def run(tmp_path: Path, *arguments: str) -> dict[tuple[str, str], infer.Row]:
    file = tmp_path / "infer.json"
    assert cli.main(["infer", "--model", "tiny", "--rounds", "1", "--json", str(file), *arguments]) == 0
    return {(row.candidate, row.shape): row for row in read_results(file).rows}


def test_engines_take_turns_on_the_same_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("evaclip", "open_clip", "onnxruntime")
    rows = run(tmp_path, "--tower", "both", "--batch", "1", "4", "--dtype", "fp32", "--engine", *chosen)
    for engine in chosen:
        for shape in ("tiny b1", "tiny b4"):
            assert rows[engine, shape].cosine > 0.9999
            assert len(rows[engine, shape].times) == 1
    shown = capsys.readouterr().out
    for told in ("encode_image: median", "encode_text: median", "random weights"):
        assert told in shown


@pytest.mark.slow
def test_the_export_of_open_clips_model_is_another_engine(tmp_path: Path) -> None:
    engines = ("onnxruntime-open_clip", "openvino-open_clip")
    rows = run(tmp_path, "--batch", "2", "--dtype", "fp32", "--engine", *engines)
    absent = read_results(tmp_path / "infer.json").absent
    for engine in engines:
        assert f"encode_image: {engine}" in absent or rows[engine, "tiny b2"].cosine > 0.9999


def test_weights_of_fewer_bits_are_told_by_their_cosine(tmp_path: Path) -> None:
    rows = run(tmp_path, "--batch", "2", "--dtype", "int8", "--engine", "onnxruntime")
    assert 0.99 < rows["onnxruntime", "tiny b2"].cosine < 0.9995


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["evaclip-compile", "compile-freezing"])
def test_what_torch_compiles_gives_the_same(engine: str, tmp_path: Path) -> None:
    assert run(tmp_path, "--batch", "1", "--dtype", "fp32", "--engine", engine)[engine, "tiny b1"].cosine > 0.9999


def test_who_is_absent_fails_or_is_slow_is_named(tmp_path, monkeypatch, capsys):
    def broken(subject: engines.Subject, dtype: str) -> engines.Run:
        raise RuntimeError("no such kernel")

    ours = next(engine for engine in ENGINES if engine.name == "evaclip")
    fakes = [
        Engine("broken", "peer", ("torch",), ("fp32",), broken),
        Engine("missing", "peer", ("no-such-package",), ("fp32",), broken),
        Engine("of_text", "peer", ("torch",), ("fp32",), broken, towers=("text",)),
        replace(ours, name="backwards", build=lambda subject, dtype: _backwards(ours.build(subject, dtype))),
    ]
    monkeypatch.setattr(infer, "ENGINES", (*fakes, ours))
    rows = run(tmp_path, "--batch", "2", "--dtype", "fp32")
    shown = capsys.readouterr().out
    assert "absent: encode_image: missing, not installed: pip install no-such-package" in shown
    assert "absent: encode_image: of_text, has no image tower" in shown
    assert "broken fp32: RuntimeError: no such kernel" in shown
    assert rows["backwards", "tiny b2"].cosine < 0.9
    assert "!" in next(line for line in shown.splitlines() if line.startswith("backwards"))
    assert rows["evaclip", "tiny b2"].times
    monkeypatch.setattr(infer, "LONGEST", 0)
    assert "a call takes" in run(tmp_path, "--batch", "2", "--dtype", "fp32")["evaclip", "tiny b2"].failure


def _backwards(run: engines.Run) -> engines.Run:
    """Embeddings with their elements in the opposite order."""
    return lambda batch: run(batch)[:, ::-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--engine", "onnxruntim"], "unknown engine 'onnxruntim'; did you mean 'onnxruntime'"),
        (["--batch", "0"], "--batch and --rounds are 1 or more, got 0 and 5"),
        (["--model", "tiny", "--pictures", "nowhere"], "no photographs in nowhere; expected --pictures FOLDER"),
    ],
)
def test_wrong_input_is_named(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["infer", *arguments]) == 2
    assert message in capsys.readouterr().err
