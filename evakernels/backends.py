"""Which implementation serves a call, and the reasons why another can't.

Every op has a `reference` implementation in plain PyTorch; further backends are registered beside it. A call takes the
first backend in `PREFERENCE` that can serve it. `use_backend` overrides the choice, `explain` prints it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from evakernels import _names

PREFERENCE = ("cuda", "triton", "cpu", "reference")
"""Backend names, the preferred one first."""

Reasons = Callable[..., list[str]]
"""Maps the arguments of a call to the reasons why a backend can't serve it; an empty list means that it can."""


class BackendError(RuntimeError):
    """The backend that was asked for can't serve the call; the message lists the reasons."""


@dataclass(frozen=True)
class Implementation:
    """One op on one backend. A call whose tensors are on another type of device than `device` isn't for it."""

    backend: str
    function: Callable[..., Any]
    reasons: Reasons
    device: str | None = None


_implementations: dict[str, dict[str, Implementation]] = {}
_functions: dict[str, tuple[str, ...]] = {}
"""The ops that a public function of another name calls, one of them a call."""
_forced: str | None = None
_observer: Callable[[str, str], None] | None = None


def register(
    op: str,
    backend: str,
    function: Callable[..., Any],
    reasons: Reasons = lambda *args: [],
    device: str | None = None,
) -> None:
    """Adds an implementation of `op`, for one type of device or, with None, for all.

    `reasons` tells of a wrong device too; `device` spares most calls the question.

    Raises:
        ValueError: for a backend that `PREFERENCE` doesn't rank.
    """
    if backend not in PREFERENCE:
        raise ValueError(_names.unknown("backend", backend, PREFERENCE))
    _implementations.setdefault(op, {})[backend] = Implementation(backend, function, reasons, device)


def name_ops(function: str, *ops: str) -> None:
    """Tells `explain` which ops the public function of this name calls."""
    _functions[function] = ops


def select(op: str, args: tuple[Any, ...]) -> Implementation:
    """The implementation that serves `op(*args)`. Raises `BackendError` when a forced backend can't."""
    candidates = _implementations[op]
    if _forced is not None:
        reasons = why_not(op, _forced, *args)
        if reasons:
            raise BackendError(f"backend {_forced!r} can't serve {op}: " + "; ".join(reasons))
        return candidates[_forced]
    tensor = first_tensor(args)
    devices = (None,) if tensor is None else (None, tensor.device.type)
    for backend in PREFERENCE:
        implementation = candidates.get(backend)
        if implementation is None or (tensor is not None and implementation.device not in devices):
            continue
        if not implementation.reasons(*args):
            return implementation
    raise BackendError(f"no backend serves {op}: {_report(op, args)}")


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Makes every op use `backend` inside the `with` block, in the whole process.

    The override is read when an op runs, so it also holds inside compiled functions; a backward pass must run inside
    the block to be served by the same backend. Raises `ValueError` for an unknown name; the ops raise `BackendError`
    with the reasons when the backend can't serve a call.
    """
    global _forced
    if backend not in PREFERENCE:
        raise ValueError(_names.unknown("backend", backend, PREFERENCE))
    previous, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = previous


@contextmanager
def observed_by(observer: Callable[[str, str], None]) -> Iterator[None]:
    """Calls `observer(op, backend)` for every op that runs inside the `with` block, in the whole process."""
    global _observer
    previous, _observer = _observer, observer
    try:
        yield
    finally:
        _observer = previous


def observe(op: str, backend: str) -> None:
    """Tells the observer, if there is one, which backend serves a call."""
    if _observer is not None:
        _observer(op, backend)


def explain(op: str, *args: Any) -> str:
    """Which backend serves a call, and why the others don't, one line each.

    Args:
        op: the name of a public function, such as `"layer_norm"` or `"clip_loss"`, or of one op in
            `torch.ops.evakernels`, such as `"layer_norm_backward"`. A function that takes one of several ops, as the
            case may be, has lines of each.
        args: of the op, in the order of its schema. Leading arguments are enough: without any, only what holds for
            every call is told.

    Raises:
        ValueError: for an unknown name.
    """
    # A family's first op is its forward pass.
    family = next((name for name in _implementations if name.startswith(f"{op}_")), None)
    names = (op,) if op in _implementations else _functions.get(op) or ((family,) if family else ())
    if op == "sample_token_index":
        raise ValueError(f"{op} is made of torch's own operators: no backend of this library serves it")
    if not names:
        public = {name.removesuffix("_forward") for name in _implementations if not name.endswith("_backward")}
        raise ValueError(_names.unknown("op", op, sorted({*public, *_functions, *_implementations})))
    return "\n".join(_report(name, args) for name in names)


def ops() -> dict[str, list[str]]:
    """Every registered op with the backends that implement it."""
    return {op: [b for b in PREFERENCE if b in found] for op, found in sorted(_implementations.items())}


def family(op: str) -> str:
    """The family of an op: the name of the files that it is defined and implemented in."""
    return _implementations[op]["reference"].function.__module__.rpartition(".")[2]


def why_not(op: str, backend: str, *args: Any) -> list[str]:
    """The reasons why `backend` can't serve `op(*args)`; without arguments, those that hold for every call."""
    implementation = _implementations[op].get(backend)
    if implementation is None:
        return [f"{op} has no {backend} implementation"]
    return implementation.reasons(*args)


def _report(op: str, args: tuple[Any, ...]) -> str:
    lines, chosen = [], False
    for backend in PREFERENCE:
        reasons = why_not(op, backend, *args)
        usable = not reasons and not chosen
        chosen = chosen or usable
        verdict = "serves the call" if usable else "; ".join(reasons) or "usable, but not preferred here"
        lines.append(f"{op} on {backend}: {verdict}")
    return "\n".join(lines)


def tensors(args: Sequence[Any]) -> Iterator[torch.Tensor]:
    """All tensors among the arguments of an op, those in lists too."""
    for arg in args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from (item for item in arg if isinstance(item, torch.Tensor))


def first_tensor(args: tuple[Any, ...]) -> torch.Tensor | None:
    """The first tensor among the arguments of an op; it tells the device of the call."""
    return args[0] if args and isinstance(args[0], torch.Tensor) else next(tensors(args), None)
