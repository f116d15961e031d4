"""`accelerate` and `restore`: the walk over a model."""

from collections.abc import Callable
from functools import cache

from torch import nn

from evakernels.dropin import _rule, _swap
from evakernels.dropin._report import Left, Replaced, Report


def accelerate(model: nn.Module) -> Report:
    """Makes the modules of a model that these ops serve run on them, in place.

    Served are modules of timm, open_clip, transformers and torch whose class and source are exactly known:
    attention, MLPs, norms, residual adds, patch dropout, linear layers, contrastive losses. Parameters, buffers, their
    names, hooks and the modules themselves stay, so state dicts go both ways. What would be slower on these ops is
    decided at each call, so a model may move to another device or dtype later. A second call changes nothing more.

    Args:
        model: any module; a loss is one too.

    Returns:
        What runs on which op and backend, and what was left and why. `str` of it is a table.

    Raises:
        TypeError: for what isn't an `nn.Module`.
    """
    _check("accelerate", model)
    _rule.prepare()
    report, rule_of = Report(), cache(_rule_of)
    for name, module in model.named_modules():
        found = _accelerate(name, module, rule_of)
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
        original = _swap.original_class(_swap.own_class(module))
        if original is not None:
            _swap.set_class(module, original)
            count += 1
    return count


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


def _accelerate(name: str, module: nn.Module, rule_of: Callable[[type], _ClassRule]) -> Replaced | Left | None:
    own = _swap.own_class(module)
    cls = _swap.original_class(own) or own
    rule, reason = rule_of(cls)
    if rule is None:
        return None if reason is None else Left(name, cls.__name__, reason)
    reason = "its forward was replaced" if "forward" in module.__dict__ else reason or rule.reason(module)
    if reason is not None:
        return Left(name, cls.__name__, reason)
    if own is cls:
        _swap.set_class(module, _swap.served_class(cls, rule.forward))
    backend = rule.backend(module)
    if backend is None:
        return Left(name, cls.__name__, _rule.why_not_here(module))
    return Replaced(name, cls.__name__, rule.op, backend)
