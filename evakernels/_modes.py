"""Queries of compilers, tracers, modes, functorch's transforms, forward-mode differentiation and hooks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

# Names of this module are looked up faster than attributes.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._is_torch_function_mode_enabled
_is_tracing = torch._C._is_tracing
_any_requires_grad = torch._C._any_requires_grad
_is_grad_enabled = torch.is_grad_enabled
are_transforms_active = torch._C._are_functorch_transforms_active
has_global_hooks: Callable[[], bool] = _has_any_global_hook


def needs_dispatcher() -> bool:
    """Whether a call has to go through torch's dispatcher, as more than autograd intercepts ops."""
    return (
        is_compiling()
        or forward_ad._current_level >= 0
        or _dispatch_modes() > 0
        or _function_modes()
        or are_transforms_active()
        or _is_tracing()
    )


def is_checkpointed() -> bool:
    """Whether non-reentrant activation checkpointing runs or repeats this code; False in compiled code."""
    if is_compiling():
        return False
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks is not None and hooks[0].__module__ == "torch.utils.checkpoint"


def is_observed(module: nn.Module) -> bool:
    """Whether hooks, global ones too, `module.compile()` or its own forward depend on calls of the module."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None  # set by `module.compile()`
        or "forward" in module.__dict__
        or has_global_hooks()
    )


def is_transformed() -> bool:
    """Whether a transform of functorch or forward-mode differentiation is active."""
    return are_transforms_active() or has_dual_numbers()


def has_dual_numbers() -> bool:
    """Whether forward-mode differentiation is active; a constant in compiled code."""
    return forward_ad._current_level >= 0


# As torch.compiler.assume_constant_result sets it, which imports the compiler.
has_dual_numbers._dynamo_marked_constant = True  # type: ignore[attr-defined]


def needs_grad(*args: Any) -> bool:
    """Whether autograd has to record a call with these arguments."""
    return _is_grad_enabled() and _any_requires_grad(*args)
