import sys

import pytest
import torch

from evakernels.dropin import _gate
from evakernels.nn import linear

_linear = sys.modules[linear.__module__]


@pytest.fixture
def everything_served(monkeypatch):
    """Small tensors are served too, and what isn't worth it on a CPU: the swapped code runs wherever it can."""
    for name in _gate.OPS:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            monkeypatch.setitem(_gate._SERVED, (name, "cpu", dtype), 0)
    monkeypatch.setattr(_linear, "_MIN_MACS", dict.fromkeys(_linear._MIN_MACS, 0))
    if torch.backends.mkldnn.is_available():
        monkeypatch.setattr(_linear, "served_dtypes", lambda: frozenset({torch.float32}))
