"""Values of the names in a kernel: vectors of registers, special registers, symbols, numbers."""

from collections import defaultdict
from typing import Any

import numpy as np

from .body import Body, immediate
from .rounding import Fma32
from .types import SIZES, TYPES, WARP, Array, Unsupported, Value, unsigned

Dim3 = tuple[int, int, int]


class Registers:
    """The registers of a machine's lanes.

    A register that no other block of instructions reads takes its vector from a pool and gives it back after its last
    use, so that the vectors in use fit into a processor's cache. `passing` names those while a block is made ready.
    """

    def __init__(self, body: Body, threads: Array, grid: Dim3, block: Dim3) -> None:
        self.body, self.grid, self.block = body, grid, block
        self.threads = threads  # number of the thread in its block, of each lane
        self.lanes = len(threads)
        self.symbols: dict[str, int] = {}
        self.passing: set[str] = set()
        self.bytes = 0
        self._vectors: dict[str, Array] = {}
        self._pool: dict[Any, list[Array]] = defaultdict(list)
        self._specials: dict[str, Value] = {}
        self.fma = Fma32(self.lanes)

    def vector(self, name: str) -> Array:
        """The bits of a register, of each lane."""
        vector = self._vectors.get(name)
        if vector is None:
            declared = self.body.register_type(name)
            if declared is None:
                raise Unsupported(f"{name}, which is no register,")
            dtype = TYPES["pred" if declared == "pred" else unsigned(SIZES[declared])]
            pool = self._pool[dtype] if name in self.passing else None
            if pool:
                vector = pool.pop()
            else:
                vector = np.zeros(self.lanes, dtype)
                self.bytes += vector.nbytes
            self._vectors[name] = vector
        return vector

    def give_back(self, name: str) -> None:
        vector = self._vectors.pop(name, None)
        if vector is not None:
            self._pool[vector.dtype].append(vector)

    def set_block(self, numbers: Array) -> None:
        """Gives %ctaid the blocks with these numbers in the grid, of each lane."""
        x, y, _ = self.grid
        for axis, index in (("x", numbers % x), ("y", numbers // x % y), ("z", numbers // (x * y))):
            self._special(f"%ctaid.{axis}")[:] = index

    def _special(self, name: str) -> Value:
        value = self._specials.get(name)
        if value is None:
            value = self._specials[name] = self._new_special(name)
        return value

    def _new_special(self, name: str) -> Value:
        kind, _, axis = name[1:].partition(".")
        x, y, _ = self.block
        if kind == "tid":
            index = {"x": self.threads % x, "y": self.threads // x % y, "z": self.threads // (x * y)}[axis]
            return index.astype(np.uint32)
        if kind == "ctaid":
            return np.zeros(self.lanes, np.uint32)
        if kind in ("ntid", "nctaid"):
            return np.uint32((self.block if kind == "ntid" else self.grid)["xyz".index(axis)])
        if kind == "laneid":
            return (self.threads % WARP).astype(np.uint32)
        raise Unsupported(f"the special register {name}")

    def number(self, name: Any) -> int | None:
        """The integer that an operand is in every lane, throughout; None if there is no such one."""
        if isinstance(name, str):
            name = self.body.constants.get(name, (name, ""))[0]
            if name[0] in "-0123456789" and isinstance(value := immediate(name), int):
                return value
        return None

    def source(self, name: Any, kind: str) -> Value:
        """An operand as a vector of this type, or as one number of it."""
        dtype = TYPES[kind]
        if name in self.body.constants:
            text, declared = self.body.constants[name]
            bits = np.atleast_1d(self._literal(text, TYPES[declared]))
            if bits.itemsize < dtype.itemsize:
                raise Unsupported(f"{name} as {kind}")
            return bits.view(dtype)[0]
        if self.body.register_type(name):
            vector = self.vector(name)
            if vector.dtype == dtype:
                return vector
            if vector.itemsize < dtype.itemsize or (kind == "pred") != (vector.dtype == np.bool_):
                raise Unsupported(f"{name} as {kind}")
            return vector.view(dtype)[:: vector.itemsize // dtype.itemsize]
        if name[0] == "%":
            return self._special(name)
        if name in self.symbols:
            return dtype.type(self.symbols[name])
        return self._literal(name, dtype)

    def _literal(self, text: str, dtype: Any) -> Value:
        value = immediate(text)
        if dtype == np.bool_:
            return np.bool_(value)
        if isinstance(value, float):
            if dtype.kind != "f":  # the bits of it
                return np.array(value, f"f{dtype.itemsize}").view(dtype)[()]
            return dtype.type(value)
        if dtype.kind == "f":
            raise Unsupported(f"the integer {text} as a float")
        mask = (1 << 8 * dtype.itemsize) - 1
        return np.array(value & mask, f"u{dtype.itemsize}").view(dtype)[()]

    def target(self, name: Any, kind: str) -> Array | None:
        """Where a result of this type goes, which a wider register takes extended; None for `_`."""
        if name == "_":
            return None
        vector, dtype = self.vector(name), TYPES[kind]
        if vector.itemsize < dtype.itemsize or (kind == "pred") != (vector.dtype == np.bool_):
            raise Unsupported(f"{kind} into {name}")
        if vector.itemsize == dtype.itemsize:
            extended: Array = vector.view(dtype)
            return extended
        if dtype.kind == "f":
            raise Unsupported(f"{kind} into {name}")
        extended = vector.view(f"{dtype.kind}{vector.itemsize}")
        return extended
