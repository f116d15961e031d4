"""`accelerate` and `restore`."""

import re
import sys
import warnings
from collections.abc import Container, Iterable
from dataclasses import replace
from enum import IntEnum
from fnmatch import fnmatchcase
from functools import cache
from importlib import metadata
from typing import Any

from torch import nn

from ..names import nearest
from ..nn import frozen
from . import _swap, open_clip, timm, torch_modules, transformers
from ._comparison import Comparisons, Verdict
from ._fused import CHANGED, ROLES
from ._replacement import Replacement, explain_no_backend
from ._report import Left, Replaced, Report
from ._swap import find_original_class

Patterns = str | Iterable[str]

_LIBRARIES = (torch_modules, timm, transformers, open_clip)
_REPLACEMENTS = [replacement for library in _LIBRARIES for replacement in library.REPLACEMENTS]


class ChangedModuleWarning(UserWarning):
    """`accelerate` left modules of a class that it supports, since they behave differently from their replacement."""


def accelerate(
    model: Any,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    force: bool = False,
    strict: bool = False,
    freeze: bool = False,
) -> Report:
    """Replaces the forwards of supported modules by forwards that run on these ops, in place.

    Supported are modules of timm, open_clip, transformers and torch: attention, MLPs, norms, residual adds, patch
    dropout, linear layers, contrastive losses. A module is replaced if a copy of it behaves like its replacement on
    small random inputs: equal outputs, gradients, in-place changes and random numbers, in evaluation and in training.
    Parameters, buffers, names, hooks and the modules themselves stay, so state dicts interchange. Each call decides by
    device, dtype and size whether an op is faster, so a model may move later. After an error the model is unchanged.

    A transform of images resizes with `evakernels.image.resize`, with the same pixels and random draws: torchvision's
    `Compose`, as open_clip and timm make it, of PIL images, and transformers' image processors with `backend="pil"`.

    Args:
        model: any module, also a loss; or a transform, without other options.
        include: one or more `fnmatch` patterns of modules to replace, by class, such as `"EvaBlock"`, or by name, such
            as `"visual"`, which includes all modules below it. Default: all.
        exclude: one or more patterns of modules that keep, or get back, their own code. A fused step of another module
            may still read the parameters of an excluded child.
        force: also replace modules with own code that is as fast, at every size, until `restore`.
        strict: raise instead of warning about modules that behave differently.
        freeze: prepack the weights of all linear layers for this CPU, by `evakernels.nn.freeze`; inference only.

    Returns:
        The replaced modules with op and backend, and the other modules with the reason. `str` of it is a line such as
        "12 of 12 blocks, 109 of 110 modules" and a table.

    Raises:
        TypeError: `model` isn't an `nn.Module` or a transform, or a pattern isn't a str.
        ValueError: a pattern matches no module, or an `include` pattern no supported one; the error names the nearest.
            Or `freeze` with a model in training mode or on a GPU.
        RuntimeError: with `strict`, if a module of a supported class behaves differently from its replacement.

    Warns:
        ChangedModuleWarning: modules of a supported class behave differently from their replacement.
    """
    if _is_transform(model):
        if include is not None or exclude is not None or force or strict or freeze:
            raise ValueError("accelerate: options must be left out for a transform of images")
        report: Report = _images().accelerate(model)
        return report
    if freeze:
        frozen.check(model)
    transformers.prepare()
    named = [(name, module, find_original_class(module)) for name, module in model.named_modules()]
    plan = _Plan(force)
    modules = [(name, cls.__name__) for name, _, cls in named]
    if include is not None:
        supported = [(name, cls.__name__) for name, module, cls in named if plan.candidates(module, cls)]
        plan.include = _check_patterns("include", include, supported)
    if exclude is not None:
        plan.exclude = _check_patterns("exclude", exclude, modules)
    report = Report.from_model(model)
    plan.holders = {name: cls for name, _, cls in named}
    plan.verify_roles(named)
    plan.refused = timm.find_other_layouts(model)
    previous = _mark(model, plan.changed_roles)
    try:
        entries = [(name, module, plan.add(name, module, cls)) for name, module, cls in reversed(named)]
        for name, module, entry in reversed(entries):
            if isinstance(entry, Replaced):
                report.replaced.append(entry)
            elif entry is not None or name in report.attentions:
                report.left.append(entry or Left(name, type(module).__name__, "not supported"))
        if report.changed:  # a filter may make an error of the warning, so before the classes are changed
            message = f"{report.headline} ({report.changed[0].reason})"
            if strict:
                raise RuntimeError(f"accelerate: {message}")
            warnings.warn(message, ChangedModuleWarning, stacklevel=2)
        _set_classes([(module, cls) for module, cls in plan.classes.items() if cls is not _swap.module_class(module)])
    except BaseException:
        _mark(model, previous)
        raise
    if freeze:
        frozen.freeze(model)
    return report


