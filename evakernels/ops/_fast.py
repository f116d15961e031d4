"""The fast path of plain eager calls: cached checks and choice of backend, without torch's dispatcher.

The dispatcher takes several times as long to reach an op written in Python as a small kernel takes to run; see
`python -m benchmarks op layer_norm gelu swiglu --shape small`. Results are the same without this file.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, is_grad_enabled
from torch._C import _is_any_autocast_enabled
from torch._C._functorch import is_legacy_batchedtensor
from torch.nn import Parameter

from .. import backends
from .._modes import needs_dispatcher, needs_grad

MAX_ENTRIES = 1 << 14
"""Maximum number of entries of all ops; a full cache, as from packed captions of changing lengths, is cleared."""

_dtype = torch.dtype
_Value = TypeVar("_Value")


class DispatchEntry(NamedTuple):
    """How calls with the same cache key run.

    Attributes:
        run: the implementation, with its context managers and checks of values.
        record: `apply` of the op's `autograd.Function`, without its Python part, which tests for functorch; None if
            autograd doesn't record these calls.
        changes: indices of the arguments that the op's check replaces, each with a tensor's dtype or another value.
    """

    run: Callable[..., Any]
    record: Callable[..., Any] | None
    changes: tuple[tuple[int, Any], ...]

    def changed(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments as the op's check returns them."""
        found = list(args)
        for i, value in self.changes:
            found[i] = found[i].to(value) if isinstance(found[i], Tensor) else value
        return tuple(found)


def with_fast_path(dispatched: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps `dispatched`, the `__call__` of an op: calls that don't need the dispatcher take the fast path."""

    def call(op: Any, *args: Any) -> Any:
        key = None if needs_dispatcher() else cache_key(op, args)
        if key is None:
            return dispatched(op, *args)
        entry = backends.choices.get(key) or _make_entry(op, args, key)
        if entry.changes:
            args = entry.changed(args)
        if entry.record is not None:
            return entry.record(*args, entry.run, True)
        return op.public_outputs(entry.run(*args))

    return call


def cache_key(op: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """A key of everything but the tensors' values; None with lists or tensor subclasses, and while ops are observed."""
    overrides = backends.overrides()
    if overrides is not None and overrides.observer is not None:
        return None
    key: list[Any] = [op.name, overrides, is_grad_enabled()]
    may_be_batched = op.takes_gradients  # by `is_grads_batched`, an older vmap that no mode shows
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            if may_be_batched and is_legacy_batchedtensor(arg):
                return None
            key += arg.dtype, arg.shape, arg.is_cpu or arg.device, arg.requires_grad
        elif arg is None or kind is _dtype:
            key.append(arg)
        elif kind is float or kind is bool or kind is int:
            key += kind, arg
        elif (kind is tuple or kind is list) and arg and type(arg[0]) is bool:
            key += tuple, *arg
        else:
            return None
    if _is_any_autocast_enabled():
        key += _autocast_dtype("cpu"), _autocast_dtype("cuda")
    return tuple(key)


def implementation(op: Any, args: tuple[Any, ...]) -> Callable[..., Any]:
    """Caches the op's `implementation` for calls through the dispatcher."""
    key = cache_key(op, args)
    if key is None:
        return op.implementation(args)  # type: ignore[no-any-return]
    key = "dispatched", *key
    found: Callable[..., Any] = backends.choices.get(key) or _cache(key, op.implementation(args))
    return found


def _cache(key: tuple[Any, ...], value: _Value) -> _Value:
    if len(backends.choices) >= MAX_ENTRIES:
        backends.choices.clear()
    backends.choices[key] = value
    return value


def _autocast_dtype(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _make_entry(op: Any, args: tuple[Any, ...], key: tuple[Any, ...]) -> DispatchEntry:
    checked = args if op.check is None else op.check(*args)
    changes = tuple(
        (i, after.dtype if isinstance(after, Tensor) else after)
        for i, (before, after) in enumerate(zip(args, checked, strict=True))
        if after is not before
    )
    on_known_device = all(tensor.is_cpu or tensor.is_cuda for tensor in backends.tensors(checked))
    run = op.implementation(checked) if on_known_device else op.overload
    record = super(torch.autograd.Function, op.function).apply if needs_grad(*args) else None
    return _cache(key, DispatchEntry(run, record, changes))
