"""Killed without warning and resumed, a run ends at the same bits as one that was never disturbed."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from evaclip.train.config import TrainConfig
from evaclip.train.overrides import dump_yaml
from evaclip.train.progress import read_log
from evaclip.train.trainer import train

LAST = "checkpoints/step_00000012"

VARIANTS = {
    "adamw_workers_ema": ["optim.name=adamw", "data.workers=2", "ema_decay=0.9", "optim.grad_clip_norm=1.0"],
    "lamb_accumulation_dropout": [
        "optim.name=lamb", "accumulation=2", "model.patch_dropout=0.5", "model.options.vision.drop_path=0.3",
        "precision=amp_fp16", "optim.visual.layer_decay=0.8", "model.savings.recompute=block", "loss.name=siglip",
    ],
}  # fmt: skip


def kill_after(config: TrainConfig, step: int, folder: Path) -> str:
    """Runs a training as a process of its own and kills it once it has logged `step`; returns what it printed."""
    path = folder / "config.yaml"
    path.write_text(dump_yaml(config))
    command = [sys.executable, "-m", "evaclip", "train", "tiny", "--config", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    lines = []
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith(f"step {step}/"):
                os.killpg(process.pid, signal.SIGKILL)
                break
    assert process.returncode == -signal.SIGKILL, "".join(lines)
    return "".join(lines)


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_kill_and_resume_is_bit_exact(
    variant: str, run_config: Callable[..., TrainConfig], tmp_path: Path, capsys: Any
) -> None:
    common = [
        *VARIANTS[variant],
        "schedule={steps: 12, warmup_steps: 3}",
        "checkpoint={every_steps: 4, background: false}",
    ]
    straight = train(run_config(*common, "name=straight")).folder
    kill_after(run_config(*common), 6, tmp_path)
    capsys.readouterr()
    resumed = train(run_config(*common), resume="auto").folder
    # Either checkpoint lies in the middle of an epoch of 40 samples; the process may reach the second before it dies.
    assert re.search(r"resuming from \S+ at step (4|8)\b", capsys.readouterr().out)
    averages = ["ema.safetensors"] if "ema_decay=0.9" in common else []
    for name in ("model.safetensors", "optimizer/moments.safetensors", *averages):
        expected, found = load_file(straight / LAST / name), load_file(resumed / LAST / name)
        assert expected.keys() == found.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), key
    logs = [[(r["step"], r["loss"], r["lr"]) for r in read_log(run / "log.jsonl")] for run in (straight, resumed)]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 12
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
