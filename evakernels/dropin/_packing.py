"""Towers that run without padding: a mask of padded keys becomes a packed batch for all layers.

The tower gathers the real tokens of all samples and gives its layers a `Packing` in place of the mask. Layers pass it
on to their attention, which computes each sequence on its own. Norms and MLPs compute each token on its own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .._modes import is_observed
from ..backends import refuse
from ..ops import packed_attention, token_dropout
from ._dispatch import dispatches_to

MASKED = -1e4
"""The largest value of an additive mask that hides a key: its softmax is zero in float32."""

_DROP_RATES = "p", "dropout", "attention_dropout", "drop_prob"


class Packing(NamedTuple):
    """The sequences of a packed batch; layers pass it to their attention in place of a mask.

    Attributes:
        batch, length: B and N of the padded batch.
        rows: int64 `[T]`, b * N + n of the real tokens, ascending; None if all B * N tokens are real.
        cu_seqlens: int32 `[S + 1]`, first tokens of the sequences, then T.
        max_seqlen: the longest sequence.
        causal: whether tokens see no later ones.
    """

    batch: int
    length: int
    rows: Tensor | None
    cu_seqlens: Tensor
    max_seqlen: int
    causal: bool

    def pack(self, x: Tensor) -> Tensor:
        """The real tokens, `[B, N, C]` -> `[1, T, C]`."""
        tokens = x.flatten(0, 1).unsqueeze(0)
        return tokens if self.rows is None else token_dropout(tokens, self.rows.unsqueeze(0))

    def unpack(self, x: Tensor) -> Tensor:
        """`[1, T, C]` -> `[B, N, C]`, with zeros in the padding."""
        tokens = x.squeeze(0)
        if self.rows is not None:
            padded = tokens.new_zeros(self.batch * self.length, tokens.shape[-1])
            tokens = padded.index_copy(0, self.rows, tokens)
        return tokens.view(self.batch, self.length, -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Attention of `[1, T, H, D]` within each sequence."""
        options |= {"max_seqlen": self.max_seqlen, "causal": self.causal}
        out: Tensor = packed_attention(q[0], k[0], v[0], self.cu_seqlens, **options)
        return out.unsqueeze(0)


def read_mask(mask: Any, x: Tensor, pooled: int | None = None) -> Packing | None:
    """The sequences that a mask describes, or None for another mask.

    Args:
        mask: bool, True for visible keys, or additive, zero for visible ones: `[B, 1, 1, N]` or `[B, 1, N, N]`,
            which may also be causal or, for one sample, have blocks. Rows of padding see keys of their sample or none.
            A mask for all samples has a batch of 1.
        x: the tokens, `[B, N, C]`.
        pooled: index of a token that must be real in every sample.
    """
    batch, length = x.shape[:2]
    visible = _read_visible(mask, batch, length)
    if visible is None or not x.numel():
        return None
    keys, causal = visible.any(1).expand(batch, -1), False
    bounds = F.pad(keys.sum(1).cumsum(0), (1, 0))
    if visible.shape[1] > 1:
        places = torch.arange(length, device=x.device)
        forms = [keys.unsqueeze(1), keys.unsqueeze(1) & (places <= places.unsqueeze(1))]
        if batch == 1:
            starts = F.pad(visible[0].diagonal(-1), (1, 0)).logical_not()
            blocks = starts.cumsum(0)
            forms.append(blocks == blocks.unsqueeze(1))
        padding = keys.logical_not().unsqueeze(2)
        equal = torch.stack([((visible == form) | padding).all() for form in forms]).tolist()
        if not any(equal):
            return None
        causal = equal.index(True) == 1
        if equal.index(True) == 2:
            bounds = F.pad(starts.nonzero().squeeze(1), (0, 1), value=length)
    real = keys.flatten().nonzero().squeeze(1)
    if not real.shape[0] or (pooled is not None and not bool(keys[:, pooled].all())):
        return None
    rows = real if real.shape[0] < batch * length else None
    return Packing(batch, length, rows, bounds.int(), int(bounds.diff().max()), causal)


