"""Counts what the kernels move and multiply, in Triton's interpreter: a prediction for GPUs, on machines without one.

    with counting() as launches:
        evakernels.layer_norm(x)
    launches[0].tensors["x"].loaded_once

It needs TRITON_INTERPRET=1. Lanes that are masked off don't count. What a program loads again is counted again in
`loaded` and not in `loaded_once`: caches may serve it. An access outside of the arguments is an `IndexError`, which the
interpreter alone would not notice.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, TensorHandle

from evakernels.triton import _interpreter  # noqa: F401  (its create_dot is the one that is counted)

Array = npt.NDArray[Any]


@dataclass
class Traffic:
    """Bytes of one argument: of all accesses, and of the different bytes among them."""

    loaded: int = 0
    stored: int = 0
    loaded_once: int = 0
    stored_once: int = 0


@dataclass
class Launch:
    """One kernel.

    Attributes:
        kernel: name of the function.
        grid: programs in each dimension.
        tensors: by the argument's name. Arguments that share memory, such as halves of one tensor, are one entry whose
            name is theirs, joined: "gate, up".
        products: of matrices, their sizes [..., M, N, K] and how often.
    """

    kernel: str
    grid: tuple[int, ...]
    tensors: dict[str, Traffic] = field(default_factory=dict)
    products: dict[tuple[int, ...], int] = field(default_factory=dict)

    @property
    def programs(self) -> int:
        """Of the whole grid."""
        return int(np.prod(self.grid))

    @property
    def loaded(self) -> int:
        """Bytes of all loads."""
        return sum(traffic.loaded for traffic in self.tensors.values())

    @property
    def stored(self) -> int:
        """Bytes of all stores."""
        return sum(traffic.stored for traffic in self.tensors.values())

    @property
    def bytes_once(self) -> int:
        """Different bytes loaded and different bytes stored: what memory moves where caches serve the rest."""
        return sum(traffic.loaded_once + traffic.stored_once for traffic in self.tensors.values())

    @property
    def flops(self) -> int:
        """Of the matrix products, each multiplication and each addition one."""
        return sum(2 * int(np.prod(sizes)) * times for sizes, times in self.products.items())


class _Memory:
    """The storage of one or more arguments, with a mark at each byte that was accessed."""

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self.names: list[str] = []
        self.begin, self.size = storage.data_ptr(), storage.nbytes()
        self.traffic = Traffic()
        self.loaded, self.stored = (np.zeros(self.size, bool) for _ in range(2))

    def contains(self, addresses: Array) -> bool:
        return bool(self.begin <= addresses.min() and addresses.max() < self.begin + self.size)

    def mark(self, addresses: Array, itemsize: int, *, store: bool) -> None:
        marks = self.stored if store else self.loaded
        at = addresses - np.uint64(self.begin)
        if self.size % itemsize == 0 and not (at % np.uint64(itemsize)).any():
            # All bytes of an element at once.
            marks.view(f"u{itemsize}")[at // np.uint64(itemsize)] = int.from_bytes(b"\1" * itemsize)
        else:
            for byte in range(itemsize):
                marks[at + np.uint64(byte)] = True
        if store:
            self.traffic.stored += addresses.size * itemsize
        else:
            self.traffic.loaded += addresses.size * itemsize

    def result(self) -> Traffic:
        self.traffic.loaded_once, self.traffic.stored_once = int(self.loaded.sum()), int(self.stored.sum())
        return self.traffic


class _Counter:
    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.memories: dict[int, _Memory] = {}

    def begin(self, kernel: str, grid: Any, arguments: dict[str, Any]) -> None:
        self.launches.append(Launch(kernel, tuple(grid)))
        for name, tensor in _tensors(arguments):
            memory = self.memories.setdefault(tensor.untyped_storage().data_ptr(), _Memory(tensor))
            memory.names.append(name)

    def end(self) -> None:
        self.launches[-1].tensors = {", ".join(m.names): m.result() for m in self.memories.values()}
        self.memories.clear()

    def access(self, pointers: TensorHandle, mask: TensorHandle, *, store: bool) -> None:
        lanes = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        addresses = pointers.data[lanes]
        if addresses.size == 0:
            return
        itemsize = max(8, pointers.get_element_ty().primitive_bitwidth) // 8
        for memory in self.memories.values():
            if memory.contains(addresses):
                memory.mark(addresses, itemsize, store=store)
                return
        raise IndexError(f"{self.launches[-1].kernel} accesses memory outside of its arguments")

    def product(self, a: TensorHandle, b: TensorHandle) -> None:
        *batch, rows, inner = a.data.shape
        sizes = (*batch, rows, b.data.shape[-1], inner)
        products = self.launches[-1].products
        products[sizes] = products.get(sizes, 0) + 1


def _tensors(arguments: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, argument in arguments.items():
        tensor = getattr(argument, "base", argument)  # of a tensor descriptor
        if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() > 0:
            yield name, tensor


@contextmanager
def counting() -> Iterator[list[Launch]]:
    """Within the `with` block every kernel that runs leaves a `Launch` in the list."""
    counter = _Counter()
    builder, executor = InterpreterBuilder, GridExecutor
    load, store, dot, execute = (
        builder.create_masked_load,
        builder.create_masked_store,
        builder.create_dot,
        executor.__call__,
    )

    def counted_load(self: Any, pointers: TensorHandle, mask: TensorHandle, *rest: Any, **options: Any) -> TensorHandle:
        counter.access(pointers, mask, store=False)
        return load(self, pointers, mask, *rest, **options)

    def counted_store(self: Any, pointers: TensorHandle, value: TensorHandle, mask: TensorHandle, *rest: Any) -> Any:
        counter.access(pointers, mask, store=True)
        return store(self, pointers, value, mask, *rest)

    def counted_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
        counter.product(a, b)
        return dot(self, a, b, *rest)

    def counted_execute(self: Any, *args: Any, **options: Any) -> None:
        known = {name: value for name, value in options.items() if name in inspect.signature(self.fn).parameters}
        arguments = inspect.getcallargs(self.fn, *args, **known)
        grid = self.grid(arguments) if callable(self.grid) else self.grid
        counter.begin(self.fn.__name__, grid, arguments)
        execute(self, *args, **options)
        counter.end()

    patches = (counted_load, counted_store, counted_dot)
    builder.create_masked_load, builder.create_masked_store, builder.create_dot = patches
    executor.__call__ = counted_execute
    try:
        yield counter.launches
    finally:
        builder.create_masked_load, builder.create_masked_store, builder.create_dot = load, store, dot
        executor.__call__ = execute
