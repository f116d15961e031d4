"""`evaclip report --text` shows a run from its folder."""

import json
import os
import re
import sys
import time
from dataclasses import asdict, replace
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from evaclip.commands.main import main
from evaclip.report.text import render, sparkline
from evaclip.run_files import CONFIG_FILE, EVENTS_FILE, LOCK_FILE, LOG_FILE
from evaclip.train.run_lock import Owner, RunLock


def write_run(folder: Path, losses: list[float | None]) -> None:
    folder.mkdir()
    (folder / CONFIG_FILE).write_text("schedule: {steps: 20}\n")
    records = [{"step": i + 1, "loss": loss, "seconds": 2.0 * (i + 1), "skipped": i} for i, loss in enumerate(losses)]
    lines = [*records, {"step": len(losses), "eval": {"zero_shot_top1": 0.25}}]
    (folder / LOG_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_present_state(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", [4.0, 3.0, None, 2.0])
    assert main(["report", str(tmp_path / "run"), "--text"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "run, step 4 of 20, 0:00:08 so far, about 0:00:32 to go" in text
    assert "2.0000" in text
    assert "█▅ ▁" in text
    assert re.search(r"zero_shot_top1, step 4 +│ +25\.00%", text)


def test_a_terminal_that_has_no_bars_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_run(tmp_path / "run", [4.0, 2.0])
    shown = BytesIO()
    monkeypatch.setattr(sys, "stdout", TextIOWrapper(shown, encoding="latin-1"))
    assert main(["report", str(tmp_path / "run"), "--text"]) == 0
    assert b"??" in shown.getvalue()


def test_a_run_that_has_not_logged_yet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "run", [])
    (tmp_path / "run" / LOG_FILE).unlink()
    assert main(["report", str(tmp_path / "run"), "--text"]) == 0
    assert "run, step 0 of 20" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path), "--text"]) == 2
    assert "is no run folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path), "--seconds", "0", "--text"])
    assert "--seconds: must be a number above 0, got '0'" in capsys.readouterr().err


def test_a_damaged_run_is_shown_as_far_as_it_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / CONFIG_FILE).write_text("name: x\n")
    assert main(["report", str(tmp_path), "--text"]) == 0
    assert f"{tmp_path.name}, step 0" in capsys.readouterr().out.replace("\n", "")
    (tmp_path / LOG_FILE).write_text("no JSON\n")
    assert main(["report", str(tmp_path), "--text"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path / LOG_FILE} can't be read: Expecting value" in line


def shown(folder: Path, width: int = 80, height: int | None = None) -> list[str]:
    """The lines of a terminal of this size."""
    console = Console(width=width, file=StringIO())
    console.print(render(folder, width, height))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def add_events(folder: Path, *events: dict[str, Any]) -> None:
    start = {"start": {"processes": 2}}
    times = [f"2026-11-27T00:00:{second:02d}+00:00" for second in range(60)]
    lines = [{"time": time, "step": 4, **event} for time, event in zip(times, (start, *events), strict=False)]
    (folder / EVENTS_FILE).write_text("".join(json.dumps(line) + "\n" for line in lines))


def age(folder: Path, seconds: float) -> None:
    """Makes all files that old."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - seconds,) * 2)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_newest_record_is_always_seen(tmp_path: Path, width: int) -> None:
    write_run(tmp_path / "run", [0.0] * 500 + [9.0])
    lines = shown(tmp_path / "run", width)
    loss = next(line for line in lines if "loss" in line)
    assert "▁█" in loss
    assert max(map(len, lines)) <= width
    assert loss.count("▁") > (width - 40) // 2


def test_evaluations_are_seen_on_a_low_terminal(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [4.0, 3.0])
    with (tmp_path / "run" / LOG_FILE).open("a") as file:
        file.write(json.dumps({"step": 2, "eval": {"zero_shot_top1": 0.5, "loss": None, "samples": 24}}) + "\n")
    add_events(tmp_path / "run", *({"message": f"message {number} " + 99 * "-"} for number in range(5)))
    lines = shown(tmp_path / "run", 80, 16)
    assert len(lines) == 15
    text = "\n".join(lines)
    assert "50.00% │ ▁█" in text
    assert "loss, step 2" in text
    assert "samples, step" not in text
    assert [f"message {number}" in text for number in range(5)] == [False, False, True, True, True]
    assert "27 Nov 00:00:05  step 4  message 4" in text
    assert "tokens/s" in "\n".join(shown(tmp_path / "run"))


def state(folder: Path) -> str:
    return " ".join(" ".join(shown(folder, 400)).split())


def test_dead_run_has_no_remaining_time(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder, [4.0, 3.0])
    age(folder, 7 * 3600)
    assert "no sign of life for 7 h 0 min" in state(folder)
    add_events(folder)
    assert "no sign of life for 0 s" in state(folder)
    assert "to go" not in state(folder)


def test_report_of_a_locked_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write_run(folder, [4.0, 3.0])
    add_events(folder)
    with RunLock.acquire(folder, say=print):
        assert "to go" in state(folder)
        age(folder, 7200)
        assert "its process lives, but has written nothing for 2 h 0 min" in state(folder)
    local = Owner.of_this_process()
    for owner, seconds, expected in (
        (local, 0, "no sign of life for"),
        (replace(local, machine="elsewhere"), 0, "to go"),
        (replace(local, machine="elsewhere"), 7200, "no sign of life for 2 h 0 min"),
    ):
        (folder / LOCK_FILE).write_text(json.dumps(asdict(owner)))
        age(folder, seconds)
        assert expected in state(folder)


def test_the_end_is_told(tmp_path: Path) -> None:
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
    with RunLock.acquire(folder, say=print):
        assert "starting again" in state(folder)


def test_sparklines() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline([]) == ""
