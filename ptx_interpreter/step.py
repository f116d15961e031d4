"""An instruction made ready to run, for all lanes of a machine or for some, and the makers by opcode."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np

from .body import Instruction
from .types import Array, Value

if TYPE_CHECKING:
    from .machine import Machine


class Active:
    """The lanes that run something, as a mask over all lanes and as numbers."""

    def __init__(self, mask: Array) -> None:
        self.mask = mask

    @cached_property
    def lanes(self) -> Array:
        return np.flatnonzero(self.mask)

    @classmethod
    def from_lanes(cls, lanes: Array, count: int) -> Active:
        mask = np.zeros(count, bool)
        mask[lanes] = True
        return cls(mask)


@dataclass(slots=True)
class Step:
    """`everyone()` runs it for all lanes, `some(active)` for the active ones.

    `pure`: it reads and writes only registers, lane by lane. Then it may run for idle lanes too, as long as nobody
    reads their results.
    """

    everyone: Callable[[], object]
    some: Callable[[Active], object]
    pure: bool = True


def nothing() -> None:
    """Does nothing."""


NO_STEP = Step(nothing, lambda active: None)


def by_lanes(function: Callable[[Active | None], object]) -> Step:
    """The step of a function that takes the active lanes, or None for all."""
    return Step(partial(function, None), function, pure=False)


def elementwise(target: Array | None, function: Callable[..., Any], *sources: Value) -> Step:
    """target = function(*sources), lane by lane. None: nobody wants it."""
    if target is None:
        return NO_STEP
    if isinstance(function, np.ufunc) and any(isinstance(source, np.ndarray) for source in sources):

        def some_of_ufunc(active: Active) -> None:
            function(*sources, out=target, where=active.mask)

        return Step(partial(function, *sources, out=target), some_of_ufunc)

    def everyone() -> None:
        target[:] = function(*sources)

    def some(active: Active) -> None:
        np.copyto(target, function(*sources), where=active.mask, casting="unsafe")

    return Step(everyone, some)


def several(steps: list[Step]) -> Step:
    """One after the other, all of them pure."""

    def everyone() -> None:
        for step in steps:
            step.everyone()

    def some(active: Active) -> None:
        for step in steps:
            step.some(active)

    return Step(everyone, some)


def put(target: Array | None, active: Active | None, values: Value) -> None:
    """Gives the active lanes their values, which are in the order of the lanes."""
    if target is None:
        return
    if active is None:
        target[:] = values
    else:
        target[active.lanes] = values


# --- makers ---------------------------------------------------------------------------------------------------------

Maker = Callable[["Machine", Instruction], Step]
MAKERS: dict[str, tuple[Maker, frozenset[str]]] = {}
"""Makers by opcode, each with the modifiers that it knows."""


def makes(opcodes: str, modifiers: str) -> Callable[[Maker], Maker]:
    """Make a function the maker of these opcodes; all other modifiers are refused."""

    def register(maker: Maker) -> Maker:
        MAKERS.update(dict.fromkeys(opcodes.split(), (maker, frozenset(modifiers.split()))))
        return maker

    return register


def find_modifier(i: Instruction, names: str) -> str | None:
    """Return the modifier of an instruction that is among these."""
    return next((mod for mod in i.mods if mod in names.split()), None)
