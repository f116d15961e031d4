"""Whole runs: what they leave behind, and what they do when something goes wrong."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evaclip.data import Batch, TrainLoader
from evaclip.errors import RunFailed, UserError
from evaclip.factory import create_model
from evaclip.loading import load_model
from evaclip.train import saver
from evaclip.train.checkpoint import Lost, NotWritten
from evaclip.train.config import TrainConfig
from evaclip.train.distributed import World
from evaclip.train.ema import Ema
from evaclip.train.progress import read_log
from evaclip.train.step import StepResult, TrainStep
from evaclip.train.tasks import task_class
from evaclip.train.trainer import TrainingDiverged, train
from evaclip.train.watchdog import Watchdog
from evakernels.optim import AdamW

Make = Callable[..., TrainConfig]
Change = Callable[[int, Batch], Batch]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if path.is_dir())


@pytest.fixture
def change_batches(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """Passes every batch that the loader yields through a function of its number in the run and itself."""

    def install(change: Change) -> None:
        original = TrainLoader.batches

        def batches(self: TrainLoader, position: int = 0) -> Iterator[Batch]:
            for batch in original(self, position):
                yield change(batch.position // len(batch.images), batch)

        monkeypatch.setattr(TrainLoader, "batches", batches)

    return install


def nan_in(*numbers: int) -> Change:
    def change(number: int, batch: Batch) -> Batch:
        if number in numbers:
            return replace(batch, images=torch.full(batch.images.shape, math.nan))
        return batch

    return change


def test_a_run_leaves_what_it_should(run_config: Make) -> None:
    config = run_config(
        "ema_decay=0.9",
        "log.tensorboard=true",
        "optim.visual={lr: 2e-3, layer_decay: 0.5}",
        "eval={sets: {val: {data: {num_samples: 64, workers: 0}, first: 40}}, every_steps: 4}",
    )
    outcome = train(config)
    assert (outcome.steps, outcome.stopped_by) == (6, None)
    folder = outcome.folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints", "config.yaml", "events.jsonl", "log.jsonl", "tensorboard",
    ]  # fmt: skip
    records = read_log(folder / "log.jsonl")
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    assert [record["samples"] for record in steps] == [8, 16, 24, 32, 40, 48]
    assert steps[4]["epoch"] == 1.0
    assert all(record["mfu"] > 0 and record["samples_per_second"] > 0 for record in steps)
    assert [steps[0][key] for key in ("lr", "lr_visual", "lr_text", "loss_scale")] == [1e-3, 2e-3, 1e-3, 1.0]
    assert [record["step"] for record in records if "eval" in record] == [4, 6]
    assert (outcome.metrics["val/samples"], outcome.metrics["val/classes"]) == (24, 24)
    checkpoint = folder / "checkpoints" / "step_00000006"
    # As readable for others as any file that is made here.
    assert len({path.stat().st_mode for path in [*checkpoint.rglob("*.*"), folder / "config.yaml"]}) == 1
    assert json.loads((checkpoint / "preprocess.json").read_text())["image_size"] == 16
    model = create_model("tiny", pretrained=folder)
    averaged = create_model("tiny", pretrained=checkpoint / "ema.safetensors")
    larger = run_config(f"model.pretrained={folder}", "model.options.vision.image_size=24")
    assert task_class("contrastive").create_model(larger).config.vision.image_size == 24
    del larger.model.options["vision"]["image_size"]
    assert task_class("contrastive").create_model(larger).config.vision.image_size == 32  # as the name says
    assert not torch.equal(model.visual.head.weight, averaged.visual.head.weight)


def test_existing_run_is_kept(run_config: Make, tmp_path: Path) -> None:
    config = run_config()
    train(config)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    for measured in ("evaluations/zero-shot.json", "galleries/zero-shot.json", "report.html"):
        (tmp_path / "run" / measured).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / measured).write_text("of the run that is deleted")
    with pytest.raises(UserError, match="exists: --resume auto goes on with it, --overwrite deletes it"):
        train(config)
    with pytest.raises(UserError, match="choose one"):
        train(config, resume="auto", overwrite=True)
    train(run_config("schedule.steps=3"), overwrite=True)
    assert checkpoints(tmp_path / "run") == ["step_00000003"]
    assert len(read_log(tmp_path / "run" / "log.jsonl")) == 3
    assert (tmp_path / "run/notes.txt").read_text() == "mine"
    assert not {"evaluations", "galleries", "report.html"} & {path.name for path in (tmp_path / "run").iterdir()}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_locked_tower_is_unchanged_and_resumes(run_config: Make, accumulation: int) -> None:
    locked = ("model.lock_image=true", "model.lock_image_unlocked_groups=1", f"accumulation={accumulation}")
    folder = train(run_config(*locked, "checkpoint.every_steps=3")).folder / "checkpoints"
    first, last = (load_file(folder / f"step_{step:08d}/model.safetensors") for step in (3, 6))
    moved = {name for name, value in last.items() if not torch.equal(value, first[name])}
    assert {name for name in moved if name.startswith("visual.")} == {"visual.head.weight", "visual.head.bias"}
    assert "text.token_embedding.weight" in moved
    (folder / "step_00000006/state.pt").unlink()
    train(run_config(*locked), resume="auto")
    again = load_file(folder / "step_00000006/model.safetensors")
    assert all(torch.equal(value, last[name]) for name, value in again.items())


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_a_tower_is_frozen_for_the_first_steps_alone(run_config: Make, tmp_path: Path, name: str) -> None:
    config = run_config(
        "optim.visual.frozen_steps=2", f"optim.name={name}", "log.every_steps=1", "schedule.steps=4",
        "checkpoint.every_steps=1", "checkpoint.keep=9",
    )  # fmt: skip
    run = train(config).folder
    first, second, third = (load_file(run / f"checkpoints/step_0000000{step}/model.safetensors") for step in (1, 2, 3))
    changed = {key for key in first if not torch.equal(first[key], second[key])}
    assert changed
    assert not any(key.startswith("visual.") for key in changed)
    assert not torch.equal(second["visual.blocks.0.attn.proj.weight"], third["visual.blocks.0.attn.proj.weight"])
    rates = [record["lr_visual"] for record in read_log(run / "log.jsonl") if "lr_visual" in record]
    assert [rate > 0 for rate in rates] == [False, False, True, True]


def test_checkpoints_by_step_epoch_and_time(run_config: Make, tmp_path: Path) -> None:
    train(run_config("checkpoint.every_steps=2", "checkpoint.keep=2", "checkpoint.keep_every=2", "schedule.steps=7"))
    assert checkpoints(tmp_path / "run") == [f"step_{step:08d}" for step in (2, 4, 6, 7)]
    train(run_config("checkpoint.every_epochs=1", "schedule.epoch_samples=16", "name=epochs", "checkpoint.keep=1"))
    assert checkpoints(tmp_path / "epochs") == ["step_00000006"]
    train(run_config("checkpoint.every_epochs=1", "name=five", "checkpoint.keep=9"))
    assert checkpoints(tmp_path / "five") == ["step_00000005", "step_00000006"]
    train(run_config("checkpoint.every_minutes=1e-9", "checkpoint.keep=99", "name=minutes"))
    assert len(checkpoints(tmp_path / "minutes")) == 6


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_resumes(run_config, change_batches, number, code, capsys):
    straight = train(run_config("name=straight"))
    change_batches(lambda step, batch: (step == 3 and os.kill(os.getpid(), number), batch)[1])
    outcome = train(run_config("eval={sets: {val: {data: {num_samples: 8, workers: 0}}}, every_steps: 3}"))
    assert (outcome.stopped_by, outcome.steps, outcome.metrics) == (code, 3, {})
    assert checkpoints(outcome.folder) == ["step_00000003"]
    assert "--resume auto goes on from step 3" in capsys.readouterr().out
    resumed = train(run_config(), resume="auto")
    assert (resumed.stopped_by, resumed.steps) == (None, 6)
    weights = [load_file(o.folder / "checkpoints/step_00000006/model.safetensors") for o in (resumed, straight)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


def test_signals_during_the_last_checkpoint(run_config, monkeypatch):
    original = saver.checkpoint.save

    def save(*args: Any) -> Any:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.1)  # signals that wait together are one
        return original(*args)

    monkeypatch.setattr(saver.checkpoint, "save", save)
    outcome = train(run_config("checkpoint.every_steps=2"))
    assert outcome.stopped_by == 143
    assert checkpoints(outcome.folder)[-1] == f"step_{outcome.steps:08d}"


def test_updates_wait_for_checkpoint_copies(run_config, monkeypatch):
    """And so do averaged weights that change places with the model's."""
    calls = []

    def log_calls(owner: type, *names: str) -> None:
        for name in names:
            original = getattr(owner, name)
            monkeypatch.setattr(owner, name, lambda *args, f=original, n=name: (calls.append(n), f(*args))[1])

    log_calls(saver.Saver, "hold_updates")
    log_calls(AdamW, "step", "measured_step")
    log_calls(Ema, "applied")
    config = ("ema_decay=0.9", "log.every_steps=2", "eval={sets: {val: {data: {num_samples: 8, workers: 0}}}}")
    train(run_config(*config, "schedule.steps=2"))
    assert calls == ["hold_updates", "step", "hold_updates", "measured_step", "hold_updates", "applied"]


