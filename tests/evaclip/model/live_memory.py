"""Memory that a forward pass saves for its backward pass."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def kept_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that `forward()` allocates and that are still alive when it has returned, parameters left out."""
    with _Storages() as storages:
        output = forward()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive = {pointer: size for pointer, size, weak in storages.seen if not weak.expired()}
    assert output is not None
    return sum(size for pointer, size in alive.items() if pointer not in parameters)


class _Storages(TorchDispatchMode):
    """Records the storages of all results, without keeping them alive."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, StorageWeakRef]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.seen.append((storage.data_ptr(), storage.nbytes(), StorageWeakRef(storage)))
        return result
