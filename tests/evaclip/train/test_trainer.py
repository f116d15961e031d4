"""Whole runs: what they leave behind, and what they do when something goes wrong."""

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from trained_runs import assert_equal, checkpoint, column, evaluations, records, steps, weights

from evaclip.data import Batch, TrainLoader
from evaclip.errors import RunFailed, UserError
from evaclip.factory import create_model
from evaclip.loading import load_model
from evaclip.runs.log import read_log
from evaclip.runtime.encoder import Encoder
from evaclip.train import saver, throughput, trainer
from evaclip.train.build import build
from evaclip.train.checkpoint import Lost, NotWritten
from evaclip.train.config import TrainConfig
from evaclip.train.distributed import World
from evaclip.train.ema import Ema
from evaclip.train.step import StepResult, TrainStep
from evaclip.train.tasks import task_class
from evaclip.train.trainer import TrainingDiverged, train
from evaclip.train.watchdog import Watchdog
from evakernels.optim import AdamW

Make = Callable[..., TrainConfig]
Change = Callable[[int, Batch], Batch]


@pytest.fixture
def change_batches(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """Passes every batch that the loader yields through a function of its number in the run and itself."""

    def install(change: Change) -> None:
        original = TrainLoader.batches

        def batches(self: TrainLoader, position: int = 0) -> Iterator[Batch]:
            for batch in original(self, position):
                yield change(batch.position // len(batch), batch)

        monkeypatch.setattr(TrainLoader, "batches", batches)

    return install


def nan_in(*numbers: int) -> Change:
    def change(number: int, batch: Batch) -> Batch:
        if number in numbers:
            return replace(batch, pieces=[torch.full(batch.images.shape, math.nan)])
        return batch

    return change


def test_a_run_leaves_what_it_should(run_config: Make, capsys: Any) -> None:
    config = run_config(
        "ema_decay=0.9",
        "log.tensorboard=true",
        "optim.visual={lr: 2e-3, layer_decay: 0.5}",
        "eval={sets: {val: {data: {num_samples: 64, workers: 0}, skip: 40}}, every_steps: 4}",
    )
    outcome = train(config, resume="auto")
    assert "starting from the beginning" in capsys.readouterr().out
    assert (outcome.steps, outcome.stopped_by) == (6, None)
    folder = outcome.folder
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints", "config.yaml", "events.jsonl", "log.jsonl", "tensorboard",
    ]  # fmt: skip
    logged = records(folder)
    assert [record["step"] for record in logged] == [1, 2, 3, 4, 5, 6]
    assert [record["samples"] for record in logged] == [8, 16, 24, 32, 40, 48]
    assert logged[4]["epoch"] == 1.0
    assert all("mfu" not in record and record["samples_per_second"] > 0 for record in logged)
    assert [logged[0][key] for key in ("lr", "lr_visual", "lr_text", "loss_scale")] == [1e-3, 2e-3, 1e-3, 1.0]
    assert list(evaluations(folder)) == [4, 6]
    assert (outcome.metrics["val/samples"], outcome.metrics["val/classes"]) == (24, 24)
    last = checkpoint(folder)
    # As readable for others as any file that is made here.
    assert len({path.stat().st_mode for path in [*last.rglob("*.*"), folder / "config.yaml"]}) == 1
    assert json.loads((last / "preprocess.json").read_text())["image_size"] == 16
    averaged = create_model("tiny", pretrained=folder)
    model = create_model("tiny", pretrained=last / "model.safetensors")
    larger = run_config(f"model.pretrained={folder}", "model.options.vision.image_size=24")
    assert task_class("contrastive").create_model(larger).config.vision.image_size == 24
    del larger.model.options["vision"]["image_size"]
    assert task_class("contrastive").create_model(larger).config.vision.image_size == 32  # as the name says
    assert not torch.equal(model.visual.head.weight, averaged.visual.head.weight)


def test_existing_run_is_kept(run_config: Make, trained: Path) -> None:
    (trained / "notes.txt").write_text("mine")
    for measured in ("evaluations/zero-shot.json", "galleries/zero-shot.json", "report.html"):
        (trained / measured).parent.mkdir(exist_ok=True)
        (trained / measured).write_text("of the run that is deleted")
    with pytest.raises(UserError, match=r"--resume auto .*--overwrite"):
        train(run_config())
    with pytest.raises(UserError, match="choose one"):
        train(run_config(), resume="auto", overwrite=True)
    train(run_config("schedule.steps=3"), overwrite=True)
    assert (steps(trained), column(trained, "step")) == ([3], [1, 2, 3])
    assert (trained / "notes.txt").read_text() == "mine"
    assert not {"evaluations", "galleries", "report.html"} & {path.name for path in trained.iterdir()}


def test_shuffle_window_of_few_batches_warns_once(run_config: Make, capsys: Any) -> None:
    train(run_config("schedule.steps=1", "data.shuffle_window=8", "data.canonical_nodes=2"))
    text = capsys.readouterr().out
    assert text.count("shuffles 16 samples with each other") == 1
    assert "fewer than 4 batches of 8" in text
    assert "data.shuffle_window=16 mixes 4" in text
    for window in (16, 0):  # four batches, and everything
        train(run_config("schedule.steps=1", f"data.shuffle_window={window}", "data.canonical_nodes=2"), overwrite=True)
        assert "samples with each other" not in capsys.readouterr().out


@pytest.mark.parametrize("accumulation", [1, 2])
def test_locked_tower_is_unchanged_and_resumes(run_config: Make, accumulation: int) -> None:
    locked = ("model.lock_image=true", "model.lock_image_unlocked_groups=1", f"accumulation_steps={accumulation}")
    folder = train(run_config(*locked, "checkpoint.every_steps=3")).folder
    first, last = weights(folder, 3), weights(folder)
    moved = {name for name, value in last.items() if not torch.equal(value, first[name])}
    assert {name for name in moved if name.startswith("visual.")} == {"visual.head.weight", "visual.head.bias"}
    assert "text.token_embedding.weight" in moved
    (checkpoint(folder) / "state.pt").unlink()
    train(run_config(*locked), resume="auto")
    assert_equal(weights(folder), last)


def test_a_tower_is_frozen_for_the_first_steps_alone(run_config: Make) -> None:
    saving = "checkpoint={every_steps: 1, keep: 9}"
    run = train(run_config("optim={name: lamb, visual: {frozen_steps: 2}}", "schedule.steps=4", saving)).folder
    first, second, third = (weights(run, step) for step in (1, 2, 3))
    changed = {key for key in first if not torch.equal(first[key], second[key])}
    assert changed
    assert not any(key.startswith("visual.") for key in changed)
    assert not torch.equal(second["visual.blocks.0.attn.proj.weight"], third["visual.blocks.0.attn.proj.weight"])
    assert [rate > 0 for rate in column(run, "lr_visual")] == [False, False, True, True]


def test_checkpoints_by_step_epoch_and_time(run_config: Make, tmp_path: Path) -> None:
    train(run_config("checkpoint.every_steps=2", "checkpoint.keep=2", "checkpoint.keep_every=2", "schedule.steps=7"))
    assert steps(tmp_path / "run") == [2, 4, 6, 7]
    train(run_config("checkpoint.every_epochs=1", "schedule.epoch_samples=16", "name=epochs", "checkpoint.keep=1"))
    assert steps(tmp_path / "epochs") == [6]
    train(run_config("checkpoint.every_epochs=1", "name=five", "checkpoint.keep=9"))
    assert steps(tmp_path / "five") == [5, 6]
    train(run_config("checkpoint.every_minutes=1e-9", "checkpoint.keep=99", "name=minutes"))
    assert steps(tmp_path / "minutes") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_finishes_the_step_saves_and_resumes(run_config, change_batches, number, code, trained, capsys):
    change_batches(lambda step, batch: (step == 3 and os.kill(os.getpid(), number), batch)[1])
    evaluated = "eval={sets: {val: {data: {num_samples: 8, workers: 0}}}, every_steps: 3}"
    outcome = train(run_config(evaluated, "name=stopped"))
    assert (outcome.stopped_by, outcome.steps, outcome.metrics) == (code, 3, {})
    assert steps(outcome.folder) == [3]
    assert "--resume auto goes on from step 3" in capsys.readouterr().out
    resumed = train(run_config("name=stopped"), resume="auto")
    assert (resumed.stopped_by, resumed.steps) == (None, 6)
    assert_equal(weights(resumed.folder), weights(trained))


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
    assert steps(outcome.folder)[-1] == outcome.steps


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


def test_failed_save_hides_no_other_error(run_config, monkeypatch, capsys, tmp_path):
    def fail(*args: Any, **options: Any) -> None:
        raise NotWritten("no")

    monkeypatch.setattr(saver.checkpoint, "save", fail)
    original = TrainStep.__call__

    def call(self: TrainStep, batch: Batch, number: int, **options: bool) -> StepResult:
        if number == 4:
            raise RunFailed("the true error")
        return original(self, batch, number, **options)

    monkeypatch.setattr(TrainStep, "__call__", call)
    with pytest.raises(RunFailed, match="the true error"):
        train(run_config("checkpoint.every_steps=3"))
    assert "a checkpoint could not be written: no" in capsys.readouterr().out
    assert read_log(tmp_path / "run" / "events.jsonl")[-1]["end"] == "RunFailed: the true error"


def test_nan_is_skipped_for_a_while_only(run_config: Make, change_batches: Callable[[Change], None]) -> None:
    change_batches(nan_in(3, 4))
    folder = train(run_config("nonfinite.max_skipped=3")).folder
    assert column(folder, "skipped") == [0, 0, 1, 2, 2, 2]
    assert [loss is None for loss in column(folder, "loss")] == [False, False, True, True, False, False]
    assert all(value.isfinite().all() for value in weights(folder).values())
    with pytest.raises(TrainingDiverged, match=r"in 2 steps in a row, up to step 4.*nonfinite.action=rollback"):
        train(run_config("nonfinite.max_skipped=2"), overwrite=True)


def test_lasting_nan_returns_to_a_checkpoint(run_config, change_batches, capsys):
    change_batches(nan_in(4, 5, 6))
    config = run_config(
        "nonfinite={max_skipped: 2, action: rollback}", "checkpoint={every_steps: 1, keep: 9}", "schedule.steps=8"
    )
    folder = train(config).folder
    assert "went back to step_00000003, leaving out the data in between" in capsys.readouterr().out
    assert column(folder, "step") == [1, 2, 3, 4, 5, 4, 5, 6, 7, 8]
    assert records(folder)[-1]["samples"] == 80
    assert steps(folder) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert records(folder)[-1]["loss"] is not None


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
    assert column(outcome.folder, "step") == [1, 2, 3, 4, 5, 6]
    assert list(read_log(outcome.folder / "events.jsonl")[-1])[-1] == "end"
    assert len(opened) >= 2
    assert capfd.readouterr().err.count("can't be written") == 1


@pytest.fixture
def phases(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, float, bool]]:
    """Phases that the trainer begins: name, limit in seconds, and whether the rank ends after it."""
    begun: list[tuple[str, float, bool]] = []
    original = Watchdog.phase

    def phase(self: Watchdog, name: str, *, limit: float, abort: bool) -> Any:
        begun.append((name, limit, abort))
        return original(self, name, limit=limit, abort=abort)

    monkeypatch.setattr(Watchdog, "phase", phase)
    return begun


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RUN_ID", "SLURM_STEP_ID", None])
@pytest.mark.parametrize("abort", [None, False, True])
def test_watchdog_ends_launched_ranks(launcher, abort, run_config, monkeypatch, phases):
    if launcher is not None:
        monkeypatch.setenv(launcher, "1")
    saving = ["checkpoint.every_steps=2", "parallel.saving_timeout_minutes=30"]
    train(run_config(f"watchdog.abort={json.dumps(abort)}", "schedule.steps=3", *saving))
    assert {name for name, *_ in phases} == {"data", "step", "log", "saving"}
    ended = ["log", "data", "step", "log", "saving", "log", "saving", "saving"]
    # Of three steps the second alone follows a step; a checkpoint comes before the third.
    assert [name for name, _, ends in phases if ends] == (ended if launcher and abort is None else [])
    assert {limit for name, limit, _ in phases if name == "saving"} == {1800}
    assert {limit for name, limit, _ in phases if name != "saving"} == {600}


