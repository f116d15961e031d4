"""Towers that pool one token of each sample: their last block returns this token alone.

The last attention needs all tokens as keys and values; the layers after it need the pooled token only. Such a tower
runs its own forward on a view of itself with a shortened last block. The tower doesn't change, so its other methods
still return all tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._modes import is_observed
from ..nn import FrozenWeight
from ..nn.linear import is_plain_tensor
from ._dispatch import DTYPES, is_plain
from ._fused import class_role
from ._swap import AcceleratedModule

_TOKENWISE = frozenset(
    {nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear, nn.Sequential, nn.GELU, nn.MultiheadAttention}
)
_TOKENWISE_BY_NAME = frozenset({"timm.layers.mlp.Mlp"})
"""Classes without a role that compute, apart from attention, each token from that token alone."""
_MIN_PIXELS = 1 << 14
"""Minimum size of images; in smaller ones the host time of a view outweighs the tokens that are saved."""
_COMPILES = torch.__version__ >= "2.12"
"""Whether torch's compiler can trace `view`."""


@dataclass(frozen=True)
class Selection:
    """The pooled token of each sample: the first or, with `rows`, int64 `[B]`, the token of that index."""

    rows: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """`[B, N, C]` -> `[B, 1, C]`."""
        if self.rows is None:
            return x[:, :1]
        return x[torch.arange(x.shape[0], device=x.device), self.rows].unsqueeze(1)

    def select_mask_rows(self, mask: Tensor, heads: int) -> Tensor:
        """Returns these tokens' rows of a mask `[N, N]`: `[B * heads, 1, N]`, or `[1, N]` if all samples share them."""
        return mask[:1] if self.rows is None else mask[self.rows].repeat_interleave(heads, 0).unsqueeze(1)


def view(module: Any, **changes: Any) -> Any:
    """The module with other children or attributes; parameters, buffers, hooks and the rest are shared."""
    children = {name: changes.pop(name) for name in list(changes) if name in module._modules}
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__, **changes)
    copy.__dict__["_modules"] = {**module._modules, **children}
    return copy


@dataclass(frozen=True)
class Pooling:
    """How a kind of tower pools one token.

    Args:
        path: names of the children that lead from the tower to the list of its blocks.
        norm: name of the norm after the blocks.
        attention: class of the attention in the last block.
        methods: methods of the tower that its own code calls.
        refusal: returns why a tower needs more tokens of its last block than one, or None.
        other: names of children that the replaced method doesn't call.
    """

    path: tuple[str, ...]
    norm: str
    attention: type
    methods: tuple[str, ...]
    refusal: Callable[[Any], str | None]
    other: tuple[str, ...] = ()

    def unused(self, tower: Any) -> set[nn.Module]:
        """The parts that a comparison on a copy can do without: all blocks but the last, and `other`."""
        *_, blocks = self._path(tower)
        parts = {tower._modules[name] for name in self.other if name in tower._modules}
        return parts | {*list(blocks)[:-1]} if isinstance(blocks, nn.Sequential | nn.ModuleList) else parts

    def reason(self, tower: Any, get_class: Callable[[Any], type] = type) -> str | None:
        """Why the last block can't return fewer tokens, or None; `class_of` returns the classes of modules."""
        if (more := self.refusal(tower)) is not None:
            return more
        *_, blocks = self._path(tower)
        if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not len(blocks):
            return "it has no list of blocks"
        last, norm = blocks[-1], tower._modules[self.norm]
        attention = getattr(last, "attn", None)
        if not issubclass(get_class(last), AcceleratedModule) or not issubclass(get_class(attention), self.attention):
            return f"its last block, {get_class(last).__name__}, computes all tokens"
        strange = [part for part in last.modules() if not _is_tokenwise(get_class(part))]
        strange += [norm] if class_role(get_class(norm)) not in ("layer_norm", "rms_norm", "identity") else []
        if strange:
            return f"{get_class(strange[0]).__name__} may need all tokens"
        other = next((p for p in last.parameters() if not (is_plain_tensor(p) or isinstance(p, FrozenWeight))), None)
        return None if other is None else f"{type(other).__name__} may not split"

    def can_shorten(self, tower: Any, x: Tensor) -> bool:
        """Whether only the pooled token is needed after the last attention, for input `x`.

        False with hooks on the block, with dropout, which would draw other random numbers, and in float64, which stays
        bit-exact.
        """
        if torch.compiler.is_compiling() and not _COMPILES:
            return False
        if not is_plain(x) or any(name in tower.__dict__ for name in self.methods):
            return False
        if x.is_floating_point() and x.numel() < _MIN_PIXELS and not (tower.is_forced or torch.compiler.is_compiling()):
            return False
        if self.reason(tower) is not None:
            return False
        _, *path = self._path(tower)
        parameter = next(path[-1][-1].parameters(), None)  # none where FSDP1 has flattened them
        parts = (*path, tower._modules[self.norm], *path[-1][-1].modules())
        return (
            parameter is not None
            and parameter.dtype in DTYPES
            and not any(is_observed(part) or (part.training and _dropout(part) > 0) for part in parts)
        )

    def shorten(self, tower: Any, selection: Selection, **changes: Any) -> Any:
        """Returns a view of the tower with `changes`. Its last block returns the selected tokens alone."""
        *parts, blocks = self._path(tower)
        child = view(blocks, **{str(len(blocks) - 1): view(blocks[-1], selection=selection)})
        for part, name in zip(reversed(parts[1:]), reversed(self.path[1:]), strict=True):
            child = view(part, **{name: child})
        return view(tower, **{self.path[0]: child}, **changes)

    def _path(self, tower: Any) -> list[Any]:
        """The tower and the modules that lead from it to the list of its blocks."""
        parts = [tower]
        for name in self.path:
            parts.append(getattr(parts[-1], "_modules", {}).get(name))
        return parts


def _is_tokenwise(cls: type) -> bool:
    is_listed = cls in _TOKENWISE or f"{cls.__module__}.{cls.__qualname__}" in _TOKENWISE_BY_NAME
    return is_listed or issubclass(cls, AcceleratedModule) or class_role(cls) is not None


def _dropout(module: nn.Module) -> float:
    rate: float = getattr(module, "dropout" if isinstance(module, nn.MultiheadAttention) else "p", 0.0)
    return rate
