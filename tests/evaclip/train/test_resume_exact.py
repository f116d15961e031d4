"""Killed without warning and resumed, a run ends at the same bits as one that was never disturbed."""

import os
import re
import signal
from typing import Any
from unittest.mock import patch

import pytest
import torch
from processes import in_processes
from safetensors.torch import load_file
from small_tasks import TASKS
from torch.multiprocessing import ProcessExitedException

from evaclip.train.config import TrainConfig
from evaclip.train.progress import PlainLines, read_log
from evaclip.train.sinks import Record
from evaclip.train.trainer import train

LAST = "checkpoints/step_00000008"

VARIANTS = {
    "adamw_workers_ema": ["optim.name=adamw", "data.workers=2", "ema_decay=0.9", "optim.grad_clip_norm=1.0"],
    "lamb_accumulation_dropout": [
        "optim.name=lamb", "accumulation=2", "precision=amp_fp16", "optim.visual.layer_decay=0.8",
        "model.savings.recompute=block",
    ],
}  # fmt: skip


def train_until_killed(config: TrainConfig, step: int) -> None:
    """Trains in a process, which dies with its data workers once it has said that `step` is done."""
    os.setsid()
    say = PlainLines.record

    def record(lines: PlainLines, record: Record) -> None:
        say(lines, record)
        if record.step == step:
            os.killpg(0, signal.SIGKILL)

    with patch.object(PlainLines, "record", record):
        train(config)


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize(
    "variant", ["adamw_workers_ema", pytest.param("lamb_accumulation_dropout", marks=pytest.mark.exhaustive)]
)
@pytest.mark.parametrize("task", TASKS)
def test_kill_and_resume_is_bit_exact(task, variant, run_config, capsys):
    dropout = [*TASKS[task].patch_dropout, *TASKS[task].drop_path]
    common = [
        *VARIANTS[variant],
        *(dropout if "dropout" in variant else []),
        "schedule={steps: 8, warmup_steps: 3}",
        "checkpoint={every_steps: 3, background: false}",
    ]
    straight = train(run_config(*common, "name=straight", task=task)).folder
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        in_processes(1, train_until_killed, run_config(*common, task=task), 5)
    capsys.readouterr()
    resumed = train(run_config(*common, task=task), resume="auto").folder
    # In the middle of an epoch of 40 samples.
    assert re.search(r"resuming from \S+ at step 3\b", capsys.readouterr().out)
    averages = ["ema.safetensors"] if "ema_decay=0.9" in common else []
    for name in ("model.safetensors", "optimizer/00000.safetensors", *averages):
        expected, found = load_file(straight / LAST / name), load_file(resumed / LAST / name)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), key
    logs = [[(r["step"], r["loss"], r["lr"]) for r in read_log(run / "log.jsonl")] for run in (straight, resumed)]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 8
    assert_equal_state(torch.load(straight / LAST / "state.pt"), torch.load(resumed / LAST / "state.pt"))


def assert_equal_state(expected: Any, found: Any, path: str = "") -> None:
    """Moments, loss scale, random states and positions are the same, too."""
    if isinstance(expected, dict):
        assert expected.keys() == found.keys(), path
        for key in expected.keys() - {"seconds"}:
            assert_equal_state(expected[key], found[key], f"{path}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(expected) == len(found), path
        for i, (left, right) in enumerate(zip(expected, found, strict=True)):
            assert_equal_state(left, right, f"{path}[{i}]")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(expected, found), path
    else:
        assert expected == found, path
