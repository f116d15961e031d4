"""Checks that flash-attn's and xformers' attention functions share; the ops check the tensors."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..ops import _check

_ACCEPTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "alibi_slopes": (lambda slopes: slopes is None, "None"),
    "block_table": (lambda table: table is None, "None (no paged cache)"),
    "dropout_p": (lambda p: p == 0, "0.0 (use dropout after the output projection)"),
    "op": (lambda op: op is None, "None (evakernels.use_backend selects kernels)"),
    "p": (lambda p: p == 0, "0.0 (use dropout after the output projection)"),
    "softcap": (lambda cap: not cap or cap < 0, "0.0"),
    "window_size": (lambda window: window in ((-1, -1), [-1, -1]), "(-1, -1)"),
}
"""The check and the accepted value of each option."""


def check_options(function: str, **options: Any) -> None:
    """Raises `NotImplementedError` for the first option with a value that the ops don't support."""
    for name, value in options.items():
        is_accepted, accepted = _ACCEPTED[name]
        if not is_accepted(value):
            description = _check.kind(value) if isinstance(value, Tensor) else repr(value)
            raise NotImplementedError(f"{function}: {name} must be {accepted}, got {description}")


def refuse_lengths(function: str, lengths: str) -> None:
    """Raises if keys have other sequence lengths than queries."""
    raise NotImplementedError(f"{function}: keys must have the queries' sequence lengths, got {lengths}")
