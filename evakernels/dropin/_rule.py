"""The rules: which class each forward serves, and the reasons why a module isn't for it."""

import importlib
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from evakernels.dropin import _form, _pooled, _swap
from evakernels.dropin._gate import DEVICES, DTYPES, OPS, is_served
from evakernels.dropin._serve import ROLES

Call = tuple[tuple[Any, ...], dict[str, Any]]
LIBRARIES = ("torch_modules", "timm", "transformers", "open_clip")


def _fits(module: Any) -> str | None:
    return None


def _tokens_alone(module: Any, x: Tensor) -> list[Call]:
    return [((x,), {})]


@dataclass(frozen=True)
class Rule:
    """One forward and the class whose place it takes.

    Args:
        forward: class with the forward.
        target: the class, `package.module.Class`; its forward must have a known form.
        gate: name in `_gate` of what runs instead, or a function of the module that tells it; `"linear"` for oneDNN's
            products, `"torch"` for what torch's own operators do everywhere.
        op: what runs instead, as the report names it, where that isn't the op of the gate.
        helpers: functions that the class's forward calls and the new one stands for; their forms are known too.
        reason: tells why this module isn't for the rule, such as an option that the forward doesn't have.
        any_class: serve every class whose forward reads like that of `target`.
        hook: tells whether a class asks a public interface of its library, `target`, that serves it, whatever its
            source reads like.
        calls: arguments to try the module with, made of tokens `[2, N, C]` that fit it; all but the first may fail.
        ending: how a tower ends, which isn't tried.
    """

    forward: type[_swap.Swapped]
    target: str
    gate: str | Callable[[Any], str]
    op: str = ""
    helpers: tuple[str, ...] = ()
    reason: Callable[[Any], str | None] = field(default=_fits)
    any_class: bool = False
    hook: Callable[[type], bool] | None = None
    calls: Callable[[Any, Tensor], list[Call]] = field(default=_tokens_alone)
    ending: _pooled.Ending | None = None

    @property
    def forms(self) -> tuple[str, ...]:
        """The functions whose forms have to be known."""
        return () if self.hook is not None else (f"{self.target}.forward", *self.helpers)

    def unknown(self, cls: Any) -> str | None:
        """Which function reads in no known way, if any: the forward of the class or a helper."""
        for name in self.forms:
            if not _form.is_known(_find(name) if name in self.helpers else cls.forward, name):
                return name
        return None

    def backend(self, module: Any, forced: bool = False) -> str | None:
        """What would serve the op where the module is now; None if nothing there is worth it or, if `forced`, can."""
        parameter = next(module.parameters(), None)
        device = "cpu" if parameter is None else parameter.device.type
        dtype = torch.float32 if parameter is None else parameter.dtype
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
        """What runs instead of the module's own code, as the report names it."""
        return self.op or OPS[self._gate_of(module)].removesuffix("_forward")

    def _gate_of(self, module: Any) -> str:
        return self.gate if isinstance(self.gate, str) else self.gate(module)


def _linear_dtypes(forced: bool) -> frozenset[torch.dtype]:
    from evakernels.nn.linear import multiplied_dtypes, served_dtypes

    return multiplied_dtypes() if forced else served_dtypes()


@cache
def rules() -> tuple[Rule, ...]:
    """All rules; their files import nothing of the libraries."""
    return tuple(rule for name in LIBRARIES for rule in _file(name).RULES)


def form_names() -> list[str]:
    """Every function whose form is kept."""
    return sorted({*(f"{name}.forward" for name in _roles()), *(name for rule in rules() for name in rule.forms)})


def prepare() -> None:
    """Finds the classes of the libraries that have been imported since; imports none."""
    _file("transformers").prepare()
    for name, role in _roles().items():
        cls = _find(name)
        if cls is not None and cls not in ROLES and _form.is_known(_find(f"{name}.forward"), f"{name}.forward"):
            ROLES[cls] = role


