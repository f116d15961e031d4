"""A replacement: the class that a forward may replace, and the modules that it doesn't support."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.linear import faster_dtypes, matmul_dtypes
from ._dispatch import DEVICES, DTYPES, OPS, has_op
from ._packing import Layers
from ._pooling import Pooling
from ._swap import AcceleratedModule

Call = tuple[tuple[Any, ...], dict[str, Any]]


def draw(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal float32 values `shape`, from a generator of their own."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def _pass_tokens(module: Any, x: Tensor) -> list[Call]:
    return [((x,), {})]


@dataclass(frozen=True)
class Replacement:
    """A forward and the classes that it may replace; a comparison of both decides.

    Args:
        forward: class with the new forward.
        target: the class to replace, `package.module.Class`; empty while a role is compared.
        gate: entry in `_dispatch` of the op that runs instead, or a function of the module that returns it; `"linear"`
            for oneDNN's matmuls, `"torch"` for torch's own operators on every device. Empty for a class that only
            has a role.
        op: the op in the report, if it isn't the gate's.
        reason: returns why this module isn't supported, such as for an option that the forward lacks, or None.
        attributes: a module of any class that has all of these attributes is compared, too.
        hook: returns whether a class calls a public interface of its library, `target`, that dispatches to the op; such
            a class isn't compared.
        calls: arguments for the comparison, made of a module and of tokens `[2, N, C]` that fit it. The module must
            accept the first; others may have arguments that it lacks.
        stem: name of the child that makes tokens of images; the comparison starts with its outputs.
        sizes: returns numbers of tokens and smaller ones for the comparison.
        constants: names of buffers, and of children with buffers, that keep their values in a comparison, such as
            rotary tables; other float buffers get random values.
        settings: names and values of attributes to give to the copies that are compared.
        tower: how a tower pools one token, or which of its layers run packed.
        holder: returns whether a class that holds the module, at any depth, reads no padded token of it.
        compared: the part of a result to compare, made of the result.
        role: role of the class in fused steps of other modules, if it behaves like `forward`.
    """

    forward: type[AcceleratedModule]
    target: str
    gate: str | Callable[[Any], str] = ""
    op: str = ""
    reason: Callable[[Any], str | None] = field(default=lambda module: None)
    attributes: tuple[str, ...] = ()
    hook: Callable[[type], bool] | None = None
    calls: Callable[[Any, Tensor], list[Call]] = field(default=_pass_tokens)
    stem: str = ""
    sizes: Callable[[Any], dict[int, int]] = field(default=lambda module: {})
    constants: tuple[str, ...] = ()
    settings: tuple[tuple[str, Any], ...] = ()
    tower: Pooling | Layers | None = None
    holder: Callable[[type], bool] = field(default=lambda cls: True)
    compared: Callable[[Any], Any] = field(default=lambda result: result)
    role: str = ""

    def backend(self, module: Any, forced: bool = False) -> str | None:
        """The backend of the op where the module is now; None if no backend is faster or, if `forced`, possible."""
        device, dtype = _place(module)
        if device == "meta":
            return "of its later device"
        name = self._gate_name(module)
        if name == "torch":
            return "torch" if dtype in DTYPES else None
        if name == "linear":
            dtypes = matmul_dtypes() if forced else faster_dtypes()
            return "oneDNN" if device == "cpu" and dtype in dtypes else None
        if not has_op(name, device, dtype, forced):
            return None
        return "cpu" if device == "cpu" else "cuda or triton"

    def op_name(self, module: Any) -> str:
        """The op that runs instead of the module's own code, as the report names it."""
        return self.op or OPS[self._gate_name(module)].removesuffix("_forward")

    def _gate_name(self, module: Any) -> str:
        return self.gate if isinstance(self.gate, str) else self.gate(module)


def explain_no_backend(module: Any, forced: bool = False) -> str:
    """Why no backend runs a module where it is now."""
    if next(module.parameters(), None) is None:
        return "no kernels are for it" if forced else "its own is as fast"
    device, dtype = _place(module)
    name = str(dtype).removeprefix("torch.")
    if forced:
        return f"no kernels are for {name} on {device}"
    return f"its own {name} on {device} is as fast" if device in DEVICES else f"no kernels are for {device}"


def _place(module: nn.Module) -> tuple[str, torch.dtype]:
    parameter = next(module.parameters(), None)
    return ("cpu", torch.float32) if parameter is None else (parameter.device.type, parameter.dtype)
