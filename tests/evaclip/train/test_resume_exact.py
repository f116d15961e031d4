"""Killed without warning and resumed, a run ends at the same bits as one that was never disturbed."""

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from processes import in_processes
from small_tasks import TASKS
from torch.multiprocessing import ProcessExitedException
from trained_runs import assert_equal, checkpoint, column, weights

from evaclip.train.config import TrainConfig
from evaclip.train.progress import PlainLines, Record
from evaclip.train.trainer import train
from evaclip.weights.shards import fingerprint

VARIANTS = {
    "adamw_workers_ema": ["optim.name=adamw", "data.workers=2", "ema_decay=0.9", "optim.grad_clip_norm=1.0"],
    "lamb_accumulation_dropout": [
        "optim.name=lamb", "accumulation_steps=2", "precision=amp_fp16", "optim.visual.layer_decay=0.8",
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
            while not (Path(config.output) / config.name / "checkpoints/latest").exists():
                time.sleep(0.01)
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
        "checkpoint={every_steps: 3}",
    ]
    straight = train(run_config(*common, "name=straight", task=task)).folder
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        in_processes(1, train_until_killed, run_config(*common, task=task), 5)
    capsys.readouterr()
    resumed = train(run_config(*common, task=task), resume="auto").folder
    # In the middle of an epoch of 40 samples.
    assert re.search(r"resuming from \S+ at step 3\b", capsys.readouterr().out)
    averages = ["ema"] if "ema_decay=0.9" in common else []
    for file in ("model", "optimizer/00000", *averages):
        assert_equal(weights(resumed, 8, file), weights(straight, 8, file))
    for key in ("step", "loss", "lr"):
        assert column(resumed, key) == column(straight, key)
    assert column(resumed, "step") == list(range(1, 9))
    # Moments, loss scale, positions and random states.
    for file in ("state.pt", "random/00000.pt"):
        assert_equal(torch.load(checkpoint(resumed, 8) / file), torch.load(checkpoint(straight, 8) / file))


def test_resume_from_format_4_is_bit_exact(run_config):
    """Format 4 has the random states of all ranks in state.pt."""
    common = ["schedule.steps=4", "checkpoint={every_steps: 2}", *TASKS["clip"].drop_path]
    straight = train(run_config(*common, "name=straight")).folder
    folder = shutil.copytree(checkpoint(straight, 2), straight.parent / "step_00000002")
    state = torch.load(folder / "state.pt")
    assert state.pop("ranks") == 1
    torch.save({**state, "rng": [torch.load(folder / "random/00000.pt")]}, folder / "state.pt")
    shutil.rmtree(folder / "random")
    meta = json.loads((folder / "meta.json").read_text())
    del meta["files"]["random/00000.pt"]
    meta["files"]["state.pt"] = fingerprint(folder / "state.pt")
    (folder / "meta.json").write_text(json.dumps({**meta, "format": 4}))
    resumed = train(run_config(*common), resume=str(folder)).folder
    assert_equal(weights(resumed, 4), weights(straight, 4))
    assert_equal(*(torch.load(checkpoint(run, 4) / "random/00000.pt") for run in (resumed, straight)))