def restore(model: Any) -> int:
    """Restores the original classes and dense weights of all modules, in place; returns the number of restored modules.

    Raises `TypeError` if `model` isn't an `nn.Module` or a transform.
    """
    if _is_transform(model):
        return int(_images().restore(model))
    swapped = [module for module in model.modules() if _is_swapped(module)]
    _set_classes([(module, find_original_class(module)) for module in swapped])
    _mark(model, ())
    transformers.release()
    frozen.unfreeze(model)
    return len(swapped)


def _mark(model: nn.Module, changed: Container[nn.Module]) -> list[nn.Module]:
    """Marks modules as changed, and no others; returns the modules that were marked before."""
    previous = [module for module in model.modules() if vars(module).pop(CHANGED, False)]
    for module in model.modules():
        if module in changed:
            vars(module)[CHANGED] = True
    return previous


def _set_classes(classes: list[tuple[nn.Module, type]]) -> None:
    """All of them or, after an error, none."""
    before = [(module, type(module)) for module, _ in classes]
    try:
        for module, cls in classes:
            _swap.set_class(module, cls)
    except BaseException:
        for module, cls in before:
            module.__class__ = cls
        raise


def _is_swapped(module: nn.Module) -> bool:
    return _swap.original_class(_swap.module_class(module)) is not None


def _is_transform(model: object) -> bool:
    return not isinstance(model, nn.Module) or type(model).__module__.startswith("torchvision.transforms")


def _images() -> Any:
    """The module for transforms, which needs Pillow."""
    from . import images

    return images


# --- patterns ---------------------------------------------------------------------------------------------------------


def _matches(patterns: list[str], name: str, cls: str) -> bool:
    """Whether a pattern of `fnmatch` matches a module's class, its name or the name of a module that holds it."""
    paths = [name, *_holders(name), cls]
    return any(fnmatchcase(path, pattern) for path in paths for pattern in patterns)


def _holders(name: str) -> list[str]:
    """The names of the modules inside the model that hold the module `name`, the outermost first."""
    return [name[: dot.start()] for dot in re.finditer(r"\.", name)]


def _check_patterns(argument: str, patterns: Patterns, modules: list[tuple[str, str]]) -> list[str]:
    """The patterns as a list; each must match one of the modules, pairs of dotted name and class name."""
    pattern_list = list(patterns) if isinstance(patterns, Iterable) and not isinstance(patterns, str) else [patterns]
    for pattern in pattern_list:
        if not isinstance(pattern, str):
            raise TypeError(
                f"accelerate: {argument} must be patterns of names and classes, each a str, got {pattern!r}"
            )
        if not any(_matches([pattern], *module) for module in modules):
            choices = {re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name, _ in modules} | {cls for _, cls in modules}
            near = nearest(pattern, sorted(choices - {""})) or sorted({cls for _, cls in modules})
            accepted = "the name or class of a module" + (" that is supported" if argument == "include" else "")
            raise ValueError(
                f"accelerate: {argument} must match {accepted}, such as {', '.join(near)}, got {pattern!r}; `*` stands "
                "for any characters"
            )
    return pattern_list


# --- candidates -------------------------------------------------------------------------------------------------------


class _Match(IntEnum):
    """How a class matches a replacement, best first."""

    NAMED = 0
    """It is the class that the replacement names, or has its name in another file of the library."""
    SUBCLASS = 1
    SIMILAR = 2
    """It has the replacement's attributes, or stands in the file of a class that the library no longer has."""
    HOOKED = 3
    """It calls the interface of its library that the replacement hooks."""


def _find_matches(cls: Any) -> list[tuple[Replacement, _Match]]:
    """The replacements that a class matches, best match first."""
    if not hasattr(cls, "forward"):
        return []
    matches = [(r, match) for r in _REPLACEMENTS if r.gate and (match := _match(r, cls)) is not None]
    return sorted(matches, key=lambda pair: pair[1])


def _match(replacement: Replacement, cls: Any) -> _Match | None:
    if replacement.hook is not None:
        return _Match.HOOKED if replacement.hook(cls) else None
    target, (file, _, name) = _find(replacement.target), replacement.target.rpartition(".")
    if target is None and file in sys.modules:
        if name == cls.__name__ and file.partition(".")[0] == cls.__module__.partition(".")[0]:
            return _Match.NAMED
        return _Match.SIMILAR if cls.__module__ == file else None
    if target is cls:
        return _Match.NAMED
    if isinstance(target, type) and issubclass(cls, target):
        return _Match.SUBCLASS
    return _Match.SIMILAR if replacement.attributes else None


def _find(name: str) -> Any:
    """The class of this dotted name, if its module has been imported."""
    file, _, cls = name.rpartition(".")
    return getattr(sys.modules.get(file), cls, None)


