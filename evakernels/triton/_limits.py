"""Which sizes the kernels serve: questions about a call's shapes, asked without importing Triton.

A function takes the arguments of its op, or the first of them, and returns the reasons why Triton can't serve a call
of these shapes.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

Reasons = Callable[..., list[str]]

MAX_WIDTH = 1 << 13
"""Channels of a norm's row: up to which registers hold it, and in backward its gradient and the sums over rows."""

MAX_SWIGLU_WIDTH = 1 << 12
"""The same of SwiGLU, whose backward holds more: with a norm of a row, without one of the piece of a row that a program
has. Forward serves no more than backward, so that no call is served by both Triton and another backend."""

MAX_HEAD_DIM = 128
"""A program of attention holds its rows in registers."""


def _norm(*args: Any) -> list[str]:
    return _too_wide(args[0], MAX_WIDTH)


def _swiglu(weight: int, *args: Any) -> list[str]:
    return [] if _argument(args, weight) is None else _too_wide(args[0], MAX_SWIGLU_WIDTH)


def _attention(first: int, scale: int, *args: Any) -> list[str]:
    """`first` and `scale` are the places of the queries and of that number."""
    head_dim, found = args[0].shape[-1], []
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        found.append(f"head_dim {head_dim} is not one of 1 to {MAX_HEAD_DIM}")
    if (value := _argument(args, scale)) is not None and not value > 0:
        found.append(f"scale {value} is not positive")
    q, k = args[0], _argument(args, first + 1)
    if isinstance(k, Tensor) and k.shape[-2] != q.shape[-2]:
        found.append(f"{q.shape[-2]} heads of queries share {k.shape[-2]} of keys")
    if isinstance(k, Tensor) and k.shape[-3] != q.shape[-3]:
        found.append(f"{k.shape[-3]} keys are not as many as the {q.shape[-3]} queries")
    return found


def _packed_attention(first: int, cos: int, scale: int, *args: Any) -> list[str]:
    found = _attention(first, scale, *args)
    return [*found, "packed sequences are not rotated"] if isinstance(_argument(args, cos), Tensor) else found


def _argument(args: tuple[Any, ...], place: int) -> Any:
    return args[place] if place < len(args) else None


def _too_wide(rows: Tensor, limit: int) -> list[str]:
    width = rows.shape[-1]
    return [f"rows of {width} channels are longer than {limit}"] if width > limit else []


REASONS: dict[str, Reasons] = {
    "layer_norm_forward": _norm,
    "layer_norm_backward": _norm,
    "add_layer_norm_forward": _norm,
    "add_layer_norm_backward": _norm,
    "layer_norm_add_forward": _norm,
    "layer_norm_add_backward": _norm,
    "swiglu_forward": partial(_swiglu, 2),
    "swiglu_backward": partial(_swiglu, 3),
    "rope_attention_forward": partial(_attention, 0, 9),
    "rope_attention_backward": partial(_attention, 1, 12),
    "packed_attention_forward": partial(_packed_attention, 0, 4, 10),
    "packed_attention_backward": partial(_packed_attention, 1, 7, 13),
}
"""By op; one that isn't here serves all shapes."""
