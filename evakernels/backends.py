"""The choice of a backend for each call, with the reasons against the others.

Every op has a `reference` implementation in plain PyTorch and others. A call runs on the first backend that supports
it, in the order of `preference`. `use_backend` overrides the choice, `explain` prints it.
"""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .names import unknown

NAMESPACE = __name__.partition(".")[0]
"""Namespace of the operators in `torch.ops`: this package's name; a copy for the Hugging Face hub has another one."""

OPERATORS = getattr(torch.ops, NAMESPACE)

PREFERENCE = ("cuda", "triton", "cpu", "reference")
"""Backend names, the preferred one first."""

KERNEL_DTYPES = {torch.float32, torch.bfloat16, torch.float16}

Reasons = Callable[..., list[str]]
"""Maps the arguments of a call to the reasons why a backend doesn't support it; an empty list if it does."""


class BackendError(RuntimeError):
    """The requested backend doesn't support the call; the message lists the reasons."""


class ReferenceWarning(UserWarning):
    """A call on a GPU runs the slow reference; the message names the op and why no kernel supports the call.

    It is given once for each op and reason. With `EVAKERNELS_STRICT=1` in the environment it is a `BackendError`.
    """


@dataclass(frozen=True)
class Implementation:
    """One op on one backend, for calls with tensors on `device`."""

    backend: str
    function: Callable[..., Any]
    reasons: Reasons
    device: str | None = None

    def observed(self, op: str) -> Callable[..., Any]:
        """The function, which reports each call to the observer if there is one."""
        active = overrides()
        observer = None if active is None else active.observer
        if observer is None:
            return self.function

        def function(*args: Any) -> Any:
            observer(op, self.backend)
            return self.function(*args)

        return function


class Overrides(NamedTuple):
    """The settings of `use_backend` and `observed_by`."""

    forced: str | None = None
    observer: Callable[[str, str], None] | None = None


_implementations: dict[str, dict[str, Implementation]] = {}
_functions: dict[str, tuple[str, ...]] = {}
"""The ops between which a public function of another name chooses."""
choices: dict[Any, Any] = {}
"""Cache of `ops._fast`; cleared when a backend is added."""
_warned: set[tuple[str, str]] = set()
_OVERRIDES = f"{NAMESPACE}.overrides"
"""Key among the thread-local objects that torch hands to the threads of a backward pass."""
_were_overridden = False


def register(
    op: str, backend: str, function: Callable[..., Any], reasons: Reasons = lambda *args: [], device: str | None = None
) -> None:
    """Adds an implementation of `op` for one type of device, or for all with None.

    Raises `ValueError` for a backend that isn't in `PREFERENCE`.
    """
    if backend not in PREFERENCE:
        raise ValueError(unknown("backend", backend, PREFERENCE))
    _implementations.setdefault(op, {})[backend] = Implementation(backend, function, reasons, device)
    choices.clear()


def noting_writes(kernel: Callable[..., Any], overload: torch._ops.OpOverload) -> Callable[..., Any]:
    """Wraps `kernel`, which writes through pointers, so that autograd notices changes of the schema's arguments."""
    arguments = overload._schema.arguments
    written = [i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write]
    if not written:
        return kernel

    def run(*args: Any) -> Any:
        result = kernel(*args)
        torch.autograd.graph.increment_version(tensors([args[i] for i in written]))
        return result

    return run


def overload(op: str) -> torch._ops.OpOverload:
    """The operator of an op."""
    operator: torch._ops.OpOverload = getattr(OPERATORS, op).default
    return operator


@cache
def argument_names(op: str) -> tuple[str, ...]:
    return tuple(argument.name for argument in overload(op)._schema.arguments)


def by_name(op: str, args: tuple[Any, ...]) -> dict[str, Any]:
    """The leading arguments of an op by name."""
    return dict(zip(argument_names(op), args, strict=False))


def name_ops(function: str, *ops: str) -> None:
    """Registers the ops that a public function calls, for `explain`."""
    _functions[function] = ops


def select(op: str, args: tuple[Any, ...]) -> Implementation:
    """The implementation for `op(*args)`. Raises `BackendError` if a forced backend doesn't support the call."""
    candidates = _implementations[op]
    active = overrides()
    if active is not None and active.forced is not None:
        reasons = unsupported_reasons(op, active.forced, *args)
        if reasons:
            raise BackendError(f"backend {active.forced!r} doesn't support {op}: " + "; ".join(reasons))
        return candidates[active.forced]
    tensor = first_tensor(args)
    devices = (None,) if tensor is None else (None, tensor.device.type)
    for backend in preference(op, args):
        implementation = candidates.get(backend)
        if implementation is None or (tensor is not None and implementation.device not in devices):
            continue
        if not implementation.reasons(*args):
            if backend == "reference" and tensor is not None and tensor.device.type == "cuda":
                _warn_of_reference(op, args)
            return implementation
    raise BackendError(f"no backend supports {op}: {report(op, args)}")


def preference(op: str, args: tuple[Any, ...]) -> tuple[str, ...]:
    """The backends in the order in which a call tries them; on a GPU, a measured order comes first."""
    tensor = first_tensor(args)
    if tensor is None or not tensor.is_cuda or not torch.cuda.is_available():  # a fake tensor needs no GPU
        return PREFERENCE
    from . import tuning

    gpu, capability = tuning.find_gpu(tensor)
    first = tuning.measured_order(op, gpu, capability)
    if not first and family(op) == "contrastive" and 90 <= capability < 120:
        # Triton uses the tensor cores by wgmma or tcgen05, the CUDA kernels by mma.sync, which reaches a part of their
        # throughput. On other GPUs both use mma.sync.
        first = ("triton",)
    return (*first, *(backend for backend in PREFERENCE if backend not in first))


