"""`accelerate` and `restore`: the walk over a model."""

import warnings
import weakref
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

from torch import nn

from evakernels.dropin import _rule, _swap
from evakernels.dropin._blocks import attentions, blocks
from evakernels.dropin._choice import Choice, Patterns
from evakernels.dropin._report import Left, Replaced, Report
from evakernels.dropin._roles import ROLE_RULES
from evakernels.dropin._serve import ROLES
from evakernels.dropin._verify import Trials
from evakernels.nn import frozen

Unknown = Literal["skip", "verify"]


class UnknownFormWarning(UserWarning):
    """`accelerate` left modules of a library whose code reads in no known way, as that of a new release may."""


def accelerate(
    model: nn.Module,
    *,
    include: Patterns | None = None,
    exclude: Patterns | None = None,
    force: bool = False,
    unknown: Unknown = "skip",
    strict: bool = False,
    freeze: bool = False,
) -> Report:
    """Makes the modules of a model that these ops serve run on them, in place.

    Served are modules of timm, open_clip, transformers and torch whose class and source are exactly known:
    attention, MLPs, norms, residual adds, patch dropout, linear layers, contrastive losses. Parameters, buffers, their
    names, hooks and the modules themselves stay, so state dicts go both ways. What would be slower on these ops is
    decided at each call, so a model may move to another device or dtype later. A second call changes nothing more.
    After an error the model is as it was.

    Args:
        model: any module; a loss is one too.
        include: a pattern, or several, of what to serve: `fnmatch`'s, of a module's class, as `"EvaBlock"`, or of its
            name in the model, which stands for all that is below it, as `"visual"`. Other modules stay as they are;
            all are served by default.
        exclude: the same of modules that keep their own code, or get it back. A module that isn't excluded may still
            read the parameters of an excluded child in one step with its own work.
        force: serve also what is left only because its own code is as fast, at every size, until `restore`.
        unknown: what to do with a module whose class a rule knows, but whose source reads differently. `"skip"` leaves
            it; `"verify"` runs a copy of it with its own code and with the op's, on small random inputs, and serves it
            if outputs, gradients, what is changed in place and random numbers agree: in evaluation and training, with
            and without a graph, in float32 (to 1e-5 of the largest value), float64, 16 bit and under autocast. That
            holds for these inputs; options of a call that weren't tried may still differ. It also tries subclasses.
        strict: raise where modules of an unknown form are left, instead of warning.
        freeze: lay out the weights of linear layers for this CPU, by `evakernels.nn.freeze`: for inference alone. Of
            the whole model, whatever is included.

    Returns:
        What runs on which op and backend, and what was left and why; in its `watch` what then ran. `str` of it is a
        line such as "12 of 12 blocks, 109 of 110 modules" and a table.

    Raises:
        TypeError: for what isn't an `nn.Module`, and a pattern that isn't a str.
        ValueError: for a pattern that matches no module or, in `include`, none that there is a rule for, which names
            the nearest; another `unknown`; or what `freeze` can't take: a model in training mode or on a GPU.
        RuntimeError: under `strict`, where modules of an unknown form are left.

    Warns:
        UnknownFormWarning: where modules of an unknown form are left.
    """
    _check("accelerate", model)
    if unknown not in ("skip", "verify"):
        raise ValueError(f'accelerate: unknown={unknown!r}; accepted: "skip", "verify"')
    if freeze:
        frozen.check(model)
    _rule.prepare()
    named = [(name, module, _class_of(module)) for name, module in model.named_modules()]
    plan = _Plan(force, Trials() if unknown == "verify" else None, [cls for *_, cls in named])
    modules = [(name, cls.__name__) for name, _, cls in named]
    known = [(name, cls.__name__) for name, _, cls in named if plan.known(cls).rule is not None]
    plan.choice = Choice(modules, known, include, exclude)
    report = Report(model=weakref.ref(model), blocks=blocks(model), tried=unknown == "verify")
    report.attentions = attentions(model, report.blocks)
    plan.learn_roles(named)
    steps = [(name, module, plan.step(name, module)) for name, module, _ in reversed(named)]
    for name, module, found in reversed(steps):
        if isinstance(found, Replaced):
            report.replaced.append(found)
        elif found is not None:
            report.left.append(found)
        elif name in report.attentions:
            report.left.append(Left(name, type(module).__name__, "no rule is for it"))
    if strict and report.unknown:
        raise RuntimeError(f"accelerate: {report.headline}; {report.unknown[0].reason}")
    if report.unknown:  # a filter may make an error of it, so before anything is changed
        warnings.warn(f"{report.headline} ({report.unknown[0].reason})", UnknownFormWarning, stacklevel=2)
    _set_classes([(module, cls) for module, cls in plan.classes.items() if cls is not _swap.own_class(module)])
    if freeze:
        frozen.freeze(model)
    return report


def restore(model: nn.Module) -> int:
    """Takes back what `accelerate` did, in place; frozen weights are dense again.

    Returns:
        The number of modules that have their own class again.

    Raises:
        TypeError: for what isn't an `nn.Module`.
    """
    _check("restore", model)
    swapped = [module for module in model.modules() if _is_swapped(module)]
    _set_classes([(module, _class_of(module)) for module in swapped])
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