@pytest.mark.parametrize(("failures", "tries", "succeeds"), [([Lost], 2, True), ([NotWritten], 1, False)])
def test_last_checkpoint_is_retried_in_a_new_group(run_config, monkeypatch, failures, tries, succeeds):
    original, steps, left = saver.checkpoint.save, list[int](), list(failures)

    def save(root: Path, step: int, *rest: Any) -> Path:
        steps.append(step)
        if left:
            raise left.pop(0)("no")
        return original(root, step, *rest)

    monkeypatch.setattr(saver.checkpoint, "save", save)
    config = run_config("schedule.steps=1", "checkpoint.every_steps=null")
    with nullcontext() if succeeds else pytest.raises(UserError, match="the last checkpoint could not be written: no"):
        train(config)
    assert steps == [1] * tries


def test_nan_for_a_while_is_skipped_and_counted(run_config: Make, change_batches: Callable[[Change], None]) -> None:
    change_batches(nan_in(3, 4))
    outcome = train(run_config("nonfinite.max_skipped=3"))
    records = read_log(outcome.folder / "log.jsonl")
    assert [record["skipped"] for record in records] == [0, 0, 1, 2, 2, 2]
    assert [record["loss"] is None for record in records] == [False, False, True, True, False, False]
    weights = load_file(outcome.folder / "checkpoints" / "step_00000006" / "model.safetensors")
    assert all(value.isfinite().all() for value in weights.values())


