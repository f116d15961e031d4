"""What tests of the benchmarks share."""

import pytest
import torch

from benchmarks import machine
from benchmarks.cases import optimizers


@pytest.fixture
def few_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizers over a handful of tensors instead of millions of embeddings."""
    sizes = tuple(map(torch.Size, [(50, 16), (16,), (), (3, 5, 2), (1, 4, 8)]))
    monkeypatch.setattr(optimizers, "sizes_of", lambda shape: sizes)


@pytest.fixture
def steady(monkeypatch):
    """A machine with known ceilings."""
    monkeypatch.setattr(machine, "ceilings", lambda device, dtypes: (10.0, {"float32": 0.1, "bfloat16": 0.2}))
