"""Argument checks that several ops share. Each raises with what was given and what is accepted."""

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def floating(op: str, **tensors: Tensor | None) -> None:
    """Every tensor has a floating-point dtype that the ops take."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} is {tensor.dtype}; accepted: float64, float32, bfloat16, float16")


def same_device(op: str, **tensors: Tensor | None) -> None:
    """All tensors are on one device."""
    if len({tensor.device for tensor in tensors.values() if tensor is not None}) > 1:
        found = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items() if tensor is not None)
        raise ValueError(f"{op}: tensors on different devices: {found}")


def shape(op: str, name: str, tensor: Tensor | None, expected: tuple[int, ...], meaning: str) -> None:
    """`tensor`, when given, has exactly the shape `expected`; `meaning` names its dimensions."""
    if tensor is not None and tensor.shape != expected:
        raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}; expected {meaning} = {expected}")


def parameter_dtype(op: str, x: Tensor, **tensors: Tensor | None) -> None:
    """Per-channel parameters have the dtype of `x` or float32 (mixed precision)."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{op}: {name} is {tensor.dtype}; accepted: {x.dtype} (as x) or torch.float32")


def heads(op: str, layout: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Queries, keys and values agree in all; `layout` names their dimensions."""
    if q.dim() != layout.count(",") + 1:
        raise ValueError(f"{op}: q has shape {tuple(q.shape)}; expected {layout}")
    floating(op, q=q, k=k, v=v)
    same_device(op, q=q, k=k, v=v)
    for name, tensor in (("k", k), ("v", v)):
        shape(op, name, tensor, tuple(q.shape), "the shape of q")
        if tensor.dtype != q.dtype:
            raise TypeError(f"{op}: {name} is {tensor.dtype}; accepted: {q.dtype} (as q)")
