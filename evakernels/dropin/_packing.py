"""Towers that run without padding: a mask of padded keys becomes a packed batch for all layers.

The tower gathers the real tokens of all samples and gives its layers a `Packing` in place of the mask. Layers pass it
on to their attention, which computes each sequence on its own. Norms and MLPs compute each token on its own.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .._modes import is_observed
from ..packing import Packing
from ._dispatch import dispatches_to
from ._swap import find_original_class

MASKED = -1e4
"""The largest value of an additive mask that hides a key: its softmax is zero in float32."""

_DROP_RATES = "p", "dropout", "attention_dropout", "drop_prob"


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
    if not _has_shape(mask, batch, length) or not x.numel():
        return None
    mask = mask[:, 0]
    visible = mask if mask.dtype == torch.bool else mask == 0
    keys = visible.any(1).expand(batch, -1)
    lengths, can_pack = keys.sum(1), keys.any()
    sizes = [lengths.sum(), lengths.max()]
    if mask.dtype != torch.bool:
        can_pack &= (visible | (mask <= MASKED)).all()
    if pooled is not None:
        can_pack &= keys[:, pooled].all()
    matches = [can_pack]
    if visible.shape[1] > 1:
        places = torch.arange(length, device=x.device)
        forms = [keys.unsqueeze(1), keys.unsqueeze(1) & (places <= places.unsqueeze(1))]
        if batch == 1:
            blocks = (keys[0] & ~F.pad(visible[0].diagonal(-1), (1, 0))).cumsum(0)
            forms.append((blocks == blocks.unsqueeze(1)) & keys)
            block_lengths = places.new_zeros(length + 1).scatter_add(0, blocks, keys[0].long())
            sizes += [block_lengths.max(), block_lengths.count_nonzero()]
        padding = keys.logical_not().unsqueeze(2)
        matches = [can_pack & ((visible == form) | padding).all() for form in forms]
    # One read, as each waits for the device.
    values = torch.stack([*matches, *sizes]).tolist()
    form = next((index for index in range(len(matches)) if values[index]), None)
    if form is None:
        return None
    total, longest, *block_sizes = values[len(matches) :]
    if form == 2:
        longest, count = block_sizes
        lengths = block_lengths[1 : count + 1]
    rows = None if total == batch * length else torch.nonzero_static(keys.flatten(), size=total).squeeze(1)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).int()
    return Packing(batch, length, rows, cu_seqlens, lengths.int(), longest, causal=form == 1)


def _has_shape(mask: Any, batch: int, length: int) -> bool:
    """Whether a mask is `[B or 1, 1, N or 1, N]`, bool or floating-point."""
    if type(mask) is not Tensor or mask.requires_grad or mask.dim() != 4:
        return False
    accepted = (1, batch), (1,), (1, length), (length,)
    fits = all(size in sizes for size, sizes in zip(mask.shape, accepted, strict=True))
    return fits and (mask.dtype == torch.bool or mask.is_floating_point())


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

    def unused(self, tower: Any) -> set[nn.Module]:
        """The parts that a comparison on a copy can do without: `other`, and layers that print like an earlier one."""
        parts = {child for name, child in tower.named_children() if name in self.other}
        kinds: set[str] = set()
        for layer in tower._modules.get(self.name) or ():
            parts |= {layer} if repr(layer) in kinds else set()
            kinds.add(repr(layer))
        return parts

    def reason(self, tower: Any, get_class: Callable[[Any], type] = type) -> str | None:
        """Why the layers take no `Packing`, or None; `class_of` returns the classes of modules."""
        layers = tower._modules.get(self.name)
        if not isinstance(layers, nn.Sequential | nn.ModuleList) or not len(layers):
            return "it has no list of layers"
        for layer in layers:
            attentions = [part for part in layer.modules() if issubclass(get_class(part), self.attention)]
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
        if self.reason(tower) is not None:
            return False
        parts = [*tower._modules[self.name].modules()]
        if any(map(is_observed, _kernel_functions(parts))):
            return False
        return not any(is_observed(part) or (part.training and _drops(part)) for part in parts)


def _kernel_functions(parts: list[nn.Module]) -> list[nn.Module]:
    """Functions that Hugging Face's `kernels` has turned into modules, which `modules()` doesn't list.

    An attention calls the module in its file, which calls the attention's own.
    """
    callers = [part for part in parts if "_kernel_funcs" in part.__dict__]
    functions = [function for part in callers for function in part.__dict__["_kernel_funcs"].values()]
    kinds, files = {type(function) for function in functions}, {find_original_class(p).__module__ for p in callers}
    return functions + [value for file in files for value in vars(sys.modules[file]).values() if type(value) in kinds]


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
    return [keys, x.new_zeros(keys.shape).masked_fill(~keys, float("-inf")), keys & keys.new_ones(keys.shape).tril()]


def without_padding(result: Any) -> Any:
    """The result of a comparison with zeros in the padding."""
    return tree_map_only(
        Tensor, lambda x: x.masked_fill(~real_tokens(x).unsqueeze(2), 0) if x.dim() == 3 else x, result
    )