def _class_of(module: nn.Module) -> type:
    """The class that the module has without this package."""
    own = _swap.own_class(module)
    return _swap.original_class(own) or own


def _check(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model is a {type(model).__name__}; accepted: a torch.nn.Module")


@dataclass(frozen=True)
class _Known:
    """What the rules know of a class: its rule, why that isn't for certain, and of which library's version."""

    rule: _rule.Rule | None
    doubt: str | None = None
    library: str = ""
    hooked: _rule.Rule | None = None


def _known(cls: type, gone: list[str]) -> _Known:
    rule, hooked = _rule.find(cls), _rule.hooked(cls)
    if rule is not None:
        changed = rule.unknown(cls)
        if changed is None:
            return _Known(rule)
        changed = f"{changed} reads differently"
        if rule.ending is not None:
            return _Known(rule, changed)
        return _Known(rule, *_rule.stranger(rule.target, changed), hooked)
    if hooked is not None:
        return _Known(hooked)
    base = _rule.of_base(cls)
    if _rule.doubtful_role(cls) is not None:
        name = _rule.name_of(cls)
        return _Known(base, *_rule.stranger(name, f"{name}.forward reads differently"))
    lacking = next((name for name in gone if cls not in ROLES and _rule.may_be(cls, name)), None)
    if lacking is not None:
        return _Known(base, *_rule.stranger(lacking, f"there is no {lacking}, and no rule for {cls.__name__}"))
    return _Known(base, None if base is None else f"a subclass of {base.target.rpartition('.')[2]} changed it")


class _Plan:
    """What becomes of each module, without changing any; `classes` has the class that each is to have."""

    choice: Choice

    def __init__(self, force: bool, trials: Trials | None, classes: list[type]) -> None:
        self.force, self.trials = force, trials
        self.known = cache(partial(_known, gone=_rule.gone(classes)))
        self.classes: dict[nn.Module, type] = {}

    def step(self, name: str, module: nn.Module) -> Replaced | Left | None:
        """What to report of a module, whose children had their steps before."""
        found, self.classes[module] = self._step(name, module)
        return found

    def _step(self, name: str, module: nn.Module) -> tuple[Replaced | Left | None, type]:
        cls, current = _class_of(module), _swap.own_class(module)
        known = self.known(cls)
        if known.rule is None:
            reason = None if cls in ROLES else known.doubt
            return (None if reason is None else Left(name, cls.__name__, reason, known.library)), current
        if self.choice.excludes(name, cls.__name__):
            return Left(name, cls.__name__, "excluded"), cls
        included = self.choice.includes(name, cls.__name__)
        if not included and not _is_swapped(module):
            return Left(name, cls.__name__, "not included"), current
        if "forward" in module.__dict__:
            return Left(name, cls.__name__, "its forward was replaced"), current
        forced = (self.force and included) or getattr(current, "is_forced", False)
        rule, verified, reason = self._settle(module, cls, known)
        reason = reason or rule.reason(module)
        if rule.ending is not None:
            reason = reason or rule.ending.reason(module, self._class_of)
        if reason is not None:
            library = known.library if reason.startswith("unknown version") else ""
            return Left(name, cls.__name__, reason, library), current
        served = _swap.served_class(cls, rule.forward, forced)
        backend = rule.backend(module, forced)
        if backend is None:
            return Left(name, cls.__name__, _rule.why_not_here(module, forced)), served
        return Replaced(name, cls.__name__, rule.op_of(module), backend, verified), served

    def _class_of(self, module: Any) -> type:
        return self.classes.get(module) or type(module)

    def learn_roles(self, modules: list[tuple[str, nn.Module, type]]) -> None:
        """Tries the children that fused steps would read, before the modules that hold them."""
        if self.trials is None:
            return
        for _, module, cls in modules:
            role = _rule.doubtful_role(cls)
            if role is not None and self.trials.difference(module, cls, ROLE_RULES[role]) is None:
                ROLES[cls] = role

    def _settle(self, module: nn.Module, cls: type, known: _Known) -> tuple[_rule.Rule, bool, str | None]:
        """The rule for a module, whether that was tried out, and why it isn't for it."""
        rule, doubt = known.rule, known.doubt
        assert rule is not None
        if doubt is None:
            return rule, False, None
        if rule.forward in type(module).__mro__:  # an earlier call has tried it
            return rule, True, None
        if self.trials is not None and rule.ending is None:
            found = _tried(self.trials, module, cls, rule)
            if found is None:
                return rule, True, None
            doubt = f"{doubt}; tried: {found}"
        return (rule, False, doubt) if known.hooked is None else (known.hooked, False, None)


def _tried(trials: Trials, module: nn.Module, cls: type, rule: _rule.Rule) -> str | None:
    try:
        reason = rule.reason(module)
    except AttributeError as error:  # it is built differently
        reason = str(error)
    return reason or trials.difference(module, cls, rule)