@pytest.mark.parametrize(("remote", "limit"), [(False, 2000), (True, 1800 + 2000)])
def test_slow_steps_get_20_medians(remote, limit, run_config, monkeypatch, phases):
    """Steps take 100 s, and one of them 10,000; a remote shard may be waited for."""
    clock, step = [0.0], TrainStep.__call__

    def call(self: TrainStep, batch: Any, number: int, **options: bool) -> StepResult:
        clock[0] += 10_000 if number == 3 else 100
        return step(self, batch, number, **options)

    monkeypatch.setattr(TrainLoader, "remote", remote)
    monkeypatch.setattr(TrainStep, "__call__", call)
    monkeypatch.setattr(throughput, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    train(run_config("checkpoint.every_minutes=null"))
    limits = [limit for name, limit, _ in phases if name == "step"]
    assert limits == [600, *[pytest.approx(limit)] * 5]


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
    run = train(run_config("schedule.steps=3", "checkpoint.every_steps=1")).folder
    (checkpoint(run, 3) / "state.pt").unlink()
    train(run_config("schedule.steps=3"), resume="auto")
    assert column(run, "bad_samples") == [1, 3, 6]


def test_too_many_bad_samples_end_the_run(run_config: Make, change_batches: Callable[[Change], None]) -> None:
    """Of a window of 1,000 samples 112 bad ones are more than a tenth of what is read; each batch has 40."""
    change_batches(lambda number, batch: replace(batch, skipped=40))
    for resume in ("none", "auto"):  # which counts anew
        with pytest.raises(RunFailed, match=r"data\.max_bad_fraction.* 120 of 144 "):
            train(run_config("schedule.steps=9", "checkpoint.every_steps=1"), resume=resume)
    assert train(run_config("data.max_bad_fraction=1", "schedule.steps=9"), resume="auto").steps == 9


def test_other_data_is_refused_unless_allowed(run_config: Make, trained: Path, capsys: Any) -> None:
    other = ("data.num_samples=48", "schedule.steps=8")
    with pytest.raises(UserError, match="allow_data_change"):
        train(run_config(*other), resume="auto")
    allowed = "checkpoint={allow_data_change: true, allow_schedule_change: true}"
    assert train(run_config(*other, allowed), resume="auto").steps == 8
    text = capsys.readouterr().out
    assert "changed since the checkpoint: data.num_samples: 40 -> 48" in text
    assert "changed since the checkpoint: schedule.steps: 6 -> 8" in text


def test_a_schedule_changes_in_what_is_to_come_alone(run_config: Make, tmp_path: Path, capsys: Any) -> None:
    train(run_config("schedule.name=constant", "checkpoint.every_steps=4", "optim.lr=1"))
    trunk = str(tmp_path / "run/checkpoints/step_00000004")
    cooled = "schedule={name: constant, cooldown_steps: 4, cooldown: linear, steps: 8}"
    branch = train(run_config(cooled, "name=branch", "optim.lr=1"), resume=trunk)
    assert column(branch.folder, "lr") == [1.0, 0.75, 0.5, 0.25]
    assert "changed since the checkpoint: schedule.cooldown_steps: 0 -> 4" in capsys.readouterr().out
    assert train(run_config("schedule={name: constant, steps: 7}"), resume="auto").steps == 7
    # The cooldown would have begun two steps ago.
    with pytest.raises(UserError, match=r"step 4 had 1 of the peak rate, and would now have 0.75 of .*after step 4"):
        train(run_config(cooled, "schedule.steps=6", "name=late"), resume=trunk)
    allowed = train(run_config(cooled, "schedule.steps=6", "checkpoint.allow_schedule_change=true"), resume=trunk)
    assert allowed.steps == 6


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("clip", ["precision=bf16", "loss.name=siglip"]),
        ("clip", ["precision=fp16", "accumulation_steps=2"]),
        ("clip", ["precision=bf16", "parallel={mode: shard, offload: cpu}", "optim.stochastic_rounding=true"]),
        ("classification", ["precision=bf16", "optim.name=lamb"]),
        ("masked_image", ["precision=bf16", "model.savings.recompute=block"]),
    ],
)
def test_16_bit_run_trains_norms_and_scales(run_config: Make, task: str, changes: list[str]) -> None:
    """Parameters of one dimension or none are float32; a stopped run resumes bit-exactly."""
    config = run_config(*changes, "checkpoint.every_steps=3", "ema_decay=0.5", "validation_split=0.2", task=task)
    outcome = train(config)
    assert all(math.isfinite(value) for value in outcome.metrics.values())
    first, last, average = weights(outcome.folder, 3), weights(outcome.folder), weights(outcome.folder, file="ema")
    dtype = torch.bfloat16 if "precision=bf16" in changes else torch.float16
    for name, value in last.items():
        assert value.dtype == (dtype if value.ndim > 1 else torch.float32), name
        if "norm" in name or "ln" in name or name == "logit_scale":
            assert not torch.equal(value, first[name]), name
    shutil.rmtree(checkpoint(outcome.folder))
    train(config, resume="auto")
    assert_equal(weights(outcome.folder), last)
    assert_equal(weights(outcome.folder, file="ema"), average)