def _warn_of_reference(op: str, args: tuple[Any, ...]) -> None:
    reasons = "; ".join(
        f"{backend}: {', '.join(unsupported_reasons(op, backend, *args))}" for backend in ("cuda", "triton")
    )
    text = f"{op} runs as its reference, in plain PyTorch, which is slow on a GPU ({reasons})"
    strict = os.environ.get("EVAKERNELS_STRICT", "")
    if strict not in ("", "0", "1"):
        raise ValueError(f"the environment variable EVAKERNELS_STRICT must be 0 or 1, got {strict!r}")
    if strict == "1":
        raise BackendError(f"{text}; EVAKERNELS_STRICT is set")
    if (op, reasons) not in _warned:
        _warned.add((op, reasons))
        warnings.warn(f"{text}; EVAKERNELS_STRICT=1 makes this an error", ReferenceWarning, stacklevel=2)


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Makes every op use `backend` inside the `with` block, in this thread.

    As with `torch.no_grad`, other threads aren't affected, and a backward pass follows the block in which it runs, on
    whatever threads torch runs it. The choice also holds in compiled functions, but not in a captured CUDA graph.
    Raises `ValueError` for an unknown name; the ops raise `BackendError` if the backend doesn't support a call.
    """
    if backend not in PREFERENCE:
        raise ValueError(unknown("backend", backend, PREFERENCE))
    with _overridden(forced=backend):
        yield


@contextmanager
def observed_by(observer: Callable[[str, str], None]) -> Iterator[None]:
    """Calls `observer(op, backend)` for every op that runs inside the `with` block, in this thread and in backward."""
    with _overridden(observer=observer):
        yield


@contextmanager
def _overridden(**changes: Any) -> Iterator[None]:
    global _were_overridden
    previous = overrides()
    _were_overridden = True
    torch._C._stash_obj_in_tls(_OVERRIDES, (previous or Overrides())._replace(**changes))
    try:
        yield
    finally:
        torch._C._stash_obj_in_tls(_OVERRIDES, previous)


def overrides() -> Overrides | None:
    """The settings of this thread's blocks, or in backward of those around it."""
    # The look-up takes as long as the rest of a cache key.
    if not _were_overridden or not torch._C._is_key_in_tls(_OVERRIDES):
        return None
    active: Overrides | None = torch._C._get_obj_in_tls(_OVERRIDES)
    return active


def observe(op: str, backend: str) -> None:
    """Reports a call to the observer, if there is one."""
    active = None if torch.compiler.is_compiling() else overrides()
    if active is not None and active.observer is not None:
        active.observer(op, backend)


def find_ops(function: Any) -> tuple[str, ...]:
    """The ops that a public function calls, or the op of this name. Raises `ValueError` for an unknown one."""
    registered = (name for name in (function, f"{function}_forward") if name in _implementations)
    names = _functions.get(function) or tuple(registered)[:1]
    if function in ("gradient_norm", "sample_token_index"):
        raise ValueError(f"op must be one with backends, got {function}, which is made of torch's own operators")
    if not names:
        public = {name.removesuffix("_forward") for name in _implementations if not name.endswith("_backward")}
        raise ValueError(unknown("op", function, sorted({*public, *_functions, *_implementations})))
    return names


def ops() -> dict[str, list[str]]:
    """Every registered op with the backends that implement it."""
    return {
        op: [b for b in PREFERENCE if b in implementations] for op, implementations in sorted(_implementations.items())
    }


def family(op: str) -> str:
    """The family of an op: the name of its files."""
    return _implementations[op]["reference"].function.__module__.rpartition(".")[2]


def unsupported_reasons(op: str, backend: str, *args: Any) -> list[str]:
    """The reasons why `backend` doesn't support `op(*args)`; without arguments, reasons for every call."""
    implementation = _implementations[op].get(backend)
    if implementation is None:
        return [f"{op} has no {backend} implementation"]
    return implementation.reasons(*args)


def report(op: str, args: tuple[Any, ...]) -> str:
    lines, chosen = [], False
    for backend in preference(op, args):
        reasons = unsupported_reasons(op, backend, *args)
        usable = not reasons and not chosen
        chosen = chosen or usable
        verdict = "selected" if usable else "; ".join(reasons) or "usable, but not preferred here"
        lines.append(f"{op} on {backend}: {verdict}")
    return "\n".join(lines)


def tensors(args: Sequence[Any]) -> list[Tensor]:
    """All tensors among the arguments of an op, in lists too."""
    result: list[Tensor] = []
    for arg in args:
        if isinstance(arg, Tensor):
            result.append(arg)
        elif isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor):
            result += arg
    return result


def dtype_reasons(args: Sequence[Any]) -> list[str]:
    """Why kernels don't support the floating-point dtypes among the arguments of an op."""
    dtypes = {tensor.dtype for tensor in tensors(args)} | {arg for arg in args if type(arg) is torch.dtype}
    unknown = sorted(str(dtype) for dtype in dtypes - KERNEL_DTYPES if dtype.is_floating_point)
    return [f"{dtype} is not one of float32, bfloat16, float16" for dtype in unknown]


def first_tensor(args: tuple[Any, ...]) -> Tensor | None:
    """The first tensor among the arguments of an op; the call runs on its device."""
    for arg in args:
        if isinstance(arg, Tensor):
            return arg
        if isinstance(arg, (list, tuple)) and arg and isinstance(arg[0], Tensor):
            return arg[0]
    return None
