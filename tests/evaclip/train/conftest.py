"""Runs and models small enough that a step takes milliseconds."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_options import OPTIONS
from small_tasks import TASKS

from evaclip.factory import create_model
from evaclip.model.clip import CLIP
from evaclip.train.config import TrainConfig
from evaclip.train.overrides import parse_assignment, validate
from evaclip.train.tree import merge


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    # Threads cost more than they give at this size, far more on a busy machine.
    torch.set_num_threads(1)


@pytest.fixture
def small_model() -> CLIP:
    torch.manual_seed(0)
    model = create_model("tiny", **OPTIONS)
    # The head starts so small that its features are all alike; tests need features that differ.
    with torch.no_grad():
        model.visual.head.weight.mul_(1000)
    return model


@pytest.fixture
def run_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Makes the configuration of a run of 6 steps; arguments are assignments as in `--set`, and one of `TASKS`."""

    def make(*assignments: str, task: str = "clip") -> TrainConfig:
        tree: dict[str, Any] = {
            "name": "run",
            "output": str(tmp_path),
            "batch_size": 8,
            "device": "cpu",
            "data": {"train": "synthetic", "num_samples": 40, "workers": 0},
            "optim": {"lr": 1e-3},
            "schedule": {"steps": 6},
            "checkpoint": {"every_minutes": None},
            "log": {"every_steps": 1, "tensorboard": False, "progress": "plain"},
        }
        tree = merge(tree, TASKS[task].tree)
        for assignment in assignments:
            tree = merge(tree, parse_assignment(assignment))
        return validate(tree)

    return make