def _library_name(cls: type) -> str:
    """Name and version of the package that a class is of."""
    package = cls.__module__.partition(".")[0]
    try:
        return f"{package} {metadata.version({'open_clip': 'open_clip_torch'}.get(package, package))}"
    except metadata.PackageNotFoundError:
        return package


# --- the plan ---------------------------------------------------------------------------------------------------------


class _Plan:
    """The class of each module after `accelerate`; planning changes no module."""

    def __init__(self, force: bool) -> None:
        self.force, self.comparisons = force, Comparisons()
        self.include: list[str] | None = None
        self.exclude: list[str] = []
        self.classes: dict[nn.Module, type] = {}
        self.holders: dict[str, type] = {}
        self.refused: dict[nn.Module, str] = {}
        self.changed_roles: dict[nn.Module, str] = {}
        self._matches = cache(_find_matches)

    def candidates(self, module: nn.Module, cls: type) -> list[tuple[Replacement, _Match]]:
        """The replacements to compare a module with, best match first."""
        return [
            (replacement, match)
            for replacement, match in self._matches(cls)
            if match is not _Match.SIMILAR or all(hasattr(module, name) for name in replacement.attributes)
        ]

    def verify_roles(self, modules: list[tuple[str, nn.Module, type]]) -> None:
        """Finds the modules that behave differently from the role of their class."""
        replacements = {_find(r.target): r for r in _REPLACEMENTS if r.role}
        roles = {cls: replacements[cls] for *_, cls in modules if cls in replacements}
        for _, module, cls in modules:
            if cls not in roles or "forward" in module.__dict__ or roles[cls].reason(module) is not None:
                continue
            difference = self.comparisons.verdict(module, replace(roles[cls], target="")).difference
            if difference is not None:
                self.changed_roles[module] = f"behaves differently: {difference}"
        ROLES.update({cls: replacement.role for cls, replacement in roles.items()})

    def add(self, name: str, module: nn.Module, cls: type) -> Replaced | Left | None:
        """Plans the class of a module, after the classes of its children; returns the entry for the report."""
        entry, self.classes[module] = self._choose(name, module, cls)
        return entry

    def _choose(self, name: str, module: nn.Module, cls: type) -> tuple[Replaced | Left | None, type]:
        current, candidates = _swap.module_class(module), self.candidates(module, cls)
        if not candidates:
            if module not in self.changed_roles:
                return None, current
            return Left(name, cls.__name__, self.changed_roles[module], _library_name(cls)), current
        if _matches(self.exclude, name, cls.__name__):
            return Left(name, cls.__name__, "excluded"), cls
        included = self.include is None or _matches(self.include, name, cls.__name__)
        if not included and not _is_swapped(module):
            return Left(name, cls.__name__, "not included"), current
        if "forward" in module.__dict__:
            return Left(name, cls.__name__, "its forward was replaced"), current
        forced = (self.force and included) or getattr(current, "is_forced", False)
        refusals = []
        for replacement, match in candidates:
            reason, verdict = self._compare(name, module, replacement)
            if reason is None:
                new = _swap.replacement_class(cls, replacement.forward, forced, verdict.tried or None)
                backend = replacement.backend(module, forced)
                if backend is None:
                    return Left(name, cls.__name__, explain_no_backend(module, forced)), new
                return Replaced(name, cls.__name__, replacement.op_name(module), backend), new
            changed = match is _Match.NAMED and verdict.difference is not None
            refusals.append(Left(name, cls.__name__, reason, _library_name(cls) if changed else ""))
        named = [left for left, (_, match) in zip(refusals, candidates, strict=True) if match is not _Match.SIMILAR]
        return (named[0] if named else None), cls

    def _compare(self, name: str, module: nn.Module, replacement: Replacement) -> tuple[str | None, Verdict]:
        """Why a module keeps its own code, or None, and the verdict on its behaviour, if that was compared."""
        holders = [self.holders[holder] for holder in ("", *_holders(name)) if holder != name]
        if reader := next((cls for cls in holders if not replacement.holder(cls)), None):
            return f"{reader.__name__} may read padding", Verdict(None)
        try:
            reason = self.refused.get(module) or replacement.reason(module)
            if reason is None and replacement.tower is not None:
                reason = replacement.tower.reason(module, lambda part: self.classes.get(part) or type(part))
        except AttributeError as error:  # it is built differently
            return f"behaves differently: {error}", Verdict(str(error))
        if reason is not None or replacement.hook is not None:
            return reason, Verdict(None)
        children = {} if replacement.tower is None else {m: c for m, c in self.classes.items() if m is not module}
        verdict = self.comparisons.verdict(module, replacement, children)
        return (None if verdict.difference is None else f"behaves differently: {verdict.difference}"), verdict
