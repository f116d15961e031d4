"""`evaclip train` on the command line."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from evaclip import create_model
from evaclip.commands.main import build_parser, main
from evaclip.errors import UserError
from evaclip.train.config import TrainConfig
from evaclip.train.overrides import dump_yaml, validate
from evaclip.train.recipes import RECIPES, get_recipe
from evaclip.train.step import TrainStep
from evaclip.train.trainer import TrainingDiverged


@pytest.fixture
def config_file(run_config: Callable[..., TrainConfig], tmp_path: Path) -> str:
    path = tmp_path / "my.yaml"
    path.write_text(dump_yaml(run_config()))
    return str(path)


def test_without_a_recipe_all_are_listed(capsys: Any) -> None:
    assert main(["train"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert all(line.endswith(".") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--train-data", "x"], "name a RECIPE: 'evaclip train' lists them"),
        (["--set", "seed=1"], "name a RECIPE"),
        (
            ["tiny", "--batchsize", "3"],
            "unrecognized arguments: --batchsize 3; did you mean '--batch-size'? (see 'evaclip train --help')",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line(arguments: list[str], message: str, capsys: Any) -> None:
    try:
        code: Any = main(["train", *arguments])
    except SystemExit as exc:
        code = exc.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown choice 'trian'; did you mean 'train'? (see 'evaclip --help')"),
        (["data", "chek", "x"], "unknown choice 'chek'; did you mean 'check'? (see 'evaclip data --help')"),
        (["export", "a", "b", "--tower", "imge"], "argument --tower: unknown choice 'imge'; did you mean 'image'?"),
    ],
)
def test_of_a_wrong_word_the_nearest_is_told(arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_who_reads_the_output_may_go(tmp_path: Path) -> None:
    """As `head` does: a list ends without a word, a training goes on."""
    reader, writer = os.pipe()
    os.close(reader)
    small = (
        "schedule.steps=2 schedule.warmup_steps=1 log.every_steps=1 batch_size=8 eval.sets=null log.tensorboard=false"
    )
    train = ["train", "tiny", "--device", "cpu", "--set", f"output={tmp_path}", *small.split()]
    for arguments, code in ((["train"], 141), (["--version"], 0), (["plan", "tiny"], 141), (train, 0)):
        command = [sys.executable, "-m", "evaclip", *arguments]
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
        assert (arguments, done.returncode, done.stderr) == (arguments, code, "")
    os.close(writer)
    assert (tmp_path / "tiny/checkpoints/step_00000002").is_dir()


def test_what_may_not_be_read_is_told_as_a_mistake(monkeypatch: Any, capsys: Any) -> None:
    def refuse(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "is_file", refuse)
    assert main(["report", "locked", "--text"]) == 2
    assert capsys.readouterr().err == "error: locked/config.yaml: Permission denied\n"


def test_there_may_be_no_output_at_all() -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "evaclip", "train"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_print_config_is_complete_and_later_words_win(capsys: Any, tmp_path: Path) -> None:
    part = tmp_path / "part.yaml"
    part.write_text("batch_size: 24\noptim: {lr: 1.0, eps: 0.5}\nseed: 7\n")
    over = tmp_path / "over.yaml"
    over.write_text("optim: {beta1: 0.5, eps: 0.25}\n")
    arguments = ["train", "tiny", "--config", str(part), "--config", str(over)]
    arguments += ["--lr", "2.0", "--set", "seed=8", "log.every_steps=3"]
    assert main([*arguments, "--device", "cpu", "--print-config"]) == 0
    config = validate(yaml.safe_load(capsys.readouterr().out))
    assert (config.optim.lr, config.optim.eps, config.optim.beta1, config.seed) == (2.0, 0.25, 0.5, 8)
    assert (config.log.every_steps, config.device, config.batch_size) == (3, "cpu", 24)
    assert config.schedule == get_recipe("tiny").schedule


def printed(capsys: Any, *arguments: str) -> TrainConfig:
    """The configuration that a command line comes to."""
    assert main(["train", *arguments, "--print-config"]) == 0
    return validate(yaml.safe_load(capsys.readouterr().out))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--epochs", "3"], None),
        (["--set", "schedule.epochs=3"], None),
        (["--epochs", "3", "--train-num-samples", "1000"], 1000),
        (["--epochs", "3", "--train-num-samples", "40000000"], 40_000_000),
        (["--epochs", "3", "--set", "schedule.epoch_samples=1000"], 1000),
        (["--set", "schedule.steps=3"], 40_000_000),
    ],
)
def test_epochs_are_of_the_data_given(arguments, expected, capsys, tmp_path):
    assert printed(capsys, "eva02-b-16", *arguments).schedule.epoch_samples == expected
    file = tmp_path / "my.yaml"  # a whole configuration, as --print-config writes it
    file.write_text(dump_yaml(get_recipe("eva02-b-16")))
    assert printed(capsys, "eva02-b-16", "--config", str(file), *arguments).schedule.epoch_samples == expected


def test_own_epoch_samples_outlive_epochs(capsys: Any, tmp_path: Path) -> None:
    file = tmp_path / "my.yaml"
    file.write_text("schedule: {epoch_samples: 1000}")
    schedule = printed(capsys, "eva02-b-16", "--config", str(file), "--epochs", "3").schedule
    assert (schedule.steps, schedule.epochs, schedule.epoch_samples) == (None, 3, 1000)


@pytest.mark.parametrize(
    ("file", "arguments", "expected"),
    [
        ("{}", ["--set", "schedule.warmup_steps=20"], {"warmup_steps": 20, "warmup_share": None}),
        ("{}", ["--set", "schedule.warmup_steps=0"], {"warmup_steps": 0, "warmup_share": None}),
        ("{}", ["--warmup", "20", "--set", "schedule.warmup_share=0.2"], {"warmup_steps": 0, "warmup_share": 0.2}),
        ("{schedule: {warmup_steps: 9}}", [], {"warmup_steps": 9, "warmup_share": None}),
        ("{schedule: {warmup_steps: 9}}", ["--set", "schedule.warmup_share=0.2"], {"warmup_share": 0.2}),
        ("{}", ["--set", "schedule.steps=7"], {"steps": 7, "epochs": None, "warmup_share": 0.1}),
        ("{schedule: {steps: 9}}", ["--epochs", "2"], {"steps": None, "epochs": 2}),
        (
            "{schedule: {name: constant, cooldown_steps: 9}}",
            ["--set", "schedule.cooldown_share=0.2"],
            {"cooldown_steps": 0, "cooldown_share": 0.2},
        ),
    ],
)
def test_later_spelling_of_the_schedule_wins(file, arguments, expected, capsys, tmp_path):
    (tmp_path / "my.yaml").write_text(file)
    schedule = printed(capsys, "finetune", "--config", str(tmp_path / "my.yaml"), *arguments).schedule
    assert {key: getattr(schedule, key) for key in expected} == expected


def test_two_spellings_in_one_layer_are_refused(capsys: Any) -> None:
    both = ["schedule.warmup_steps=20", "schedule.warmup_share=0.2"]
    assert main(["train", "finetune", "--set", *both, "--print-config"]) == 2
    assert "warmup_steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "workers"),
    [([], 2), (["--workers", "4"], 4), (["--set", "data.workers=3"], 3), (["--print-config"], 4)],
)
def test_recipe_workers_are_at_most_the_cores(arguments, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    args = build_parser().parse_args(["train", "finetune", "--train-data", "x", *arguments])
    seen = []
    monkeypatch.setattr(
        "evaclip.train.trainer.train", lambda config, **options: seen.append(config) or Mock(stopped_by=None)
    )
    monkeypatch.setattr("evaclip.train.comments.commented_yaml", lambda config: seen.append(config) or "")
    args.run(args)
    assert [config.data.workers for config in seen] == [workers]


@pytest.mark.parametrize(
    ("error", "code", "starts"),
    [
        (torch.OutOfMemoryError("no room"), 1, 1),
        (TrainingDiverged("nan"), 1, 1),
        (UserError("a key"), 2, 2),
        (OSError("x"), 1, None),
    ],
)
def test_final_errors_stop_torchrun(error, code, starts, config_file, monkeypatch, tmp_path):
    """torchrun's agent is told to stop after so many starts."""

    def step(*args: Any, **options: Any) -> Any:
        raise error

    signals: list[tuple[int, int]] = []
    monkeypatch.setattr(TrainStep, "__call__", step)
    monkeypatch.setattr(os, "kill", lambda *given: signals.append(given))
    for start in (1, 2):
        for rank in (0, 1):
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / f"attempt_{start}" / str(rank) / "error.json"))
            assert main(["train", "tiny", "--config", config_file, "--overwrite"]) == code
        stopped = [given for given in signals if given == (os.getppid(), signal.SIGTERM)]
        assert len(stopped) == (starts is not None and start >= starts)


