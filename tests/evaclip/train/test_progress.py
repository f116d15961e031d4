"""Reports: the log file, the lines, TensorBoard, Weights & Biases; throughput and signals."""

import dataclasses
import math
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from evaclip.data import Batch
from evaclip.errors import UserError
from evaclip.model.clip import CLIP
from evaclip.model.norm import Stream
from evaclip.packing import PackedImages, drop_patches, pack_images
from evaclip.runs.files import EVENTS_FILE, LOG_FILE
from evaclip.runs.log import read_log
from evaclip.train import progress
from evaclip.train.config import LogConfig, LossConfig
from evaclip.train.loss import ContrastiveLoss
from evaclip.train.progress import Record, open_report
from evaclip.train.tasks.contrastive import Contrastive
from evaclip.train.throughput import Meter, peak_flops
from evaclip.train.trainer import train

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


@pytest.mark.parametrize("progress", ["plain", "rich"])
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
    for part in (
        "resuming [from] somewhere",
        "loss 2.5000",
        "skipped 3",
        "bad samples 7",
        "eta",
        "5/20",
        "top1 50.00%",
    ):
        assert part in text


def test_tensorboard_gets_the_curves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with open_report(LogConfig(progress="none"), tmp_path, 0, 20) as report:
        report.record(RECORD)
        report.evaluation(5, {"top1": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(5, 2.5)]
    assert [(event.step, event.value) for event in events.Scalars("eval/top1")] == [(5, 0.5)]


def test_meter_separates_waiting_from_work(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 1.0, 4.0, 10.0, 10.0, 11.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    meter = Meter(seconds=100.0)
    assert meter.fetch(iter(["batch"])) == "batch"
    meter.count(50, 700)
    assert meter.read() == (50, 700, 10.0, 3.0)
    assert meter.seconds == 111.0


def test_a_later_ctrl_c_ends_at_once() -> None:
    code = (
        "import os, signal; from evaclip.train import watchdog; watchdog.INSISTING = 0\n"
        "with watchdog.StopSignals():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('goes on')"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGINT, "")


@pytest.mark.exhaustive
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra [wandb] is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for step in (1, 2):
        sink = progress.Wandb("p", tmp_path, "my-run", {"optim": {"lr": 0.123}}, pytest.fail)
        sink.record(replace(RECORD, step=step))
        sink.evaluation(step, {"top1": 0.5})
        sink.close(None)
    # Its own process writes the files, and is waited for at exit alone.
    wandb.teardown()
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    # The same run to the service, although two processes had a part in it.
    assert len({path.name for path in files}) == 1
    for path in files:
        content = path.read_bytes()
        for expected in (b"my-run", b"train/loss", b"train/update_ratio_text", b"eval/top1", b"0.123"):
            assert expected in content, expected


@pytest.mark.parametrize(
    ("name", "value", "extra"), [("wandb", "{project: p}", "wandb"), ("tensorboard", "true", "clip")]
)
def test_missing_tracker_is_refused_first(name, value, extra, run_config, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"log\.{name} needs `pip install 'evakernels\[{extra}\]'`"):
        train(run_config(f"log.{name}={value}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_service_that_fails_does_not_fail_the_run(fails, run_config, monkeypatch, capsys):
    """And gets no credentials."""

    def call(name: str) -> Callable[..., Any]:
        def function(*args: Any, **given: Any) -> Any:
            calls.append((name, given))
            if name == fails:
                raise ConnectionError("no\nroute")
            return run

        return function

    calls: list[tuple[str, dict[str, Any]]] = []
    run = SimpleNamespace(**{name: call(name) for name in ("log", "finish", "define_metric")})
    fake = SimpleNamespace(init=call("init"), Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(progress, "find_spec", lambda name: object())
    secret = "eval.sets.val={data: {train: 'https://me:abc123@host/00.tar'}, samples: 1}"
    monkeypatch.setattr("evaclip.train.tasks.contrastive.open_sets", lambda *_: [])
    assert train(run_config("log.wandb={project: p}", secret)).steps == 6
    assert (
        capsys.readouterr().out.count("log.wandb failed and is left out from now on (ConnectionError: no route)") == 1
    )
    assert [name for name, _ in calls].count("log") == {"init": 0, "log": 1, "finish": 6}[fails]
    shown = calls[0][1]["config"]["eval"]["sets"]["val"]["data"]["train"]
    assert shown == "https://host/00.tar"


@pytest.mark.parametrize(
    ("name", "half", "single"), [("NVIDIA H100 PCIe", 756e12, 51e12), ("NVIDIA A10", 125e12, 31.2e12)]
)
def test_peak_flops_of_gpus(monkeypatch: pytest.MonkeyPatch, name: str, half: float, single: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda")
    assert peak_flops(cuda, "amp_bf16") == half
    assert peak_flops(cuda, "fp16") == half
    assert peak_flops(cuda, "fp32") == single


def test_peak_flops_unknown_device_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU 9000")
    for device in ("cpu", "cuda"):
        assert peak_flops(torch.device(device), "amp_bf16") is None


def test_summary_has_mfu_only_if_known() -> None:
    assert "MFU 37.5%" in progress.summary(RECORD)
    assert not any("MFU" in number for number in progress.summary(replace(RECORD, mfu=None)))


@pytest.mark.parametrize(("packed", "prefix"), [(False, 1), (False, 3), (True, 1), (True, 3)])
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_tokens_are_the_rows_that_reach_the_blocks(
    small_model: CLIP, pack: bool, dropout: float, packed: bool, prefix: int
) -> None:
    config, rows = small_model.config, list[int]()
    vision = dataclasses.replace(config.vision, prefix_tokens=prefix)
    small_model = CLIP(dataclasses.replace(config, vision=vision))

    def count(block: nn.Module, arguments: tuple[Stream, ...]) -> None:
        rows.append(arguments[0].x.shape[:-1].numel())

    small_model.set_savings(dataclasses.replace(small_model.visual.savings, pack_text=pack))
    small_model.visual.patch_dropout = dropout
    for blocks in (small_model.visual.blocks, small_model.text.transformer.resblocks):
        blocks[0].register_forward_pre_hook(count)
    tokens = torch.zeros(3, small_model.config.text.context_length, dtype=torch.int64)
    for row, end in enumerate((2, 9, 5)):
        tokens[row, end] = 49_407
    images: Tensor | PackedImages = torch.randn(3, 3, 16, 16)
    if packed:
        images = drop_patches(pack_images([torch.randn(3, 4 * size, 8) for size in (1, 3, 2)], 4), dropout)
    small_model.train()(images, tokens)
    task = Contrastive(small_model, ContrastiveLoss(LossConfig()))
    assert task.tokens_computed(Batch([images], tokens)) == sum(rows)
