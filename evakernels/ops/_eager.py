"""What a call in eager mode is like, and whether anybody watches it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn import Parameter

from evakernels import backends

# Asked at every call: names of this module, as each dot costs.
_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._is_torch_function_mode_enabled
_transforms = torch._C._are_functorch_transforms_active
_tracing_state = torch._C._get_tracing_state
_any_autocast = torch._C._is_any_autocast_enabled
dtype = torch.dtype


def is_watched() -> bool:
    """Whether more than autograd looks at the ops that run: a compiler, a tracer, a mode, a transform of functorch or
    forward-mode differentiation. Otherwise a shorter way to the same result goes unnoticed."""
    return (
        is_compiling()
        or forward_ad._current_level >= 0
        or _modes() > 0
        or _function_modes()
        or _transforms()
        or _tracing_state() is not None
    )


def likeness(args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """What calls have in common that are served alike: all that is asked about their arguments but what tensors hold.

    None where that isn't known, as for lists and for tensors that aren't torch's own; and while ops are observed.
    """
    overrides = backends.overrides
    if overrides is not None and overrides.observer is not None:  # which must not be kept
        return None
    key: list[Any] = [overrides]
    for arg in args:
        kind = type(arg)
        if kind is Tensor or kind is Parameter:
            key += arg.dtype, arg.shape, arg.device
        elif arg is None or kind is float or kind is bool or kind is int or kind is dtype:
            key += kind, arg
        elif (kind is tuple or kind is list) and arg and type(arg[0]) is bool:
            key += tuple, *arg
        else:
            return None
    if _any_autocast():
        key += _autocast_of("cpu"), _autocast_of("cuda")
    return tuple(key)


def _autocast_of(device: str) -> torch.dtype | None:
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def is_plain(*args: Tensor | None) -> bool:
    """Whether all tensors are torch's own and nobody watches the call."""
    return not is_watched() and all(arg is None or type(arg) is Tensor or type(arg) is Parameter for arg in args)


def is_transformed() -> bool:
    """Whether a transform of functorch or forward-mode differentiation is at work."""
    return _transforms() or has_dual_numbers()


def has_dual_numbers() -> bool:
    """Whether forward-mode differentiation is at work. In compiled code the tracer asks, once."""
    return forward_ad._current_level >= 0


# As torch.compiler.assume_constant_result says it, which imports the compiler.
has_dual_numbers._dynamo_marked_constant = True  # type: ignore[attr-defined]


def wants_gradient(args: tuple[Any, ...]) -> bool:
    """Whether autograd has to know of a call with `args`."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
