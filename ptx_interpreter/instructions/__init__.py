"""The opcodes. A maker binds an instruction's operands once, and returns a `Step` that runs many times."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..body import Instruction
from ..step import MAKERS, Step
from ..types import Unsupported
from . import arithmetic, asynchronous, atomic, conversion, integer, matrix, memory, warp, warpgroup  # noqa: F401

if TYPE_CHECKING:
    from ..machine import Machine


def make(machine: Machine, i: Instruction) -> Step:
    """The step of an instruction.

    Raises:
        Unsupported: names the instruction, and where it stands.
    """
    try:
        if i.op not in MAKERS:
            raise Unsupported(f"the opcode {i.op}")
        maker, modifiers = MAKERS[i.op]
        if unknown := [mod for mod in i.mods if mod not in modifiers]:
            raise Unsupported(f"the modifier .{unknown[0]} of {i.op}")
        return maker(machine, i)
    except (Unsupported, KeyError, ValueError, IndexError, TypeError) as error:
        reason = error if isinstance(error, Unsupported) else f"{type(error).__name__} {error}"
        raise Unsupported(
            f"{reason} in `{i.text}` at {machine.body.where(i.line)}, line {i.number} of the PTX, is not supported"
        ) from error
