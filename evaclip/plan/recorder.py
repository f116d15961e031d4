"""Watches tensors come and go, and what each operator costs, while a model runs."""

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evaclip.plan.operators import Cost, cost_of
from evaclip.weights import is_cut

PARAMETERS, FROZEN, INPUTS, CASTS, GRADIENTS, COMMUNICATION = (
    "parameters",
    "frozen weights",
    "inputs",
    "weights in 16 bits",
    "gradients",
    "communication",
)

# The innermost of these classes or functions on the stack says what a tensor is for.
_MAKERS = {
    "Attention": "attention",
    "TextAttention": "attention",
    "GeluMlp": "MLP",
    "TextMlp": "MLP",
    "SwiGLU": "MLP",
    "Norm.of_branch": "residual stream",
    "Norm": "norms",
    "Block": "residual stream",
    "TextBlock": "residual stream",
    "ResidualBlock": "residual stream",
    "PatchEmbed": "embedding",
    "VisionTower._embed": "embedding",
    "TextTower._embed": "embedding",
    "MaskedImageModel._among_all": "embedding",
    "Teacher": "teacher's features",
}
_SHARDING = "/torch/distributed/"


@dataclass
class Recording:
    """Everything that happened, in order.

    Attributes:
        changes: (storage, bytes) each time that one is allocated (+), freed (-) or resized.
        makers: of each storage, what made it.
        costs: of each operator.
        marks: (name, changes so far, costs so far) at the beginning of each phase.
    """

    changes: list[tuple[int, int]] = field(default_factory=list)
    makers: list[str] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    marks: list[tuple[str, int, int]] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """In its `with` block every operator is recorded; works on fake and on real tensors.

    A storage counts once however many views it has, from the operator that returns it to the moment that nothing
    refers to it any more. What an operator allocates and frees inside itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        self._indices: dict[int, int] = {}
        self._sizes: list[int] = []
        self._references: dict[int, weakref.ref[Any]] = {}

    def mark(self, name: str) -> None:
        """Begins a phase."""
        self.recording.marks.append((name, len(self.recording.changes), len(self.recording.costs)))

    def know(self, tensor: Tensor, maker: str) -> int:
        """The number of the tensor's storage, which from now on is known as `maker` made it, if it wasn't known."""
        storage = local(tensor).untyped_storage()
        index = self._indices.get(id(storage))
        if index is None:
            index = len(self._sizes)
            self._indices[id(storage)] = index
            self._sizes.append(0)
            self.recording.makers.append(maker)
            self._references[index] = weakref.ref(storage, self._forget(id(storage), index))
            self._resize(index, storage.nbytes())
        return index

    def relabel(self, tensor: Tensor, maker: str) -> None:
        """Says anew what made the tensor."""
        self.recording.makers[self.know(tensor, maker)] = maker

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.recording.costs.append(cost_of(func, args, kwargs, result))
        maker = None
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and id(local(leaf).untyped_storage()) not in self._indices:
                maker = maker or self._maker(func, args)
                self.know(leaf, maker)
        return result

    def __enter__(self) -> "Recorder":
        self._unpatch = _on_resize(self._resized)
        self._unpatch.__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)  # type: ignore[no-untyped-call]
        self._unpatch.__exit__(*exc)
        self._references.clear()  # and with them the news of what is freed from here on

    def _maker(self, func: Any, args: Any) -> str:
        if func is torch.ops.aten._to_copy.default:
            source = self._indices.get(id(local(args[0]).untyped_storage()))
            if source is not None and self.recording.makers[source] == PARAMETERS:
                return CASTS
        return _maker_on_stack()

    def _forget(self, key: int, index: int) -> Any:
        def freed(_: Any) -> None:
            self._indices.pop(key, None)
            self._references.pop(index, None)
            self._resize(index, 0)

        return freed

    def _resized(self, storage: Any) -> None:
        index = self._indices.get(id(storage))
        if index is not None:
            self._resize(index, storage.nbytes())

    def _resize(self, index: int, size: int) -> None:
        change = size - self._sizes[index]
        if change:
            self._sizes[index] = size
            self.recording.changes.append((index, change))


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor._local_tensor if is_cut(tensor) else tensor


def _maker_on_stack() -> str:
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if _SHARDING in code.co_filename:
            return COMMUNICATION
        maker = _MAKERS.get(code.co_qualname) or _MAKERS.get(code.co_qualname.partition(".")[0])
        if maker is not None:
            return maker
        frame = frame.f_back  # type: ignore[assignment]
    return "features"


@contextmanager
def _on_resize(callback: Any) -> Iterator[None]:
    """Sharding gives and takes the memory of gathered parameters by resizing storages, which is no operator."""
    original = torch.UntypedStorage.resize_

    def resize_(storage: Any, size: int) -> Any:
        result = original(storage, size)
        callback(storage)
        return result

    torch.UntypedStorage.resize_ = resize_  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]