def test_16_bit_text_tower_of_transformers(run_config: Make) -> None:
    with pytest.raises(UserError, match="precision must be"):
        train(run_config("precision=bf16", "model.options.text={hf_model_name: any}"))


def test_siglips_bias_is_the_models(run_config: Make) -> None:
    folder = train(run_config("loss.name=siglip", "schedule.name=constant", "ema_decay=0.9", "optim.lr=0.1")).folder
    assert abs(float(weights(folder)["logit_bias"]) + 10) > 0.1
    average = weights(folder, file="ema")["logit_bias"]
    assert torch.equal(load_model(str(checkpoint(folder))).model.logit_bias.detach(), average)


def test_siglip2_trains_and_encodes(run_config: Make) -> None:
    options = ["model.options.text.vocab_size=49408", "model.options.text.hf_tokenizer_name=null", "schedule.steps=2"]
    config = run_config("model.name=SigLIP2-B-16-NaFlex", "loss.name=siglip", *options, task="native")
    loaded = load_model(str(train(config).folder))
    encoder = Encoder(loaded, device="cpu", precision="fp32")
    assert (encoder.max_patches, loaded.model.config.text.causal) == (16, False)
    images, texts = encoder.images([Image.new("RGB", (8, 24)), Image.new("RGB", (16, 16))]), encoder.texts(["a", "a b"])
    torch.testing.assert_close(images.norm(dim=1), torch.ones(2))
    tokens = loaded.tokenizer(["a", "a b"])
    torch.testing.assert_close(texts, loaded.model.encode_text(tokens, normalize=True).detach())


