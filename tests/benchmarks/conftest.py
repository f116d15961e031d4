"""What tests of the shipped operations share."""

import pytest
import torch

from benchmarks.cases import _optimizer


@pytest.fixture
def few_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Optimizers over a handful of tensors instead of millions of embeddings."""
    sizes = tuple(map(torch.Size, [(50, 16), (16,), (), (3, 5, 2), (1, 4, 8)]))
    monkeypatch.setattr(_optimizer, "sizes_of", lambda shape: sizes)
