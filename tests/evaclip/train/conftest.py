"""Runs and models small enough that a step takes milliseconds."""

import pytest
import torch
from small_tasks import OPTIONS

from evaclip.factory import create_model
from evaclip.model.clip import CLIP


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