def test_native_model_needs_native_data(run_config: Make) -> None:
    options = ["model.name=SigLIP2-B-16-NaFlex", "loss.name=siglip", "model.options.text.vocab_size=49408"]
    options += ["model.options.text.hf_tokenizer_name=null", "schedule.steps=1", "data.resize=null"]
    with pytest.raises(UserError, match=r"^data\.resize must be native .*max_patches=256, got None; .*=null"):
        train(run_config(*options, task="native"))
    squares = train(run_config(*options, "model.options.preprocess.max_patches=null", task="native"))
    assert load_model(str(squares.folder)).model.config.preprocess.max_patches is None


def test_another_model_is_refused_in_one_sentence(run_config: Make, trained: Path) -> None:
    with pytest.raises(UserError, match=r"does not fit the model .*: model\.options\.text\.layers: 1 -> 2$"):
        train(run_config("model.options.text.layers=2", "optim.lr=1e-4"), resume="auto")


def test_replaced_checkpoint_survives_a_kill(run_config: Make, trained: Path) -> None:
    """A run is killed between the two renames that replace its last checkpoint, and resumed."""
    rename, last = Path.rename, checkpoint(trained)
    expected = weights(trained)

    def killed(self: Path, target: Path) -> Path:
        if target == last:
            raise SystemExit
        return rename(self, target)

    with patch.object(Path, "rename", killed), pytest.raises(SystemExit):
        train(run_config("ema_decay=0.9"), resume=str(checkpoint(trained, 3)))
    assert not last.exists()
    (checkpoint(trained, 3) / "state.pt").unlink()
    assert train(run_config("ema_decay=0.9"), resume="auto").steps == 6
    assert_equal(weights(trained), expected)


