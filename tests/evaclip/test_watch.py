"""`evaclip watch` shows a run from its folder."""

import json
from pathlib import Path

import pytest

from evaclip.commands.main import main
from evaclip.report.live import sparkline
from evaclip.run_files import CONFIG_FILE, LOG_FILE


def write_run(folder: Path, losses: list[float | None]) -> None:
    folder.mkdir()
    (folder / CONFIG_FILE).write_text("schedule: {steps: 20}\n")
    records = [{"step": i + 1, "loss": loss, "seconds": 2.0 * (i + 1), "skipped": i} for i, loss in enumerate(losses)]
    lines = [*records, {"step": len(losses), "eval": {"zero_shot_top1": 0.25}}]
    (folder / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_present_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", [4.0, 3.0, None, 2.0])
    assert main(["watch", str(tmp_path / "run"), "--once"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "run, step 4 of 20, 0:00:08 so far, about 0:00:32 to go" in text
    assert "2.0000" in text
    assert "█▅ ▁" in text
    assert "zero_shot_top1, step 4" in text


def test_what_is_sampled_stays_until_the_next_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", [])
    shares = [None, 0.42, None]
    lines = [{"step": i, "loss": None, "seconds": 1.0, "communication": share} for i, share in enumerate(shares)]
    (tmp_path / "run" / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["watch", str(tmp_path / "run"), "--once"]) == 0
    assert "42%" in capsys.readouterr().out


def test_a_run_that_has_not_logged_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", [])
    (tmp_path / "run" / LOG_FILE).unlink()
    assert main(["watch", str(tmp_path / "run")]) == 0
    assert "run, step 0 of 20" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(tmp_path)]) == 2
    assert "is no run folder" in capsys.readouterr().err
    assert main(["watch", str(tmp_path), "--seconds", "0"]) == 2
    assert "--seconds must be above 0" in capsys.readouterr().err


def test_sparklines() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([]) == ""
