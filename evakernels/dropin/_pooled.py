"""Towers of which one token of each sample is read: their last block computes no other.

In front of the last attention all tokens are needed, as its keys and values; behind it those that are pooled. A tower
of which that is certain runs its own forward on a view of itself, whose last block ends with these tokens. The tower
doesn't change, so whatever else is asked of it, such as all tokens, comes out as before.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from evakernels.dropin._gate import DTYPES, is_ordinary
from evakernels.dropin._serve import is_watched, role
from evakernels.dropin._swap import Swapped

_OF_EACH_TOKEN = frozenset(
    {nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Sequential, nn.GELU, nn.MultiheadAttention}
)
_OF_EACH_TOKEN_BY_NAME = frozenset({"timm.layers.mlp.Mlp"})
"""Classes without a role whose output for a token depends, apart from attention, on that token alone."""


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


def ending_with(tower: Any, path: Iterable[str], read: Read, **changes: Any) -> Any:
    """A view of the tower, with `changes`, whose last block, of the list at `path`, ends with what is read."""
    name, *rest = path
    child = tower._modules[name]
    if rest:
        return view(tower, **{name: ending_with(child, rest, read)}, **changes)
    last = str(len(child) - 1)
    return view(tower, **{name: view(child, **{last: view(child[-1], read=read)})}, **changes)


def may_end_early(x: Tensor, last: Any, attention: type | tuple[type, ...], norm: Any) -> bool:
    """Whether for the input `x` nothing behind the attention in the block `last` needs, or shows, other tokens.

    `norm` follows the block. Not where somebody watches, nor where dropout would draw other random numbers, nor in
    float64, of which no bit is to change.
    """
    return (
        is_ordinary(x)
        and isinstance(last, Swapped)
        and next(last.parameters()).dtype in DTYPES
        and isinstance(last.attn, attention)
        and role(norm) in ("layer_norm", "rms_norm", "identity")
        and all(_is_of_each_token(module) for module in last.modules())
    )


def _is_of_each_token(module: nn.Module) -> bool:
    if is_watched(module) or (module.training and _dropout(module) > 0):
        return False
    cls = type(module)
    known = cls in _OF_EACH_TOKEN or f"{cls.__module__}.{cls.__qualname__}" in _OF_EACH_TOKEN_BY_NAME
    return known or isinstance(module, Swapped) or role(module) is not None


def _dropout(module: nn.Module) -> float:
    rate: float = getattr(module, "dropout" if isinstance(module, nn.MultiheadAttention) else "p", 0.0)
    return rate