def test_nan_for_long_stops_the_run(run_config: Make, change_batches: Callable[[Change], None]) -> None:
    change_batches(nan_in(2, 3, 4, 5, 6))
    with pytest.raises(TrainingDiverged, match=r"in 3 steps in a row, up to step 4.*nonfinite.action=rollback"):
        train(run_config("nonfinite.max_skipped=3"))


def test_lasting_nan_returns_to_a_checkpoint(run_config, change_batches, capsys):
    change_batches(nan_in(4, 5, 6))
    config = run_config(
        "nonfinite={max_skipped: 2, action: rollback}", "checkpoint={every_steps: 1, keep: 9}", "schedule.steps=8"
    )
    outcome = train(config)
    assert "went back to step_00000003, leaving out the data in between" in capsys.readouterr().out
    records = read_log(outcome.folder / "log.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert records[-1]["samples"] == 80
    assert checkpoints(outcome.folder) == [f"step_{step:08d}" for step in range(1, 9)]
    assert records[-1]["loss"] is not None


def test_going_back_has_a_limit(run_config: Make, change_batches: Callable[[Change], None]) -> None:
    change_batches(nan_in(*range(3, 99)))
    policy = "nonfinite={max_skipped: 1, action: rollback, max_rollbacks: 2}"
    with pytest.raises(TrainingDiverged, match="after 2 returns"):
        train(run_config(policy, "checkpoint.every_steps=1"))
    with pytest.raises(TrainingDiverged, match="no good checkpoint"):
        train(run_config(policy, "name=other"))


def test_full_disk_costs_one_line(run_config, change_batches, tmp_path, capfd):
    """Every file that the run has open there is full for two steps; what they report is written afterwards."""
    full, opened = os.open("/dev/full", os.O_WRONLY), {}

    def change(number: int, batch: Batch) -> Batch:
        if number == 2:
            files = {int(link.name): Path(os.path.realpath(link)) for link in Path("/proc/self/fd").iterdir()}
            for descriptor in [of for of, file in files.items() if file.is_relative_to(tmp_path / "run")]:
                opened[descriptor] = os.dup(descriptor)
                os.dup2(full, descriptor)
        if number == 4:
            for descriptor, before in opened.items():
                os.dup2(before, descriptor)
        return batch

    change_batches(change)
    outcome = train(run_config("log.tensorboard=true"))
    assert [record["step"] for record in read_log(outcome.folder / "log.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert list(read_log(outcome.folder / "events.jsonl")[-1])[-1] == "end"
    assert len(opened) >= 2
    assert capfd.readouterr().err.count("can't be written") == 1


def test_timeouts_are_short_between_steps_alone(run_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = []
    monkeypatch.setattr(World, "set_timeout", lambda self, limit, model: limits.append(limit.total_seconds()))
    train(run_config("watchdog.seconds=100", "checkpoint.every_steps=2", "schedule.steps=4"))
    assert limits == [120, 7200, 120, 7200]


@pytest.mark.parametrize("abort", [None, False, True])
def test_watchdog_aborts_steps_under_torchrun(abort, run_config, monkeypatch):
    seen: list[tuple[str, bool]] = []
    original = Watchdog.phase

    def phase(self: Watchdog, name: str, **options: bool) -> Any:
        context = original(self, name, **options)
        seen.append((name, bool(options.get("abort"))))
        return context

    monkeypatch.setattr(Watchdog, "phase", phase)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    train(run_config(f"watchdog.abort={json.dumps(abort)}", "schedule.steps=3", "checkpoint.every_steps=2"))
    assert {name for name, _ in seen} == {"data", "step", "saving"}
    # Of three steps the second alone follows a step; a checkpoint comes before the third.
    assert [name for name, ends in seen if ends] == (["data", "step"] if abort is None else [])


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError("DefaultCPUAllocator: can't")]
)
def test_out_of_memory_is_final(error, run_config, monkeypatch):
    def step(*args: Any, **options: Any) -> StepResult:
        raise error

    monkeypatch.setattr(TrainStep, "__call__", step)
    with pytest.raises(RunFailed, match="batch_size=8"):
        train(run_config())


def test_bad_samples_are_counted(run_config: Make, change_batches: Callable[[Change], None], tmp_path: Path) -> None:
    change_batches(lambda number, batch: replace(batch, skipped=number))
    train(run_config("schedule.steps=3", "checkpoint.every_steps=1"))
    (tmp_path / "run/checkpoints/step_00000003/state.pt").unlink()
    train(run_config("schedule.steps=3"), resume="auto")
    assert [record["bad_samples"] for record in read_log(tmp_path / "run" / "log.jsonl")] == [1, 3, 6]


def test_too_many_bad_samples_end_the_run(run_config: Make, change_batches: Callable[[Change], None]) -> None:
    """Of a window of 1,000 samples 112 bad ones are more than a tenth of what is read; each batch has 40."""
    change_batches(lambda number, batch: replace(batch, skipped=40))
    for resume in ("none", "auto"):  # which counts anew
        with pytest.raises(RunFailed, match=r"data\.max_bad_share.* 120 of 144 "):
            train(run_config("schedule.steps=9", "checkpoint.every_steps=1"), resume=resume)
    assert train(run_config("data.max_bad_share=1", "schedule.steps=9"), resume="auto").steps == 9


def test_other_data_is_refused_unless_allowed(run_config: Make, capsys: Any) -> None:
    train(run_config())
    other = ("data.num_samples=48", "schedule.steps=8")
    with pytest.raises(UserError, match=r"not what the checkpoint was trained on.*allow_data_change"):
        train(run_config(*other), resume="auto")
    allowed = "checkpoint={allow_data_change: true, allow_schedule_change: true}"
    outcome = train(run_config(*other, allowed), resume="auto")
    assert outcome.steps == 8
    text = capsys.readouterr().out
    assert "changed since the checkpoint: data.num_samples: 40 -> 48" in text
    assert "changed since the checkpoint: schedule.steps: 6 -> 8" in text


def test_a_schedule_changes_in_what_is_to_come_alone(run_config: Make, tmp_path: Path, capsys: Any) -> None:
    train(run_config("schedule.name=constant", "checkpoint.every_steps=4", "optim.lr=1"))
    trunk = str(tmp_path / "run/checkpoints/step_00000004")
    cooled = "schedule={name: constant, cooldown_steps: 4, cooldown: linear, steps: 8}"
    branch = train(run_config(cooled, "name=branch", "optim.lr=1"), resume=trunk)
    assert [r["lr"] for r in read_log(branch.folder / "log.jsonl")] == [1.0, 0.75, 0.5, 0.25]
    assert "changed since the checkpoint: schedule.cooldown_steps: 0 -> 4" in capsys.readouterr().out
    assert train(run_config("schedule={name: constant, steps: 7}"), resume="auto").steps == 7
    # The cooldown would have begun two steps ago.
    with pytest.raises(UserError, match=r"step 4 had 1 of the peak rate, and would now have 0.75 of .*follows step 4"):
        train(run_config(cooled, "schedule.steps=6", "name=late"), resume=trunk)
    allowed = train(run_config(cooled, "schedule.steps=6", "checkpoint.allow_schedule_change=true"), resume=trunk)
    assert allowed.steps == 6


def test_siglips_bias_is_the_models(run_config: Make) -> None:
    config = ("loss.name=siglip", "checkpoint.every_steps=3", "schedule.name=constant", "ema_decay=0.9", "optim.lr=0.1")
    straight = train(run_config(*config)).folder / "checkpoints"
    expected = load_file(straight / "step_00000006/model.safetensors")
    assert abs(float(expected["logit_bias"]) + 10) > 0.1
    average = load_file(straight / "step_00000006/ema.safetensors")["logit_bias"]
    assert torch.equal(load_model(str(straight / "step_00000006")).model.logit_bias.detach(), average)

    resumed = train(run_config(*config, "name=resumed"), resume=str(straight / "step_00000003")).folder
    found = load_file(resumed / "checkpoints/step_00000006/model.safetensors")
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_another_model_is_refused_in_one_sentence(run_config: Make) -> None:
    train(run_config("schedule.steps=1"))
    with pytest.raises(UserError, match=r"does not fit the model .*: model\.options\.text\.layers: 1 -> 2$"):
        train(run_config("model.options.text.layers=2", "optim.lr=1e-4"), resume="auto")


def test_intact_weights_begin_a_new_run(run_config: Make, tmp_path: Path, capsys: Any) -> None:
    damaged = train(run_config("ema_decay=0.9")).folder / "checkpoints" / "step_00000006"
    for name in ("state.pt", "ema.safetensors"):
        (damaged / name).unlink()
    with pytest.raises(
        UserError, match=rf"ema\S+ is missing and state.pt is missing.*--resume weights:{damaged} --set name=NAME"
    ):
        train(run_config(), resume="auto")
    with pytest.raises(UserError, match="exists"):
        train(run_config(), resume=f"weights:{damaged}")
    with pytest.raises(UserError, match="--overwrite would delete the weights"):
        train(run_config(), resume=f"weights:{damaged}", overwrite=True)
    still = ("name=next", "optim.lr=0", "optim.weight_decay=0", "schedule.steps=2", "ema_decay=0.9")
    outcome = train(run_config(*still), resume=f"weights:{damaged}")
    assert f"starting from the weights of {damaged}, at step 0 with a new optimizer state" in capsys.readouterr().out
    assert [record["step"] for record in read_log(outcome.folder / "log.jsonl")] == [1, 2]
    weights = load_file(damaged / "model.safetensors")
    for name in ("model.safetensors", "ema.safetensors"):
        found = load_file(outcome.folder / "checkpoints" / "step_00000002" / name)
        assert all(torch.equal(value, weights[key]) for key, value in found.items())
    (damaged / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"are damaged: model\.safetensors has 0 bytes"):
        train(run_config("name=third"), resume=f"weights:{damaged}")


@pytest.mark.parametrize("name", ["", "run/checkpoints", "run/log.jsonl/x"])
def test_unwritable_run_folder(run_config: Make, tmp_path: Path, name: str) -> None:
    path = tmp_path / "runs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with pytest.raises(UserError, match=r"runs/run' can't be written \(.*\); --set output=FOLDER puts"):
        train(run_config(f"output={tmp_path / 'runs'}"), overwrite=True)


def test_resume_auto_without_a_checkpoint(run_config: Make, capsys: Any) -> None:
    assert train(run_config(), resume="auto").steps == 6
    assert "starting from the beginning" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("data.train=/no/such/file.tar", "/no/such/file.tar does not exist"),
        ("batch_size=64", "40 samples are too few for one global batch of 64"),
        ("model.name=EVA02-B16", "unknown model 'EVA02-B16'.*'EVA02-B-16'"),
        ("device=meta", "device 'meta' cannot be used.*accepted: auto, cpu"),
        ("schedule.resolutions=[{image_size: 10, steps: 2}]", "image_size 10 isn't a multiple of patch_size 4"),
        ("eval.sets.val={data: {num_samples: 8}, first: 8}", r"eval\.sets\.val\.first=8.*has 8"),
        ("eval.sets.val={samples: 3}", r"eval\.sets\.val\.data is not set and nothing is held out"),
        ("eval.sets.val={data: {num_samples: 8}, classes: nowhere.txt}", "cannot read class names from 'nowhere.txt'"),
        ("eval.sets.val={data: {num_samples: 8}, fit: {num_samples: 8}}", r"eval\.sets\.val\.fit"),
        ("model.pretrained=nowhere.pt", "nowhere.pt"),
    ],
)
def test_what_cannot_be_run_is_said_and_leaves_nothing(run_config, tmp_path, assignment, message):
    with pytest.raises(UserError, match=message):
        train(run_config(assignment))
    assert not (tmp_path / "run").exists()
