"""atom and red. Lanes take their turns in order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ..body import Instruction
from ..memory import BASE, WORDS
from ..step import Active, Step, by_lanes, find_modifier, makes, put
from ..types import DTYPES, SHIFTS, SIZES, Array, Unsupported, last_type, unsigned
from ..watch import Access
from .arithmetic import HALVES as SINGLE_HALVES
from .memory import address_space, bind_addresses, select_active

if TYPE_CHECKING:
    from ..machine import Machine

OPERATIONS: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "exch": lambda old, new: new,
    "cas": lambda old, compared, new: np.where(old == compared, new, old),
}
TYPES = "b16 b32 b64 u32 s32 u64 s64 f32 f64 f16 bf16 f16x2 bf16x2"
HALVES = SINGLE_HALVES | {f"{kind}x2": functions for kind, functions in SINGLE_HALVES.items()}
ORDERS = "relaxed acquire release acq_rel"


@makes("atom red", f"global shared cta gpu sys noftz v2 v4 L2::cache_hint {ORDERS} {TYPES} {' '.join(OPERATIONS)}")
def atomic(machine: Machine, i: Instruction) -> Step:
    """d, [a], b: d = *a, *a = operation(*a, b); cas compares with b and writes c. Elements of a vector are separate."""
    kind, name = last_type(i.mods), find_modifier(i, " ".join(OPERATIONS)) or "add"
    result, address, value, *more = i.args if i.op == "atom" else ["_", *i.args]
    half, size = HALVES.get(kind), SIZES[kind]
    if half and name != "add":
        raise Unsupported(f"{i.op}.{name} of {kind}")
    function = _add_halves(half) if half else OPERATIONS[name]
    carrier = unsigned(size) if half else kind
    values = value if isinstance(value, list) else [value]
    results = result if isinstance(result, list) else [result] * len(values)
    operands = [[one, *more[:1]] if name == "cas" else [one] for one in values]
    sources = [[machine.registers.source(arg, carrier) for arg in args] for args in operands]
    targets = [machine.registers.target(each, carrier) for each in results]
    space, addresses = address_space(i), bind_addresses(machine, address)
    order = find_modifier(i, ORDERS) or "relaxed"
    access = machine.checks.access(Access(i, space, size * len(values), write=True, atomic=order))
    dtype = DTYPES[carrier]

    def run(active: Active | None) -> None:
        at = addresses(active)
        if space == "shared":
            at, good = machine.checks.check_shared(access, active, at)
            words = machine.shared.words[size]
        else:
            good = machine.checks.check_global(access, active, at)
            at, words = at - BASE, WORDS[size]
        for n, (target, operands) in enumerate(zip(targets, sources, strict=True)):
            places = (at >> SHIFTS[size]) + n
            mine = [np.broadcast_to(select_active(source, active), at.shape) for source in operands]
            results = np.zeros(len(at), dtype)
            for turn in _turns(places, good):
                old = words[places[turn]].view(dtype)
                words[places[turn]] = np.asarray(function(old, *(v[turn] for v in mine)), dtype).view(words.dtype)
                results[turn] = old
            put(target, active, results)

    return by_lanes(run)


def _turns(places: Array, good: Array | None) -> list[Array]:
    """Numbers of the accesses that can be made at once, as they are of different places."""
    numbers = np.arange(len(places)) if good is None else np.flatnonzero(good)
    order = numbers[np.argsort(places[numbers], kind="stable")]
    ordered = places[order]
    first = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(ordered) else order
    counts = np.diff(np.append(first, len(ordered)))
    ranks = np.arange(len(ordered)) - np.repeat(first, counts)
    return [order[ranks == turn] for turn in range(int(counts.max(initial=0)))]


def _add_halves(half: Any) -> Any:
    widen, narrow = half

    def add(old: Array, new: Array) -> Array:
        parts = (np.ascontiguousarray(v).view(np.uint16) for v in (old, new))
        total: Array = narrow(np.add(*map(widen, parts)))
        return total.view(old.dtype)

    return add
