"""Every family that `accelerate` serves."""

import copy
from typing import Any

import torch
from dropin_family import Family
from dropin_open_clip import OPEN_CLIP
from dropin_timm import TIMM
from dropin_transformers import TRANSFORMERS
from torch import nn

import evakernels

FAMILIES = TIMM | TRANSFORMERS | OPEN_CLIP


def pair(name: str) -> tuple[Family, nn.Module, nn.Module]:
    """The family, an accelerated model and an untouched one."""
    family = FAMILIES[name]
    untouched = family.build()
    model = copy.deepcopy(untouched)
    evakernels.accelerate(model, force=True)
    return family, model, untouched


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def assert_same_gradients(actual, expected):
    """Compiled code gives parameters that had no part in the loss a gradient of zeros."""
    assert all(not actual[key].any() for key in actual.keys() - expected.keys())
    largest = max(float(g.abs().max()) for g in expected.values() if g.numel())
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key], value, rtol=1e-4, atol=1e-5 * largest, msg=lambda text, k=key: f"{k}: {text}"
        )
