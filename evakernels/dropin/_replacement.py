"""The replacements: which classes each forward may replace, and the modules that it doesn't support."""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from ._gate import DEVICES, DTYPES, OPS, is_served
from ._pooled import Pooling
from ._swap import Swapped

Call = tuple[tuple[Any, ...], dict[str, Any]]
LIBRARIES = ("torch_modules", "timm", "transformers", "open_clip")


def _supports_all(module: Any) -> str | None:
    return None


def _tokens_alone(module: Any, x: Tensor) -> list[Call]:
    return [((x,), {})]


@dataclass(frozen=True)
class Replacement:
    """A forward and the classes that it may replace; a comparison of both decides.

    Args:
        forward: class with the new forward.
        target: the class to replace, `package.module.Class`; empty for the role of a child module.
        gate: name in `_gate` of the op that runs instead, or a function of the module that returns it; `"linear"` for
            oneDNN's matmuls, `"torch"` for torch's own operators on every device.
        op: the op in the report, if it isn't the gate's.
        reason: returns why this module isn't supported, such as for an option that the forward lacks, or None.
        attributes: a module of any class that has all of these attributes is compared, too.
        hook: returns whether a class calls a public interface of its library, `target`, that serves it; such a class
            isn't compared.
        calls: arguments for the comparison, made of a module and of tokens `[2, N, C]` that fit it. The module must
            accept the first; others may have arguments that it lacks.
        settings: names and values of attributes to give to the copies that are compared.
        pooling: how a tower pools one token.
    """

    forward: type[Swapped]
    target: str
    gate: str | Callable[[Any], str]
    op: str = ""
    reason: Callable[[Any], str | None] = field(default=_supports_all)
    attributes: tuple[str, ...] = ()
    hook: Callable[[type], bool] | None = None
    calls: Callable[[Any, Tensor], list[Call]] = field(default=_tokens_alone)
    settings: tuple[tuple[str, Any], ...] = ()
    pooling: Pooling | None = None

    def backend(self, module: Any, forced: bool = False) -> str | None:
        """The backend of the op where the module is now; None if no backend is faster or, if `forced`, possible."""
        device, dtype = _place(module)
        if device == "meta":
            return "of its later device"
        name = self._gate_of(module)
        if name == "torch":
            return "torch" if dtype in DTYPES else None
        if name == "linear":
            return "oneDNN" if device == "cpu" and dtype in _linear_dtypes(forced) else None
        if not is_served(name, device, dtype, forced):
            return None
        return "cpu" if device == "cpu" else "cuda or triton"

    def op_of(self, module: Any) -> str:
        """The op that runs instead of the module's own code, as the report names it."""
        return self.op or OPS[self._gate_of(module)].removesuffix("_forward")

    def _gate_of(self, module: Any) -> str:
        return self.gate if isinstance(self.gate, str) else self.gate(module)


def _place(module: nn.Module) -> tuple[str, torch.dtype]:
    parameter = next(module.parameters(), None)
    return ("cpu", torch.float32) if parameter is None else (parameter.device.type, parameter.dtype)


def _linear_dtypes(forced: bool) -> frozenset[torch.dtype]:
    from ..nn.linear import multiplied_dtypes, served_dtypes

    return multiplied_dtypes() if forced else served_dtypes()


@cache
def replacements() -> tuple[Replacement, ...]:
    """All replacements; their files import none of the libraries."""
    return tuple(replacement for name in LIBRARIES for replacement in _file(name).REPLACEMENTS)


def prepare() -> None:
    """Registers what serves attention with transformers, if that has been imported."""
    _file("transformers").prepare()


class Match(IntEnum):
    """How a class matches a replacement, best first."""

    NAMED = 0
    """It is the class that the replacement names, or has its name in another file of the library."""
    SUBCLASS = 1
    ALIKE = 2
    """It has the replacement's attributes, or stands in the file of a class that the library no longer has."""


def candidates(cls: Any) -> list[tuple[Replacement, Match]]:
    """The replacements to compare modules of class `cls` with, best match first."""
    if not hasattr(cls, "forward"):
        return []
    matches = ((replacement, _match(replacement, cls)) for replacement in replacements())
    return sorted(((r, match) for r, match in matches if match is not None), key=lambda pair: pair[1])


def _match(replacement: Replacement, cls: Any) -> Match | None:
    if replacement.hook is not None:
        return Match.NAMED if replacement.hook(cls) else None
    file, _, name = replacement.target.rpartition(".")
    target = find(replacement.target)
    if target is None and file in sys.modules:
        if name == cls.__name__ and file.partition(".")[0] == cls.__module__.partition(".")[0]:
            return Match.NAMED
        return Match.ALIKE if cls.__module__ == file else None
    if target is cls:
        return Match.NAMED
    if isinstance(target, type) and issubclass(cls, target):
        return Match.SUBCLASS
    return Match.ALIKE if replacement.attributes else None


def role_name(cls: type) -> str | None:
    """The role that a library's class has if it behaves like it."""
    return next((role for name, role in _role_names().items() if find(name) is cls), None)


@cache
def _role_names() -> dict[str, str]:
    return {name: role for library in LIBRARIES for name, role in _file(library).ROLES.items()}


def find(name: str) -> Any:
    """The object of this dotted name, if its module has been imported."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:count]))
        if found is not None:
            for part in parts[count:]:
                found = getattr(found, part, None)
            return found
    return None


def library_of(cls: type) -> str:
    """Name and version of the package that a class is of."""
    package = cls.__module__.partition(".")[0]
    try:
        return f"{package} {metadata.version({'open_clip': 'open_clip_torch'}.get(package, package))}"
    except metadata.PackageNotFoundError:
        return package


@cache
def _file(name: str) -> Any:
    return importlib.import_module(f".{name}", __package__)


def why_not_here(module: Any, forced: bool = False) -> str:
    """Why no backend serves a module where it is now."""
    if next(module.parameters(), None) is None:
        return "no kernels are for it" if forced else "its own is as fast"
    device, dtype = _place(module)
    name = str(dtype).removeprefix("torch.")
    if forced:
        return f"no kernels are for {name} on {device}"
    return f"its own {name} on {device} is as fast" if device in DEVICES else f"no kernels are for {device}"
