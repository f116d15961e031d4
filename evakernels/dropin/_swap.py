"""Replaces a module's class by a subclass with another forward, and restores it.

Parameters, buffers, hooks, names, `isinstance` and the class's name stay.
"""

import inspect
import uuid
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from torch import Tensor, nn

_PROCESS = uuid.uuid4().hex
"""Verdicts hold for one process and its forks; in another process a pickle has its original classes."""

LIVE: "WeakSet[nn.Module]" = WeakSet()
"""The modules of this process that have or had a replaced class."""


class AcceleratedModule(nn.Module):
    """Base of the classes with a replaced forward; the original class comes after it in the order of bases."""

    method = "forward"
    """Name of the replaced method."""

    is_forced = False
    """Whether it runs on the ops even where its own code is faster."""

    untried: tuple[str, ...] = ()
    """Arguments that weren't compared; a call with another value than the default runs the original method."""

    selection: Any = None
    """The tokens that the module returns, a `_pooling.Selection`; None for all."""

    def _select(self, x: Tensor) -> Tensor:
        """The tokens of `x`, `[B, N, C]`, that the module returns."""
        return x if self.selection is None else self.selection(x)

    if TYPE_CHECKING:
        # The attributes of another library's class.
        def __getattr__(self, name: str) -> Any: ...

    def __prepare_scriptable__(self) -> Any:
        """`torch.jit.script` calls this to get the module to compile; it can't compile this one."""
        raise RuntimeError("torch.jit.script can't read an accelerated model; call evakernels.restore(model) first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickle names the original class, which can be imported."""
        reduced: Any = super().__reduce_ex__(protocol)
        cls = type(self)
        original = original_class(cls)
        if original is None:
            return reduced
        return _rebuild, (original, cls.is_forced, cls.__bases__[0], cls.untried, _PROCESS), *reduced[2:]


def module_class(module: nn.Module) -> type:
    """The module's class after the classes that FSDP2 and parametrizations put before it."""
    cls = type(module)
    while _is_wrapper(cls):
        cls = cls.__bases__[-1]
    return cls


def original_class(cls: type) -> type | None:
    """The class that `cls` replaces, or None for a class that isn't of this package."""
    bases = cls.__bases__
    return bases[1] if len(bases) == 2 and issubclass(bases[0], AcceleratedModule) else None


def find_original_class(module: nn.Module) -> type:
    """The class that the module has without this package, FSDP2 and parametrizations."""
    cls = module_class(module)
    return original_class(cls) or cls


def replacement_class(
    original: type, forward: type[AcceleratedModule], forced: bool = False, tried: frozenset[str] | None = None
) -> type:
    """The subclass of `original` that runs `forward`'s forward; the same one as long as a module has it.

    Args:
        original: class of the module.
        forward: class with the new forward.
        forced: whether the module runs on the ops even where its own code is faster.
        tried: arguments of the comparison; a call with others runs the original forward. None for all.
    """
    return _get_class(original, forward, forced, _untried(original, forward, tried))


def _get_class(original: Any, forward: type[AcceleratedModule], forced: bool, untried: tuple[str, ...]) -> type:
    for cls in original.__subclasses__():  # which holds them weakly
        if cls.__bases__ == (forward, original) and (cls.is_forced, cls.untried) == (forced, untried):
            return cls  # type: ignore[no-any-return]
    members = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    members |= {"is_forced": forced, "untried": untried}
    if untried:
        original_method, new_method = (getattr(base, forward.method) for base in (original, forward))
        members[forward.method] = _guarded(original_method, new_method, frozenset(untried))
    return type(original.__name__, (forward, original), members)


def list_parameters(original: Any, replacement: Any) -> list[inspect.Parameter]:
    """The parameters of a method without `self`; of its replacement if `*args` hides them."""
    parameters = list(inspect.signature(original).parameters.values())
    if any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
        parameters = list(inspect.signature(replacement).parameters.values())
    return parameters[1:]


def _untried(original: Any, forward: Any, tried: frozenset[str] | None) -> tuple[str, ...]:
    """Arguments of the original forward that weren't compared or that the new forward lacks."""
    new = getattr(forward, forward.method)
    if tried is None or new is nn.Module.forward:
        return ()
    open_ended = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
    kinds = {parameter.kind for parameter in inspect.signature(new).parameters.values()}
    return tuple(
        parameter.name
        for parameter in list_parameters(getattr(original, forward.method), new)
        if (parameter.kind not in kinds if parameter.kind in open_ended else parameter.name not in tried)
    )


def _guarded(original: Any, replacement: Any, untried: frozenset[str]) -> Any:
    """A method that calls the new one, or its own if an untried argument differs from its default."""
    parameters = list_parameters(original, replacement)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in named if p.kind is p.POSITIONAL_OR_KEYWORD]
    defaults = {p.name: p.default for p in named if p.name in untried}
    tried = {p.name for p in named} - untried
    takes_any = any(p.kind is p.VAR_KEYWORD and p.name not in untried for p in parameters)

    def forward(self: Any, *args: Any, **options: Any) -> Any:
        arguments = {**dict(zip(names, args, strict=False)), **options}
        strange = [name for name in arguments if name in untried or not (name in tried or takes_any)]
        other = [n for n in strange if arguments[n] is not defaults.get(n, inspect.Parameter.empty)]
        if len(args) > len(names) or other:
            return original(self, *args, **options)
        return replacement(self, **{name: value for name, value in arguments.items() if name not in strange})

    return forward


def set_class(module: nn.Module, cls: type) -> None:
    """Gives the module the class `cls`; classes that FSDP2 or a parametrization has put before it stay."""
    module.__class__ = _replace_base(type(module), cls)
    LIVE.add(module)


def _replace_base(current: type, cls: type) -> type:
    if not _is_wrapper(current):
        return cls
    # transformers' layers put a forward with the one of `current` inside into every subclass, also into FSDP2's.
    left = "__dict__", "__weakref__", "forward"
    members = {name: value for name, value in vars(current).items() if name not in left}
    *others, last = current.__bases__
    return type(current.__name__, (*others, _replace_base(last, cls)), members)


def _is_wrapper(cls: type) -> bool:
    """Whether a class was made at run time by FSDP2 or a parametrization, as a subclass of the module's own."""
    is_fsdp = len(cls.__bases__) == 2 and cls.__bases__[0].__module__.startswith("torch.distributed.")
    return is_fsdp or (cls.__module__ == _PARAMETRIZE and cls.__name__.startswith("Parametrized"))


_PARAMETRIZE = "torch.nn.utils.parametrize"


def _rebuild(
    original: Any, forced: bool = False, forward: Any = None, untried: tuple[str, ...] = (), process: str = ""
) -> Any:
    """An empty module for `pickle` and `copy` to fill, of its replaced class in the process that has verified it."""
    if process != _PROCESS:
        return original.__new__(original)
    cls: Any = _get_class(original, forward, forced, untried)
    module = cls.__new__(cls)
    LIVE.add(module)
    return module
