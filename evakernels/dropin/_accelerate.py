"""`accelerate` and `restore`."""

import warnings
import weakref
from functools import cache
from typing import Any

from torch import nn

from ..nn import frozen
from . import _replacement, _swap
from ._blocks import attentions, blocks
from ._choice import Choice, Patterns
from ._replacement import Match, Replacement
from ._report import Left, Replaced, Report
from ._roles import ROLE_REPLACEMENTS
from ._serve import ROLES
from ._swap import original_class_of
from ._trial import Trials, Verdict


class ChangedModuleWarning(UserWarning):
    """`accelerate` left modules of a class that it supports, since they behave differently from their replacement."""


def accelerate(
    model: nn.Module,
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
    Modules that are built alike are compared once per process. Parameters, buffers, their names, hooks and the modules
    themselves stay, so state dicts interchange. Each call decides by device, dtype and size whether an op is faster, so
    a model may move later. A second call changes nothing more. After an error the model is as it was.

    Args:
        model: any module; a loss is one too.
        include: one or more patterns of modules to replace. `fnmatch` compares a pattern with a module's class, such as
            `"EvaBlock"`, and with its name, such as `"visual"`, which includes all modules below it. Default: all.
        exclude: one or more patterns of modules that keep, or get back, their own code. A fused step of another module
            may still read the parameters of an excluded child.
        force: also replace modules whose own code is as fast, at every size, until `restore`.
        strict: raise instead of warning about modules that behave differently.
        freeze: prepack the weights of all linear layers for this CPU, by `evakernels.nn.freeze`; inference only.

    Returns:
        The replaced modules with op and backend, and the modules that were left, with the reason. `str` of it is a line
        such as "12 of 12 blocks, 109 of 110 modules" and a table. Its `watch` reports which ops then ran.

    Raises:
        TypeError: `model` isn't an `nn.Module`, or a pattern isn't a str.
        ValueError: a pattern matches no module, or an `include` pattern no supported one; the error names the nearest.
            Or `freeze` with a model in training mode or on a GPU.
        RuntimeError: with `strict`, if a module of a supported class behaves differently from its replacement.

    Warns:
        ChangedModuleWarning: modules of a supported class behave differently from their replacement.
    """
    _check("accelerate", model)
    if freeze:
        frozen.check(model)
    _replacement.prepare()
    named = [(name, module, original_class_of(module)) for name, module in model.named_modules()]
    plan = _Plan(force)
    modules = [(name, cls.__name__) for name, _, cls in named]
    supported = [(name, cls.__name__) for name, module, cls in named if plan.candidates(module, cls)]
    plan.choice = Choice(modules, supported, include, exclude)
    report = Report(model=weakref.ref(model), blocks=blocks(model))
    report.attentions = attentions(model, report.blocks)
    plan.verify_roles(named)
    steps = [(name, module, plan.step(name, module, cls)) for name, module, cls in reversed(named)]
    for name, module, found in reversed(steps):
        if isinstance(found, Replaced):
            report.replaced.append(found)
        elif found is not None:
            report.left.append(found)
        elif name in report.attentions:
            report.left.append(Left(name, type(module).__name__, "not supported"))
    if report.changed:  # a filter may make an error of the warning, so before anything is changed
        message = f"{report.headline} ({report.changed[0].reason})"
        if strict:
            raise RuntimeError(f"accelerate: {message}")
        warnings.warn(message, ChangedModuleWarning, stacklevel=2)
    _set_classes([(module, cls) for module, cls in plan.classes.items() if cls is not _swap.own_class(module)])
    if freeze:
        frozen.freeze(model)
    return report


def restore(model: nn.Module) -> int:
    """Restores the original classes of all modules, in place; frozen weights are dense again.

    Returns:
        The number of restored modules.

    Raises:
        TypeError: `model` isn't an `nn.Module`.
    """
    _check("restore", model)
    swapped = [module for module in model.modules() if _is_swapped(module)]
    _set_classes([(module, original_class_of(module)) for module in swapped])
    frozen.unfreeze(model)
    return len(swapped)


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
    return _swap.original_class(_swap.own_class(module)) is not None


def _check(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model is a {type(model).__name__}; accepted: a torch.nn.Module")


class _Plan:
    """The class of each module after `accelerate`; planning changes no module."""

    choice: Choice

    def __init__(self, force: bool) -> None:
        self.force, self.trials = force, Trials()
        self.classes: dict[nn.Module, type] = {}
        self._candidates = cache(_replacement.candidates)
        self._changed_roles: dict[type, str] = {}

    def candidates(self, module: nn.Module, cls: type) -> list[tuple[Replacement, Match]]:
        """The replacements to compare a module with, best match first."""
        return [
            (replacement, match)
            for replacement, match in self._candidates(cls)
            if match is not Match.ALIKE or all(hasattr(module, name) for name in replacement.attributes)
        ]

    def verify_roles(self, modules: list[tuple[str, nn.Module, type]]) -> None:
        """Gives a role to each class of children all of which behave like it."""
        roles = {cls: role for cls in {cls for *_, cls in modules} if (role := _replacement.role_name(cls)) is not None}
        for _, module, cls in modules:
            if cls not in roles or "forward" in module.__dict__:
                continue
            replacement = ROLE_REPLACEMENTS[roles[cls]]
            if replacement.reason(module) is None:
                difference = self.trials.verdict(module, replacement).difference
                if difference is not None:
                    self._changed_roles[cls] = f"behaves differently: {difference}"
        for cls, role in roles.items():
            if cls in self._changed_roles:
                ROLES.pop(cls, None)
            else:
                ROLES[cls] = role

    def step(self, name: str, module: nn.Module, cls: type) -> Replaced | Left | None:
        """Plans the class of a module, after the classes of its children; returns the entry for the report."""
        found, self.classes[module] = self._step(name, module, cls)
        return found

    def _step(self, name: str, module: nn.Module, cls: type) -> tuple[Replaced | Left | None, type]:
        current, candidates = _swap.own_class(module), self.candidates(module, cls)
        if not candidates:
            if cls not in self._changed_roles:
                return None, current
            return Left(name, cls.__name__, self._changed_roles[cls], _replacement.library_of(cls)), current
        if self.choice.excludes(name, cls.__name__):
            return Left(name, cls.__name__, "excluded"), cls
        included = self.choice.includes(name, cls.__name__)
        if not included and not _is_swapped(module):
            return Left(name, cls.__name__, "not included"), current
        if "forward" in module.__dict__:
            return Left(name, cls.__name__, "its forward was replaced"), current
        forced = (self.force and included) or getattr(current, "is_forced", False)
        refusals = []
        for replacement, match in candidates:
            reason, verdict = self._compare(module, replacement)
            if reason is None:
                new = _swap.replacement_class(cls, replacement.forward, forced, verdict.tried or None)
                backend = replacement.backend(module, forced)
                if backend is None:
                    return Left(name, cls.__name__, _replacement.why_not_here(module, forced)), new
                return Replaced(name, cls.__name__, replacement.op_of(module), backend), new
            changed = match is Match.NAMED and verdict.difference is not None
            refusals.append(Left(name, cls.__name__, reason, _replacement.library_of(cls) if changed else ""))
        return (refusals[0] if candidates[0][1] is not Match.ALIKE else None), cls

    def _compare(self, module: nn.Module, replacement: Replacement) -> tuple[str | None, Verdict]:
        """Why a module keeps its own code, or None, and the verdict on its behaviour, if that was compared."""
        try:
            reason = replacement.reason(module)
            if reason is None and replacement.pooling is not None:
                reason = replacement.pooling.reason(module, self._class_of)
        except AttributeError as error:  # it is built differently
            reason = f"behaves differently: {error}"
            return reason, Verdict(str(error))
        if reason is not None or replacement.hook is not None:
            return reason, Verdict(None)
        children = {} if replacement.pooling is None else {m: c for m, c in self.classes.items() if m is not module}
        verdict = self.trials.verdict(module, replacement, children)
        return (None if verdict.difference is None else f"behaves differently: {verdict.difference}"), verdict

    def _class_of(self, module: Any) -> type:
        return self.classes.get(module) or type(module)
