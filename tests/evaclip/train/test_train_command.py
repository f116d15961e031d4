"""`evaclip train` on the command line."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
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
        (["--epochs", "3", "--train-num-samples", "40000000"], 40_000_000),
        (["--set", "schedule.steps=3"], 40_000_000),
    ],
)
def test_epochs_are_of_the_data_given(arguments, expected, capsys, tmp_path):
    assert printed(capsys, "eva02-b-16", *arguments).schedule.epoch_samples == expected
    file = tmp_path / "my.yaml"  # a whole configuration, as --print-config writes it
    file.write_text(dump_yaml(get_recipe("eva02-b-16")))
    assert printed(capsys, "eva02-b-16", "--config", str(file), *arguments).schedule.epoch_samples == expected


@pytest.mark.parametrize(
    ("file", "arguments", "expected"),
    [
        ("{}", ["--set", "schedule.warmup_steps=0"], {"warmup_steps": 0, "warmup_fraction": None}),
        (
            "{}",
            ["--warmup", "20", "--set", "schedule.warmup_fraction=0.2"],
            {"warmup_steps": 0, "warmup_fraction": 0.2},
        ),
        ("{schedule: {warmup_steps: 9}}", ["--set", "schedule.warmup_fraction=0.2"], {"warmup_fraction": 0.2}),
        ("{}", ["--set", "schedule.steps=7"], {"steps": 7, "epochs": None, "warmup_fraction": 0.1}),
        ("{schedule: {steps: 9}}", ["--epochs", "2"], {"steps": None, "epochs": 2}),
    ],
)
def test_later_spelling_of_the_schedule_wins(file, arguments, expected, capsys, tmp_path):
    (tmp_path / "my.yaml").write_text(file)
    schedule = printed(capsys, "finetune", "--config", str(tmp_path / "my.yaml"), *arguments).schedule
    assert {key: getattr(schedule, key) for key in expected} == expected


@pytest.mark.parametrize(("arguments", "workers"), [([], 2), (["--workers", "4"], 4)])
def test_recipe_workers_are_at_most_the_cores(arguments, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    args = build_parser().parse_args(["train", "finetune", "--train-data", "x", *arguments])
    seen = []
    monkeypatch.setattr(
        "evaclip.train.trainer.train", lambda config, **options: seen.append(config) or Mock(stopped_by=None)
    )
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
    small = "--batch-size 8 --epochs 2 --workers 0 --set validation_split=0.2 log.tensorboard=false"
    command = ["train", "finetune", "--train-data", "mine/", *small.split()]
    assert main([*command, "--pretrained", "tiny:weights.safetensors", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert "validation_split=0.2 of 40 samples: 8 are never trained on" in text
    assert "zero_shot_top1" in text
    # Captions are classes here: a picture has no caption of its own.
    assert "image_to_text_r1" not in text
    records = [json.loads(line) for line in Path("runs/finetune/log.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "eval" in record] == [4, 8]
    config = validate(yaml.safe_load(Path("runs/finetune/config.yaml").read_text()))
    assert (config.model.name, config.model.pretrained) == ("tiny", "weights.safetensors")


def test_a_dry_run_shows_the_plan_and_saves_nothing(config_file, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["--set", "model.patch_dropout=0.5", "accumulation_steps=2", "optim.visual.layer_decay=0.9"]
    assert main(["train", "tiny", "--config", config_file, "--dry-run", *arguments]) == 0
    text = capsys.readouterr().out
    for part in ("8 = 1 ranks x 2 micro-batches x 4", "6 steps, 48 samples, 1.20 epochs", "first step", "samples/s"):
        assert part in text
    assert [path.name for path in tmp_path.iterdir()] == ["my.yaml"]


def test_a_dry_run_goes_on_as_the_run_would(config_file: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["train", "tiny", "--config", config_file]
    assert main([*arguments, "--dry-run", "--resume", "nope"]) == 2
    assert "there is no checkpoint folder 'nope'" in capsys.readouterr().err
    assert main([*arguments, "--set", "schedule.steps=2"]) == 0
    assert main([*arguments, "--dry-run"]) == 0
    assert "it exists: the run itself needs --resume auto" in capsys.readouterr().out
    assert main([*arguments, "--dry-run", "--resume", "auto"]) == 2
    assert "step 2 had 0.5 of the peak rate" in capsys.readouterr().err
    nevertheless = ["--set", "checkpoint.allow_schedule_change=true"]
    assert main([*arguments, *nevertheless, "--dry-run", "--resume", "auto"]) == 0
    text = capsys.readouterr().out
    assert "step_00000002 at step 2" in text
    assert "4 steps" in text


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("trian", "'train'"),
        ("data chek x", "'check'"),
        ("export a b --tower imge", "'image'"),
        ("train --set seed=1", "RECIPE"),
        ("train tinny", "'tiny'"),
        ("train tiny --batchsize 3", "'--batch-size'"),
        ("train tiny --set optim.lrr=1", "'optim.lr'"),
        ("train tiny --batch-size -4", "batch_size=-4"),
        ("train tiny --batch-size many", "--batch-size"),
        ("train tiny --config missing.yaml", "'missing.yaml'"),
        ("train finetune --set schedule.warmup_steps=20 schedule.warmup_fraction=0.2", "warmup_steps"),
        ("train eva02-b-16", "data.train"),
        ("train tiny --resume latest --name never-made", "checkpoint folder"),
        ("train tiny --device cpu --as-gpus 4", "--as-gpus"),
        ("train tiny --device cpu --as-gpus 0 --dry-run", "gpus"),
        ("train tiny --device cpu --as-gpus 64 --dry-run", "64 micro-batches"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(arguments: str, named: str, capsys: Any) -> None:
    code: Any
    try:
        code = main(arguments.split())
    except SystemExit as exc:
        code = exc.code
    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert named in line


def test_a_signal_is_the_exit_code(config_file: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from evaclip.train import trainer

    outcome = trainer.Outcome(tmp_path, 3, {}, stopped_by=143)
    monkeypatch.setattr(trainer, "train", lambda *args, **kwargs: outcome)
    with pytest.raises(SystemExit) as caught:
        main(["train", "tiny", "--config", config_file])
    assert caught.value.code == 143


SMALL = 'model.options={"vision": {"layers": 2}, "text": {"layers": 1}}'


def test_dry_run_prints_memory_by_kind(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--as-gpus", "4", "--dry-run", "--set", SMALL, "parallel.mode=shard", "ema_decay=0.9"]
    assert main(["train", "tiny", "--device", "cpu", *given]) == 0
    text = capsys.readouterr().out
    for word in ("4 GPUs", "parameters", "optimizer state", "averaged weights", "all"):
        assert word in text
