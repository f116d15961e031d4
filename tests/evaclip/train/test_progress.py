"""Reports: the log file, the lines, TensorBoard."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from evaclip.run_files import EVENTS_FILE, LOG_FILE
from evaclip.train.config import LogConfig
from evaclip.train.meter import Meter
from evaclip.train.progress import open_report, read_log
from evaclip.train.signals import StopSignals
from evaclip.train.sinks import Record

RECORD = Record(
    step=5, samples=40, epoch=0.4, loss=2.5, lr=1e-3, grad_norm=1.0, loss_scale=65536.0, skipped=0, bad_samples=0,
    samples_per_second=100.0, tokens_per_second=3000.0, data_wait=0.25, mfu=0.375, memory_gib=1.5, seconds=1.0,
    more={"accuracy": 0.125, "lr_visual": 2e-3, "lr_text": 4e-3, "logit_scale": 14.3, "update_ratio_text": 1e-3},
)  # fmt: skip


def report_steps(folder: Path, steps: list[int], start: int = 0) -> None:
    config = LogConfig(tensorboard=False, progress="none")
    with open_report(config, folder, start, 20) as report:
        for step in steps:
            report.record(replace(RECORD, step=step))
            report.evaluation(step, {"top1": step / 10})


def test_a_resumed_run_logs_no_step_twice(tmp_path: Path) -> None:
    report_steps(tmp_path, [1, 2, 3])
    path = tmp_path / LOG_FILE
    path.write_text(path.read_text() + '{"step": 4, "lo')
    report_steps(tmp_path, [3, 4], start=2)
    assert [record["step"] for record in read_log(path)] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_what_is_not_finite_is_null_in_the_log(tmp_path: Path) -> None:
    with open_report(LogConfig(tensorboard=False, progress="none"), tmp_path, 0, 20) as report:
        report.record(replace(RECORD, loss=math.nan, grad_norm=math.inf))
        report.evaluation(5, {"top1": math.nan})
    record, evaluation = (
        json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / LOG_FILE).read_text().splitlines()
    )
    assert evaluation["eval"] == {"top1": None}
    assert record["loss"] is None
    assert record["grad_norm"] is None


def test_what_happens_is_kept_over_all_starts(tmp_path: Path) -> None:
    config = LogConfig(tensorboard=False, progress="none")
    report = open_report(config, tmp_path, 0, 20, processes=3)
    report.record(replace(RECORD, step=7))
    report.say("a checkpoint could not be written")
    error = OSError("the disk\nis gone")
    report.__exit__(OSError, error, None)
    with open_report(config, tmp_path, 4, 20):
        pass
    events = read_log(tmp_path / EVENTS_FILE)
    found = [(event["step"], next(key for key in ("start", "message", "end") if key in event)) for event in events]
    assert found == [(0, "start"), (7, "message"), (7, "end"), (4, "start"), (4, "end")]
    assert events[0]["start"]["processes"] == 3
    assert {"python", "torch"} < set(events[0]["start"]["versions"])
    assert events[1]["message"] == "a checkpoint could not be written"
    assert [event["end"] for event in events if "end" in event] == ["OSError: the disk is gone", None]


@pytest.mark.parametrize("progress", ["plain", "rich", "auto"])
def test_the_terminal_shows_what_matters(progress, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with open_report(LogConfig(progress=progress), None, 0, 20) as report:  # type: ignore[arg-type]
        report.say("resuming [from] somewhere")
        report.record(replace(RECORD, skipped=3, bad_samples=7))
        report.evaluation(5, {"top1": 0.5, "samples": 512, "val/loss": 2.25, "val/r1": math.nan})
    text = capsys.readouterr().out
    # What is broken over two lines isn't found.
    text = "\n".join(" ".join(line.split()) for line in text.splitlines())
    assert progress != "rich" or max(map(len, text.splitlines())) <= 80
    for part in ("resuming [from] somewhere", "loss 2.5000", "100.0 samples/s", "data wait 25%", "MFU 37.5%",
                 "skipped 3", "bad samples 7", "eta", "5/20", "top1 50.00%", "val: loss 2.25 r1 nan",
                 "accuracy 12.5%", "lr 2.00e-03/4.00e-03"):  # fmt: skip
        assert part in text


def test_evaluation_lines_are_short(capsys: pytest.CaptureFixture[str]) -> None:
    accuracies = {"zero_shot_top1": 0.5, "zero_shot_top5": 0.75, "chance_top1": 0.001, "classes": 1000}
    recalls = {f"{way}_r{k}": 0.25 for way in ("image_to_text", "text_to_image") for k in (1, 5)}
    each = {"samples": 512, "unreadable": 3, **accuracies, **recalls, "loss": 2.25}
    with open_report(LogConfig(progress="plain"), None, 0, 20) as report:
        report.evaluation(5, {f"{name}/{key}": value for name in ("imagenet", "val") for key, value in each.items()})
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["step 5/20  imagenet", "step 5/20  val"]
    assert lines[1].split(": ")[1].split("  ") == [
        "unreadable 3", "zero_shot_top1 50.00%", "image_to_text_r1 25.00%", "text_to_image_r1 25.00%", "loss 2.25",
    ]  # fmt: skip


@pytest.mark.parametrize("progress", ["plain", "rich"])
def test_the_terminal_tells_the_time_left(progress, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with open_report(LogConfig(progress=progress), None, 0, 5 + 9000) as report:
        report.record(RECORD)
    # 9000 steps of 8 samples at 100 samples/s.
    assert "eta 12:00" in capsys.readouterr().out


def test_tensorboard_gets_the_curves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_report(LogConfig(progress="none"), tmp_path, 0, 20) as report:
        report.record(RECORD)
        report.evaluation(5, {"top1": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(5, 2.5)]
    assert [(event.step, event.value) for event in events.Scalars("eval/top1")] == [(5, 0.5)]


def test_tensorboard_goes_on_after_a_full_disk(tmp_path, monkeypatch, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    original = SummaryWriter.add_scalar

    def add(self: SummaryWriter, name: str, value: float, step: int) -> None:
        if step in (5, 6):
            raise OSError(errno.ENOSPC, "No space left on device")
        original(self, name, value, step)

    monkeypatch.setattr(SummaryWriter, "add_scalar", add)
    with open_report(LogConfig(progress="none"), tmp_path, 0, 20) as report:
        for step in (4, 5, 6, 7):
            report.record(replace(RECORD, step=step))
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [4, 7]
    assert capsys.readouterr().err.count("No space left") == 1


def test_meter_separates_waiting_from_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 1.0, 4.0, 10.0, 10.0, 11.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    meter = Meter(seconds=100.0)
    assert meter.fetch(iter(["batch"])) == "batch"
    meter.count(50, 700)
    assert meter.read() == (50, 700, 10.0, 3.0)
    assert meter.seconds == 111.0


def test_first_signal_counts_and_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as signals:
        assert signals.received is None
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert signals.received == signal.SIGTERM
        assert signals.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_later_ctrl_c_ends_at_once() -> None:
    code = (
        "import os, signal; from evaclip.train import signals; signals.INSISTING = 0\n"
        "with signals.StopSignals():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('goes on')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGINT, "")
