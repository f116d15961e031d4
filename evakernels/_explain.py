"""The backend of a call, with the reasons against the others."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from . import backends, ops


def explain(op: str | Callable[..., Any], *args: Any, **options: Any) -> str:
    """Reports which backend runs a call and why the others don't, one line each; the op doesn't run.

    A loss over several ranks still gathers its features, so every rank must call `explain`.

    Args:
        op: a public function or its name, such as `"layer_norm"`, or an op of `torch.ops.evakernels` or its name, such
            as `"layer_norm_backward"`.
        args, options: arguments of the public function, or of the op in the order of its schema. They may be
            incomplete: the lines then hold for every such call, for each op that the function may call.

    Raises:
        ValueError: for an unknown name, and as the function.
        TypeError: for arguments that the function doesn't take, and as the function.
    """
    # Another library may have a function of the same name.
    module = str(getattr(op, "__module__", ""))
    is_ours = str(__package__) in module or backends.NAMESPACE in module
    name = getattr(op, "__name__", op) if is_ours else op
    calls = [(op_name, args) for op_name in backends.find_ops(name)]
    is_operator = isinstance(op, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
    public = None if is_operator else getattr(ops, str(name), None)
    if public is not None and (args or options):
        calls = _find_calls(public, args, options) or calls
    elif options:
        raise TypeError(f"{name}: arguments must be given by position, got {', '.join(options)}")
    return "\n".join(backends.report(*call) for call in calls)


class _OpCalled(Exception):
    """Ends a public function where it calls an op."""


class _AtFirstOp(TorchFunctionMode):
    """Raises `_OpCalled` with the name and the arguments of the first op that is called."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = str(func).partition(".")
        if namespace == backends.NAMESPACE:
            raise _OpCalled(name.partition(".")[0], args)
        return func(*args, **(kwargs or {}))


def _find_calls(
    public: Callable[..., Any], args: tuple[Any, ...], options: dict[str, Any]
) -> list[tuple[str, tuple[Any, ...]]]:
    """The op that a public function calls with these arguments, and its own; nothing if some are missing."""
    signature = inspect.signature(public)
    try:
        arguments = signature.bind_partial(*args, **options).arguments
    except TypeError as error:
        accepted = ", ".join(signature.parameters)
        raise TypeError(f"{public.__name__}: arguments must be of {accepted}, {error}") from None
    if any(p.default is p.empty and name not in arguments for name, p in signature.parameters.items()):
        return []
    try:
        with _AtFirstOp():
            public(*args, **options)
    except _OpCalled as call:
        return [call.args]
    return []
