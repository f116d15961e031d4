"""Runs and models small enough that a step takes milliseconds."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_tasks import OPTIONS

from evaclip.factory import create_model
from evaclip.model.clip import CLIP
from evaclip.train.config import TrainConfig
from evaclip.train.trainer import train

_TRAINED: list[Path] = []


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
def trained(run_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a finished run of `run_config()`, with averaged weights and checkpoints of steps 3 and 6."""
    config = run_config("checkpoint.every_steps=3", "ema_decay=0.9")
    if not _TRAINED:
        _TRAINED.append(train(replace(config, output=str(tmp_path_factory.mktemp("trained")))).folder)
    return Path(shutil.copytree(_TRAINED[0], Path(config.output) / config.name))
