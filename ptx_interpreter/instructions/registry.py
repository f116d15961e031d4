"""Makers by opcode, each with the modifiers that it knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..body import Instruction
from ..step import Step

if TYPE_CHECKING:
    from ..machine import Machine

Maker = Callable[["Machine", Instruction], Step]
MAKERS: dict[str, tuple[Maker, frozenset[str]]] = {}


def makes(opcodes: str, modifiers: str) -> Callable[[Maker], Maker]:
    """Makes a function the maker of these opcodes; all other modifiers are refused."""

    def register(maker: Maker) -> Maker:
        MAKERS.update(dict.fromkeys(opcodes.split(), (maker, frozenset(modifiers.split()))))
        return maker

    return register


def one_of(i: Instruction, names: str) -> str | None:
    """The modifier of an instruction that is among these."""
    return next((mod for mod in i.mods if mod in names.split()), None)
