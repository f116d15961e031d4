"""The device of the op tests: `pytest tests/evakernels/test_swiglu.py --device cuda --backend triton`.

Tests draw on the CPU, from fixed seeds, so that every device sees the same numbers. On another device whatever they
make with a factory of torch (`torch.randn`, `torch.tensor`) is moved there at once, so nothing stays behind that a test
forgot; `device=` given to the factory holds. What other modules make (torch's optimizers, the library) is left alone.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._device import _device_constructors

from evakernels import BackendError, backends

DEVICE = torch.device("cpu")
"""Where the tests' tensors are."""
COMPILED = "cpu"
"""The backend whose kernels these tests are of, on this device."""

FOLDER = str(Path(__file__).parent)


def use(device: str, backend: str | None) -> None:
    """Sets both, before the tests are imported."""
    global DEVICE, COMPILED
    DEVICE = torch.device(device)
    COMPILED = backend or DEVICE.type
    if DEVICE.type != "cpu":
        for factory in _device_constructors():
            if getattr(torch, factory.__name__, None) is factory:
                setattr(torch, factory.__name__, moved(factory))


def moved(factory: Callable[..., Any]) -> Callable[..., Any]:
    """The factory whose tensors are on `DEVICE` where a test calls it."""

    @functools.wraps(factory)
    def make(*args: Any, **options: Any) -> Any:
        made = factory(*args, **options)
        by_test = sys._getframe(1).f_code.co_filename.startswith(FOLDER)
        if not by_test or options.get("device") is not None or not isinstance(made, torch.Tensor):
            return made
        return made.detach().to(DEVICE).requires_grad_(made.requires_grad)

    return make


def refusal_in(error: BaseException | None, backend: str) -> str | None:
    """Why `backend` doesn't support the call that raised an error; None for another error, or if it supports no op."""
    if not any(backends.unsupported_reasons(op, backend) == [] for op in backends.ops()):
        return None
    while error is not None:
        if isinstance(error, BackendError) and str(error).startswith(f"backend {backend!r} doesn't support "):
            return str(error)
        error = error.__cause__ or error.__context__
    return None
