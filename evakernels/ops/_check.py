"""Argument checks that several ops share. An error reads: `<argument> must be <accepted>, got <given>`."""

import math
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPS = "a finite number, 0 or more"
_NUMBERS = (float, int, torch.SymFloat, torch.SymInt)
_MAKERS = {"ndarray": "torch.from_numpy", "list": "torch.tensor", "tuple": "torch.tensor"}


def floating(op: str, **tensors: Any) -> None:
    """Raises `TypeError` unless each tensor has a floating-point dtype of the ops."""
    dtypes(op, FLOATS, **tensors)


def floating_or_none(op: str, **tensors: Any) -> None:
    """`floating`, for the arguments that aren't None."""
    floating(op, **{name: tensor for name, tensor in tensors.items() if tensor is not None})


def dtypes(op: str, accepted: tuple[torch.dtype, ...], **tensors: Any) -> None:
    """Checks tensors with one of these dtypes."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise not_a_tensor(op, name, tensor)
        if tensor.dtype not in accepted:
            raise TypeError(f"{op}: {name} must be {_listed(accepted)}, got {tensor.dtype}")


def _listed(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(map(str, dtypes))


def not_a_tensor(op: str, name: str, value: Any) -> TypeError:
    """Returns the error for a value that isn't a tensor."""
    maker = _MAKERS.get(type(value).__name__)
    hint = f"; {maker} makes one" if maker else ""
    return TypeError(f"{op}: {name} must be a torch.Tensor, got {kind(value)}{hint}")


def number(op: str, name: str, value: Any, accepted: str) -> None:
    """Raises `TypeError` unless `value` is a number; `accepted` is for the message."""
    if not isinstance(value, _NUMBERS) and not isinstance(value, Real):
        raise TypeError(f"{op}: {name} must be {accepted}, got {kind(value)}")


def integer(op: str, name: str, value: Any, accepted: str) -> None:
    """Raises `TypeError` unless `value` is an integer."""
    if isinstance(value, bool) or not isinstance(value, (Integral, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be an integer, {accepted}, got {value!r}")


def eps(op: str, value: float) -> float:
    """Returns `value` if it is a finite number of 0 or more."""
    if type(value) is not float:
        number(op, "eps", value, EPS)
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{op}: eps must be {EPS}, got {value}")
    return value


def betas(op: str, values: Any) -> None:
    """Checks the decay rates of two moments."""
    accepted = "two numbers from 0 to below 1"
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) != 2:
        raise TypeError(f"{op}: betas must be {accepted}, got {values!r}")
    for beta in values:
        number(op, "betas", beta, accepted)
    if not all(0.0 <= beta < 1.0 for beta in values):
        raise ValueError(f"{op}: betas must be {accepted}, got {values}")


def scale(op: str, value: Any) -> None:
    """Checks a factor of attention scores, or None."""
    if value is not None:
        number(op, "scale", value, "a number, or None")


def kind(value: Any) -> str:
    """The type of `value` with an article, for a message."""
    if value is None:
        return "None"
    module, name = type(value).__module__.partition(".")[0], type(value).__qualname__
    name = name if module == "builtins" else f"{module}.{name}"
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def same_device(op: str, **tensors: Tensor | None) -> None:
    """Raises `ValueError` unless all tensors are on one device."""
    if len({tensor.device for tensor in tensors.values() if tensor is not None}) > 1:
        devices = ", ".join(f"{name} on {tensor.device}" for name, tensor in tensors.items() if tensor is not None)
        raise ValueError(f"{op}: tensors must be on one device, got {devices}")


def shape(op: str, name: str, tensor: Tensor | None, expected: tuple[int, ...], meaning: str) -> None:
    """Raises `ValueError` unless `tensor` is None or has the shape `expected`, such as `[C]` in `meaning`."""
    if tensor is not None and tensor.shape != expected:
        raise ValueError(f"{op}: {name} must have shape {meaning} = {expected}, got {tuple(tensor.shape)}")


def out_dtype(op: str, dtype: Any) -> None:
    """Raises `TypeError` unless `dtype` is None or a dtype of the ops."""
    if dtype is not None and (not isinstance(dtype, torch.dtype) or dtype not in FLOATS):
        raise TypeError(f"{op}: out_dtype must be None or {_listed(FLOATS)}, got {dtype!r}")


def parameter_dtype(op: str, x: Tensor, out_dtype: torch.dtype | None = None, **tensors: Tensor | None) -> None:
    """Checks parameters `[C]`: in the dtype of `x`, of the result, or float32."""
    accepted = {x.dtype: "as x", torch.float32: ""}
    if out_dtype is not None:
        accepted.setdefault(out_dtype, "as out_dtype")
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise not_a_tensor(op, name, tensor)
        if tensor.dtype not in accepted:
            listed = " or ".join(f"{dtype} ({why})" if why else str(dtype) for dtype, why in accepted.items())
            raise TypeError(f"{op}: {name} must be {listed}, got {tensor.dtype}")


def in_one_dtype(weight: Tensor | None, bias: Tensor | None) -> tuple[Any, ...]:
    """Weight and bias in the wider of their dtypes, as kernels take one. Autograd casts each gradient back."""
    if weight is None or bias is None or weight.dtype == bias.dtype:
        return weight, bias
    dtype = torch.promote_types(weight.dtype, bias.dtype)
    return weight.to(dtype), bias.to(dtype)


def heads(op: str, layout: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Checks shapes, dtypes and devices of queries, keys and values; `layout` names the dimensions of the queries."""
    if q.dim() != layout.count(",") + 1 or q.shape[-1] == 0:
        raise ValueError(f"{op}: q must have shape {layout} with D > 0, got {tuple(q.shape)}")
    same_device(op, q=q, k=k, v=v)
    if k.dim() != q.dim() or k.shape[0] != q.shape[0] or k.shape[-1] != q.shape[-1]:
        keys = layout.replace("N", "M").replace("H", "Hkv")
        raise ValueError(f"{op}: k must have shape {keys} for q {layout} = {tuple(q.shape)}, got {tuple(k.shape)}")
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if heads != kv_heads and (kv_heads == 0 or heads % kv_heads):
        raise ValueError(f"{op}: k must have a number of heads that divides the {heads} of q, got {kv_heads}")
    shape(op, "v", v, tuple(k.shape), "k.shape")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise TypeError(f"{op}: {name} must be {q.dtype} (as q), got {tensor.dtype}")


def token_range(op: str, token_index: Tensor, num_tokens: int, *, lowest: int = 0, name: str = "token_index") -> None:
    """Raises `IndexError` for a value outside `lowest .. num_tokens - 1`, on a CPU: others would synchronise."""
    if token_index.device.type != "cpu" or token_index.numel() == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(token_index))
    if low < lowest or high >= num_tokens:
        raise IndexError(f"{op}: {name} must be from {lowest} to {num_tokens - 1}, got {low} to {high}")


def distinct_tokens(op: str, token_index: Tensor, num_tokens: int) -> None:
    """Raises `IndexError` for a row [B, K] that names a token twice, on a CPU; the values are in range."""
    if token_index.device.type != "cpu":
        return
    marks = torch.zeros(token_index.shape[0], num_tokens, dtype=torch.bool).scatter_(1, token_index, True)
    distinct = marks.sum(1)
    if bool((distinct < token_index.shape[1]).any()):
        sample = int(distinct.argmin())
        raise IndexError(f"{op}: token_index must be distinct in each sample, got a token twice in sample {sample}")
