"""The swap: a module's class becomes a subclass of its own with another forward. Nothing else of it changes.

Parameters, buffers, hooks and names stay, so do `isinstance` and the class's name; the way back is the same step.
"""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from evakernels.dropin._serve import ROLES

_SERVED: dict[tuple[type, type, bool], type] = {}
_ORIGINAL: dict[type, type] = {}


class Swapped(nn.Module):
    """Base of the classes whose forward takes the place of another; the class that it serves stands behind it."""

    is_forced = False
    """Whether the ops serve it where its own code would be faster, too."""

    read: Any = None
    """Which tokens it ends with, a `_pooled.Read`, where others aren't needed; None for all."""

    def _ending(self, x: Tensor) -> Tensor:
        """Of `x`, `[B, N, C]`, the tokens that it ends with."""
        return x if self.read is None else self.read(x)

    if TYPE_CHECKING:
        # Its attributes are those of another library's class.
        def __getattr__(self, name: str) -> Any: ...

    def __prepare_scriptable__(self) -> Any:
        """`torch.jit.script` asks for what it shall read instead; it can't read this."""
        raise RuntimeError("torch.jit.script can't read an accelerated model; call evakernels.restore(model) first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A pickle names the original class: that can be imported."""
        reduced: Any = super().__reduce_ex__(protocol)
        original = _ORIGINAL.get(type(self))
        if original is None:
            return reduced
        return _rebuild, (original, self.is_forced, type(self).__bases__[0]), *reduced[2:]


def own_class(module: nn.Module) -> type:
    """The module's class, seen through those that FSDP2 and parametrizations put in front of it."""
    cls = type(module)
    while _is_wrapper(cls):
        cls = cls.__bases__[-1]
    return cls


def original_class(cls: type) -> type | None:
    """The class that `cls` serves, or None for a class that isn't of this package."""
    return _ORIGINAL.get(cls)


def served_class(original: type, forward: type[Swapped], forced: bool = False) -> type:
    """The subclass of `original` that runs `forward`'s forward, always the same one."""
    key = original, forward, forced
    if key not in _SERVED:
        names = {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
        served = type(original.__name__, (forward, original), {**names, "is_forced": forced})
        _SERVED[key], _ORIGINAL[served] = served, original
        if original in ROLES:
            ROLES[served] = ROLES[original]
    return _SERVED[key]


def set_class(module: nn.Module, cls: type) -> None:
    """Gives the module the class `cls`, behind what FSDP2 or a parametrization has put there."""
    module.__class__ = _behind(type(module), cls)


def _behind(current: type, cls: type) -> type:
    if not _is_wrapper(current):
        return cls
    # Its forward isn't FSDP2's: transformers' layers put one into every subclass, with that of `current` inside.
    left = "__dict__", "__weakref__", "forward"
    kept = {name: value for name, value in vars(current).items() if name not in left}
    *others, last = current.__bases__
    return type(current.__name__, (*others, _behind(last, cls)), kept)


def _is_wrapper(cls: type) -> bool:
    """Such a class is made at run time, of the module's own and, if it is FSDP2's, one of torch.distributed."""
    of_fsdp = len(cls.__bases__) == 2 and cls.__bases__[0].__module__.startswith("torch.distributed.")
    return of_fsdp or (cls.__module__ == _PARAMETRIZE and cls.__name__.startswith("Parametrized"))


_PARAMETRIZE = "torch.nn.utils.parametrize"


def _rebuild(original: type, forced: bool = False, forward: Any = None) -> Any:
    """An empty module for `pickle` and `copy` to fill: swapped where the class is known or, in this process, was."""
    from evakernels.dropin._rule import served

    cls: Any = _SERVED.get((original, forward, forced)) or served(original, forced) or original
    return cls.__new__(cls)