def find(cls: Any) -> Rule | None:
    """The rule for exactly this class, also where the library has moved it, or for what its forward reads like."""
    named = [rule for rule in rules() if rule.target.rpartition(".")[2] == cls.__name__]
    exact = next((rule for rule in rules() if cls is _find(rule.target)), None)
    if exact is not None or not hasattr(cls, "forward"):
        return exact
    alike = next((r for r in rules() if r.any_class and _form.is_known(cls.forward, f"{r.target}.forward")), None)
    package = cls.__module__.partition(".")[0]
    moved = (r for r in named if r.target.partition(".")[0] == package and _find(r.target) is None)
    return alike or next(moved, None)


def hooked(cls: Any) -> Rule | None:
    """The rule of a public interface that the class asks."""
    return next((r for r in rules() if r.hook is not None and hasattr(cls, "forward") and r.hook(cls)), None)


def served(cls: type, forced: bool = False) -> type | None:
    """The class that takes the place of `cls`, or None where no rule knows it."""
    prepare()
    rule = find(cls)
    if rule is None or rule.unknown(cls) is not None:
        rule = hooked(cls)
    return None if rule is None else _swap.served_class(cls, rule.forward, forced)


def of_base(cls: type) -> Rule | None:
    """The rule for the known class that `cls` is a subclass of."""
    return next((r for base in cls.__mro__[1:] for r in rules() if base is _find(r.target)), None)


def name_of(cls: type) -> str:
    """The name under which a class has a role, or none."""
    return next((name for name in _roles() if _find(name) is cls), "")


def doubtful_role(cls: type) -> str | None:
    """The role that a class would have if its form were known."""
    return None if cls in ROLES else _roles().get(name_of(cls))


def gone(classes: Iterable[type]) -> list[str]:
    """The classes with a rule or a role that aren't in their imported module, nor of that name among `classes`."""
    moved = {(cls.__module__.partition(".")[0], cls.__name__) for cls in classes}
    names = {*(rule.target for rule in rules()), *_roles()}
    return [
        name
        for name in sorted(names)
        if name.rpartition(".")[0] in sys.modules
        and _find(name) is None
        and (name.partition(".")[0], name.rpartition(".")[2]) not in moved
    ]


def may_be(cls: type, name: str) -> bool:
    """Whether a class may have taken the place of one that is gone: it is of the same file, or an attention as well."""
    module, _, known = name.rpartition(".")
    attend = all("attention" in either.lower() for either in (known, cls.__name__))
    return cls.__module__ == module or (attend and cls.__module__.partition(".")[0] == module.partition(".")[0])


def stranger(name: str, changed: str) -> tuple[str, str]:
    """Why a class of this name isn't known for certain, and of which library's version it is."""
    library = name.partition(".")[0]
    version = _version(library)
    return f"unknown version {version} of {library}: {changed}", f"{library} {version}"


def _find(name: str) -> Any:
    """The object of this dotted name, if its module has been imported."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:count]))
        if found is not None:
            for part in parts[count:]:
                found = getattr(found, part, None)
            return found
    return None


def _version(library: str) -> str:
    try:
        return metadata.version({"open_clip": "open_clip_torch"}.get(library, library))
    except metadata.PackageNotFoundError:
        return "unknown"


@cache
def _roles() -> dict[str, str]:
    """The roles of the libraries' classes by their names; those of torch's need no form."""
    return {name: role for library in LIBRARIES[1:] for name, role in _file(library).ROLES.items()}


@cache
def _file(name: str) -> Any:
    return importlib.import_module(f"evakernels.dropin.{name}")


def why_not_here(module: Any, forced: bool = False) -> str:
    """Why nothing serves a module that a rule knows where it is now."""
    parameter = next(module.parameters(), None)
    if parameter is None:
        return "no kernels are for it" if forced else "its own is as fast"
    device, dtype = parameter.device.type, str(parameter.dtype).removeprefix("torch.")
    if forced:
        return f"no kernels are for {dtype} on {device}"
    return f"its own {dtype} on {device} is as fast" if device in DEVICES else f"no kernels are for {device}"
