"""Whether a call is plain eager execution, in which a shorter way to the same result goes unnoticed."""

from typing import Any

import torch
from torch.autograd import forward_ad


def is_plain(args: tuple[Any, ...]) -> bool:
    """Whether all tensors in `args` are torch's own, on a CPU or a GPU, and nothing but autograd watches the call.

    What may watch are compilers, tracers, dispatch and function modes, functorch's transforms, forward-mode
    differentiation and the profiler.
    """
    if torch.compiler.is_compiling():
        return False
    for arg in args:
        kind = type(arg)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            if not (arg.is_cpu or arg.is_cuda):
                return False
        elif kind is list or kind is tuple or isinstance(arg, torch.Tensor):
            return False
    return not (
        forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )


def is_transformed() -> bool:
    """Whether a transform of functorch or forward-mode differentiation is at work."""
    return torch._C._are_functorch_transforms_active() or has_dual_numbers()


def has_dual_numbers() -> bool:
    """Whether forward-mode differentiation is at work. In compiled code the tracer asks, once."""
    return forward_ad._current_level >= 0


# As torch.compiler.assume_constant_result says it, which imports the compiler.
has_dual_numbers._dynamo_marked_constant = True  # type: ignore[attr-defined]


def wants_gradient(args: tuple[Any, ...]) -> bool:
    """Whether autograd has to know of a call with `args`."""
    return torch.is_grad_enabled() and torch._C._any_requires_grad(*args)