def _read_visible(mask: Any, batch: int, length: int) -> Tensor | None:
    """Bool `[B or 1, N or 1, N]`, whether queries see keys; None for a mask that isn't of this form."""
    if type(mask) is not Tensor or mask.requires_grad or mask.dim() != 4:
        return None
    if mask.shape[0] not in (1, batch) or mask.shape[1] != 1 or mask.shape[2] not in (1, length):
        return None
    if mask.shape[3] != length or not (mask.dtype == torch.bool or mask.is_floating_point()):
        return None
    mask = mask[:, 0]
    visible: Tensor = mask if mask.dtype == torch.bool else mask == 0
    return visible if mask.dtype == torch.bool or bool((visible | (mask <= MASKED)).all()) else None


@dataclass(frozen=True)
class Layers:
    """The layers of a tower that can run packed.

    Args:
        name: name of the tower's list of layers.
        attention: class of the replaced attentions, which take a `Packing` as their mask.
        refusal: returns why an attention takes none now, or None.
        other: names of children that the replaced method doesn't call.
    """

    name: str
    attention: type
    refusal: Callable[[Any], str | None]
    other: tuple[str, ...] = ()
    stem: ClassVar[str] = ""

    def unused(self, tower: Any) -> set[nn.Module]:
        """The parts that a comparison on a copy can do without: `other`, and layers that print like an earlier one."""
        found = {child for name, child in tower.named_children() if name in self.other}
        kinds: set[str] = set()
        for layer in tower._modules.get(self.name) or ():
            found |= {layer} if repr(layer) in kinds else set()
            kinds.add(repr(layer))
        return found

    def sizes(self, tower: Any) -> dict[int, int]:
        return {}

    def reason(self, tower: Any, class_of: Callable[[Any], type] = type) -> str | None:
        """Why the layers take no `Packing`, or None; `class_of` returns the classes of modules."""
        layers = tower._modules.get(self.name)
        if not isinstance(layers, nn.Sequential | nn.ModuleList) or not len(layers):
            return "it has no list of layers"
        for layer in layers:
            attentions = [part for part in layer.modules() if issubclass(class_of(part), self.attention)]
            if not attentions:
                return f"the attention of its {type(layer).__name__} keeps its own code"
            for attention in attentions:
                if (refusal := self.refusal(attention)) is not None:
                    return refusal
        return None

    def can_pack(self, tower: Any, x: Tensor) -> bool:
        """Whether the layers take the tokens `x` packed.

        False with hooks, which would see other shapes, with dropout, which would draw other random numbers, and in
        compiled code, which can't read the mask.
        """
        if torch.compiler.is_compiling():
            return False
        if not dispatches_to("packed_attention", x, after_linear=True, forced=tower.is_forced):
            return False
        reason = self.reason(tower)
        if reason is not None:
            return refuse(reason)
        parts = list(tower._modules[self.name].modules())
        if any(is_observed(part) for part in parts):
            return refuse("hooks")
        return not any(part.training and _drops(part) for part in parts) or refuse("dropout")


def _drops(module: nn.Module) -> bool:
    rates = (module.__dict__.get(name) for name in _DROP_RATES)
    return any(isinstance(rate, int | float) and rate > 0 for rate in rates)


# --- arguments for the comparison -------------------------------------------------------------------------------------


def real_tokens(x: Tensor) -> Tensor:
    """Bool `[2, N]`, the real tokens of a comparison: all of the first sample, first and last of the second."""
    real = torch.ones(x.shape[:2], dtype=torch.bool)
    real[1, 3:5] = real[1, 7:-1] = False
    return real


def padded_masks(x: Tensor) -> list[Tensor]:
    """Masks of padding, bool and additive, and a causal one."""
    real = real_tokens(x)
    keys = real[:, None, None].expand(-1, 1, x.shape[1], -1)
    return [keys, torch.zeros(keys.shape).masked_fill(~keys, float("-inf")), keys & keys.new_ones(keys.shape).tril()]


def without_padding(result: Any) -> Any:
    """The result of a comparison with zeros in the padding."""

    def clear(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dim() != 3:
            return value
        return value.masked_fill(~real_tokens(value).unsqueeze(2), 0)

    return tree_map(clear, result)