def test_released_weights_are_fine_tuned_on_a_folder(capsys, tmp_path, monkeypatch):
    """The whole way of one's own data, in small: a folder of classes, weights by name, and what is measured."""
    monkeypatch.chdir(tmp_path)
    for name in ("daisy", "rose"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for shade in range(20):
            Image.new("RGB", (16, 16), (250 * (name == "rose"), 10 * shade, 90)).save(f"mine/{name}/{shade}.png")
    save_file(create_model("tiny").state_dict(), "weights.safetensors")
    small = ["--batch-size", "8", "--epochs", "2", "--workers", "0", "--set", "held_out=0.2", "log.tensorboard=false"]
    command = ["train", "finetune", "--train-data", "mine/", *small]
    assert main([*command, "--pretrained", "tiny:weights.safetensors", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "held_out=0.2 of 40 samples: 8 are never trained on" in text
    assert "zero_shot_top1" in text
    # Captions are classes here: a picture has no caption of its own.
    assert "image_to_text_r1" not in text
    records = [json.loads(line) for line in Path("runs/finetune/log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "eval" in record] == [4, 8]
    config = validate(yaml.safe_load(Path("runs/finetune/config.yaml").read_text()))
    assert (config.model.name, config.model.pretrained) == ("tiny", "weights.safetensors")


def test_a_dry_run_shows_the_plan_and_saves_nothing(config_file, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["--set", "model.patch_dropout=0.5", "accumulation=2", "optim.visual.layer_decay=0.9"]
    assert main(["train", "tiny", "--config", config_file, "--dry-run", *arguments]) == 0
    text = capsys.readouterr().out
    for part in (
        "8 = 1 ranks x 2 micro-batches x 4",
        "8 of 16",
        "6 steps, 48 samples, 1.20 epochs",
        "first step",
        "loss",
    ):
        assert part in text
    assert [path.name for path in tmp_path.iterdir()] == ["my.yaml"]


def test_a_dry_run_promises_what_warm_steps_take(config_file, capsys, monkeypatch):
    from evaclip.train import dry_run
    from evaclip.train.step import TrainStep

    monkeypatch.setenv("COLUMNS", "200")
    now, durations, call = [0.0], iter([50.0, 2.0, 9.0, 2.0]), TrainStep.__call__

    def step(self: TrainStep, *args: Any, **options: Any) -> Any:
        now[0] += next(durations)
        return call(self, *args, **options)

    monkeypatch.setattr(TrainStep, "__call__", step)
    # Its clock alone: others measure with it too.
    monkeypatch.setattr(dry_run, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    arguments = ["train", "tiny", "--config", config_file, "--dry-run", "--set", "schedule.steps=100"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    # A minute is over after the third step.
    assert "50.00 s with all that starts" in text
    assert "5.50 s (median of steps 2 to 3" in text
    assert "100 steps" in text
    assert "about 0:09:10, an estimate" in text


def test_a_dry_run_goes_on_as_the_run_would(config_file: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["train", "tiny", "--config", config_file]
    assert main([*arguments, "--dry-run", "--resume", "nope"]) == 2
    assert "there is no checkpoint folder 'nope'" in capsys.readouterr().err
    assert main([*arguments, "--set", "schedule.steps=2"]) == 0
    assert main([*arguments, "--dry-run"]) == 0
    assert "it exists: the run itself needs --resume auto" in capsys.readouterr().out
    assert main([*arguments, "--dry-run", "--resume", "auto"]) == 2
    assert "was trained by another schedule: step 2 had 0.5 of the peak rate" in capsys.readouterr().err
    nevertheless = ["--set", "checkpoint.allow_schedule_change=true"]
    assert main([*arguments, *nevertheless, "--dry-run", "--resume", "auto"]) == 0
    text = capsys.readouterr().out
    assert "step_00000002 at step 2" in text
    assert "4 steps" in text


def test_a_run_from_a_file_and_notes_on_aliases(config_file: str, capsys: Any, tmp_path: Path) -> None:
    assert main(["train", "tiny", "--config", config_file, "--local-loss", "--name", "named"]) == 0
    assert "--local-loss: the loss here is always" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "named" / "log.jsonl").read_text().splitlines()]
    assert len(records) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tinny"], "error: unknown recipe 'tinny'; did you mean 'tiny'?"),
        (["tiny", "--set", "optim.lrr=1"], "error: unknown configuration key 'optim.lrr'; did you mean 'optim.lr'?"),
        (["tiny", "--batch-size", "-4"], "error: batch_size=-4: input should be greater than 0"),
        (["tiny", "--config", "missing.yaml"], "error: cannot read the configuration 'missing.yaml'"),
        (["eva02-b-16"], "error: data.train is not set"),
        (["tiny", "--resume", "latest", "--name", "never-made"], "error: there is no checkpoint folder"),
        (["tiny", "--bogus"], "error: unrecognized arguments: --bogus"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments: list[str], message: str, capsys: Any) -> None:
    code: Any
    try:
        code = main(["train", *arguments])
    except SystemExit as exc:
        code = exc.code
    errors = capsys.readouterr().err.splitlines()
    assert code == 2
    assert len(errors) == 1
    assert errors[0].startswith(message)


def test_a_signal_is_the_exit_code(config_file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from evaclip.train import trainer

    outcome = trainer.Outcome(tmp_path, 3, {}, stopped_by=143)
    monkeypatch.setattr(trainer, "train", lambda *args, **kwargs: outcome)
    with pytest.raises(SystemExit) as caught:
        main(["train", "tiny", "--config", config_file])
    assert caught.value.code == 143