def test_intact_weights_begin_a_new_run(run_config: Make, trained: Path, capsys: Any) -> None:
    damaged = checkpoint(trained)
    shutil.rmtree(checkpoint(trained, 3))
    for name in ("state.pt", "ema.safetensors"):
        (damaged / name).unlink()
    with pytest.raises(
        UserError, match=rf"ema\S+ is missing and state.pt is missing.*--resume weights:{damaged} --set"
    ):
        train(run_config(), resume="auto")
    with pytest.raises(UserError, match="exists"):
        train(run_config(), resume=f"weights:{damaged}")
    with pytest.raises(UserError, match="--overwrite would delete the weights"):
        train(run_config(), resume=f"weights:{damaged}", overwrite=True)
    still = ("name=next", "optim.lr=0", "optim.weight_decay=0", "schedule.steps=2", "ema_decay=0.9")
    folder = train(run_config(*still), resume=f"weights:{damaged}").folder
    assert f"starting from the weights of {damaged}, at step 0 with a new optimizer state" in capsys.readouterr().out
    assert column(folder, "step") == [1, 2]
    for file in ("model", "ema"):
        assert_equal(weights(folder, 2, file), weights(trained))
    (damaged / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"are damaged: model\.safetensors has 0 bytes"):
        train(run_config("name=third"), resume=f"weights:{damaged}")


