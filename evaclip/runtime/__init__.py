"""Models at work: pictures and texts to embeddings, a store of them, and the search in it."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaclip.runtime.encoder import Encoded, Encoder

__all__ = ["Encoded", "Encoder"]


def __getattr__(name: str) -> Any:
    # Loaded on first use: a search shouldn't wait for torch.
    if name not in __all__:
        raise AttributeError(f"module 'evaclip.runtime' has no attribute {name!r}")
    return getattr(import_module("evaclip.runtime.encoder"), name)
