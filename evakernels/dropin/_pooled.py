"""Towers of which one token of each sample is read: their last block computes no other.

In front of the last attention all tokens are needed, as its keys and values; behind it those that are pooled. A tower
of which that is certain runs its own forward on a view of itself, whose last block ends with these tokens. The tower
doesn't change, so whatever else is asked of it, such as all tokens, comes out as before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evakernels.dropin._gate import DTYPES, is_ordinary
from evakernels.dropin._serve import ROLES, is_watched
from evakernels.dropin._swap import Swapped

_OF_EACH_TOKEN = frozenset(
    {nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Sequential, nn.GELU, nn.MultiheadAttention}
)
_OF_EACH_TOKEN_BY_NAME = frozenset({"timm.layers.mlp.Mlp"})
"""Classes without a role whose output for a token depends, apart from attention, on that token alone."""
_COMPILES = torch.__version__ >= "2.12"
"""Whether torch's compiler can follow `view`."""


@dataclass(frozen=True)
class Read:
    """Which token of each sample is read: the first or, if there are `rows`, that of int64 `[B]`."""

    rows: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """`[B, N, C]` -> `[B, 1, C]`."""
        if self.rows is None:
            return x[:, :1]
        return x[torch.arange(x.shape[0], device=x.device), self.rows].unsqueeze(1)

    def of_mask(self, mask: Tensor, heads: int) -> Tensor:
        """What these tokens see by a mask `[N, N]`, for each head: `[B * heads, 1, N]`, or `[1, N]` of all samples."""
        return mask[:1] if self.rows is None else mask[self.rows].repeat_interleave(heads, 0).unsqueeze(1)


def view(module: Any, **changes: Any) -> Any:
    """The module with other children or attributes; parameters, buffers, hooks and the rest are shared."""
    children = {name: changes.pop(name) for name in list(changes) if name in module._modules}
    seen = object.__new__(type(module))
    seen.__dict__.update(module.__dict__, **changes)
    seen.__dict__["_modules"] = {**module._modules, **children}
    return seen


@dataclass(frozen=True)
class Ending:
    """How a kind of tower ends.

    Args:
        path: names that lead from the tower to the list of its blocks.
        norm: name of the norm behind them.
        attention: class of the attention in the last of them.
        methods: of the tower, those that its own code calls.
        more: tells why a tower needs more tokens of its last block than one, or None.
    """

    path: tuple[str, ...]
    norm: str
    attention: type
    methods: tuple[str, ...]
    more: Callable[[Any], str | None]

    def reason(self, tower: Any, class_of: Callable[[Any], type] = type) -> str | None:
        """Why the last block of a tower can't end with fewer tokens, where `class_of` tells the classes of modules."""
        if (more := self.more(tower)) is not None:
            return more
        *_, blocks = self._path(tower)
        if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
            return "it has no list of blocks"
        last, norm = blocks[-1], tower._modules[self.norm]
        attention = getattr(last, "attn", None)
        if not issubclass(class_of(last), Swapped) or not issubclass(class_of(attention), self.attention):
            return f"its last block, {class_of(last).__name__}, computes all tokens"
        strange = [part for part in last.modules() if not _is_of_each_token(class_of(part))]
        strange += [norm] if ROLES.get(class_of(norm)) not in ("layer_norm", "rms_norm", "identity") else []
        return f"{class_of(strange[0]).__name__} may need all tokens" if strange else None

    def may_be_early(self, tower: Any, x: Tensor) -> bool:
        """Whether for the input `x` nothing behind the last attention needs, or shows, other tokens than are read.

        Not where somebody watches, nor where dropout would draw other random numbers, nor in float64, of which no bit
        is to change.
        """
        if torch.compiler.is_compiling() and not _COMPILES:
            return False
        if not is_ordinary(x) or any(name in tower.__dict__ for name in self.methods) or self.reason(tower) is not None:
            return False
        _, *path = self._path(tower)
        parameter = next(path[-1][-1].parameters(), None)  # none where FSDP1 has flattened them
        parts = (*path, tower._modules[self.norm], *path[-1][-1].modules())
        return (
            parameter is not None
            and parameter.dtype in DTYPES
            and not any(is_watched(part) or (part.training and _dropout(part) > 0) for part in parts)
        )

    def early(self, tower: Any, read: Read, **changes: Any) -> Any:
        """A view of the tower, with `changes`, whose last block ends with the tokens that are read."""
        *parts, blocks = self._path(tower)
        seen = view(blocks, **{str(len(blocks) - 1): view(blocks[-1], read=read)})
        for part, name in zip(reversed(parts[1:]), reversed(self.path[1:]), strict=True):
            seen = view(part, **{name: seen})
        return view(tower, **{self.path[0]: seen}, **changes)

    def _path(self, tower: Any) -> list[Any]:
        """The tower, and what leads from it to the list of its blocks."""
        parts = [tower]
        for name in self.path:
            parts.append(getattr(parts[-1], "_modules", {}).get(name))
        return parts


def _is_of_each_token(cls: type) -> bool:
    known = cls in _OF_EACH_TOKEN or f"{cls.__module__}.{cls.__qualname__}" in _OF_EACH_TOKEN_BY_NAME
    return known or issubclass(cls, Swapped) or cls in ROLES


def _dropout(module: nn.Module) -> float:
    rate: float = getattr(module, "dropout" if isinstance(module, nn.MultiheadAttention) else "p", 0.0)
    return rate
