"""`accelerate` and `restore`: the walk over a model."""

import weakref
from functools import cache

from torch import nn

from evakernels.dropin import _rule, _swap
from evakernels.dropin._choice import Choice, Patterns
from evakernels.dropin._report import Left, Replaced, Report


def accelerate(
    model: nn.Module, *, include: Patterns | None = None, exclude: Patterns | None = None, force: bool = False
) -> Report:
    """Makes the modules of a model that these ops serve run on them, in place.

    Served are modules of timm, open_clip, transformers and torch whose class and source are exactly known:
    attention, MLPs, norms, residual adds, patch dropout, linear layers, contrastive losses. Parameters, buffers, their
    names, hooks and the modules themselves stay, so state dicts go both ways. What would be slower on these ops is
    decided at each call, so a model may move to another device or dtype later. A second call changes nothing more.

    Args:
        model: any module; a loss is one too.
        include: a pattern, or several, of what to serve: `fnmatch`'s, of a module's name in the model or its class, as
            `"visual.*"` or `"EvaBlock"`. Other modules stay as they are; all are served by default.
        exclude: the same of modules that keep their own code, or get it back. A module that isn't excluded may still
            read the parameters of an excluded child in one step with its own work.
        force: serve also what is left only because its own code is as fast, at every size, until `restore`.

    Returns:
        What runs on which op and backend, and what was left and why; in its `watch` what then ran. `str` of it is a
        table.

    Raises:
        TypeError: for what isn't an `nn.Module`.
        ValueError: for a pattern that matches no module; it names the nearest.
    """
    _check("accelerate", model)
    _rule.prepare()
    named = [(name, module, _class_of(module)) for name, module in model.named_modules()]
    choice = Choice([(name, cls.__name__) for name, _, cls in named], include, exclude)
    report, rule_of = Report(model=weakref.ref(model)), cache(_rule_of)
    for name, module, cls in named:
        found = _accelerate(name, module, rule_of(cls), choice, force)
        if isinstance(found, Replaced):
            report.replaced.append(found)
        elif found is not None:
            report.left.append(found)
    return report


def restore(model: nn.Module) -> int:
    """Takes back what `accelerate` did, in place.

    Returns:
        The number of modules that have their own class again.

    Raises:
        TypeError: for what isn't an `nn.Module`.
    """
    _check("restore", model)
    count = 0
    for module in model.modules():
        if _is_swapped(module):
            _swap.set_class(module, _class_of(module))
            count += 1
    return count


def _is_swapped(module: nn.Module) -> bool:
    return _swap.original_class(_swap.own_class(module)) is not None


def _class_of(module: nn.Module) -> type:
    """The class that the module has without this package."""
    own = _swap.own_class(module)
    return _swap.original_class(own) or own


def _check(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model is a {type(model).__name__}; accepted: a torch.nn.Module")


_ClassRule = tuple[_rule.Rule | None, str | None]


def _rule_of(cls: type) -> _ClassRule:
    """The rule that knows a class, if any, and why the class is left all the same."""
    rule = _rule.find(cls)
    if rule is None:
        known = _rule.changed_from(cls)
        return None, None if known is None else f"a subclass of {known} changed it"
    return rule, None if _rule.has_known_form(cls, rule) else rule.unknown()


def _accelerate(
    name: str, module: nn.Module, class_rule: _ClassRule, choice: Choice, force: bool
) -> Replaced | Left | None:
    cls, (rule, reason) = _class_of(module), class_rule
    if rule is None:
        return None if reason is None else Left(name, cls.__name__, reason)
    if choice.excludes(name, cls.__name__):
        if _is_swapped(module):
            _swap.set_class(module, cls)
        return Left(name, cls.__name__, "excluded")
    included = choice.includes(name, cls.__name__)
    if not included and not _is_swapped(module):
        return Left(name, cls.__name__, "not included")
    own = _swap.own_class(module)
    forced = (force and included) or getattr(own, "is_forced", False)
    reason = _unserved(module, rule, reason, forced)
    if reason is not None:
        return Left(name, cls.__name__, reason)
    served = _swap.served_class(cls, rule.forward, forced)
    if own is not served:
        _swap.set_class(module, served)
    backend = rule.backend(module, forced)
    if backend is None:
        return Left(name, cls.__name__, _rule.why_not_here(module, forced))
    return Replaced(name, cls.__name__, rule.op, backend)


def _unserved(module: nn.Module, rule: _rule.Rule, reason: str | None, forced: bool) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced"
    return reason or rule.reason(module) or (None if forced else rule.slow(module))