@pytest.mark.parametrize("name", ["", "run/checkpoints", "run/log.jsonl/x"])
def test_unwritable_run_folder(run_config: Make, tmp_path: Path, name: str) -> None:
    path = tmp_path / "runs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with pytest.raises(UserError, match=r"runs/run' can't be written \(.*\); --set output=FOLDER"):
        train(run_config(f"output={tmp_path / 'runs'}"), overwrite=True)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("data.train=/no/such/file.tar", "/no/such/file.tar does not exist"),
        ("batch_size=64", "40 samples are too few for one global batch of 64"),
        ("model.name=EVA02-B16", "unknown model 'EVA02-B16'.*'EVA02-B-16'"),
        ("device=meta", "device 'meta' cannot be used.*accepted: auto, cpu"),
        ("schedule.resolutions=[{image_size: 10, steps: 2}]", "image_size 10 isn't a multiple of patch_size 4"),
        ("eval.sets.val={data: {num_samples: 8}, skip: 8}", r"eval\.sets\.val\.skip=8.*has 8"),
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


def test_native_run_drops_patches_in_the_loader(run_config):
    world = World(torch.device("cpu"))
    parts = build(run_config("data.max_patches=9", "model.patch_dropout=0.5", task="native"), world)
    images = next(parts.loader.batches()).images
    patches = images.sizes.prod(1)
    assert len({tuple(size) for size in images.sizes.tolist()}) > 2
    assert 6 <= patches.max() <= 9
    assert torch.equal(images.lengths, (patches // 2).clamp(min=1))
    assert images.patches.dtype == torch.uint8
    assert parts.flops_per_sample(0) < build(run_config(task="native"), world).flops_per_sample(0)
