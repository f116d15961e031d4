"""Attention for transformers: `attn_implementation="evakernels"`.

Importing this module registers the name with transformers' `AttentionInterface` and `AttentionMaskInterface`. Masks are
those of "sdpa". A mask of padded keys, causal or not, runs packed, so padding costs no time; other masks and options
run transformers' sdpa attention.
"""

import inspect
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
except ImportError as error:
    text = f"evakernels.transformers: transformers must be 4.53 or later ({error}): pip install -U transformers"
    raise type(error)(text, name=error.name) from error

from .dropin._dispatch import dispatches_to
from .dropin._packing import read_mask
from .ops import rope_attention
from .packing import Packing
from .triton import MAX_HEAD_DIM

NAME = "evakernels"
"""The value of `attn_implementation`."""

_logger = logging.getLogger(__name__)

_ARGUMENTS = {"module", "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "kwargs"}
_OPTIONS = sorted(
    {*inspect.signature(sdpa_attention_forward).parameters, "head_mask", "output_attentions"} - _ARGUMENTS
)
"""Options that the ops lack."""

_EAGER_OPTIONS = "softcap", "s_aux", "sinks"
"""Options that change the result and that sdpa attention lacks, too."""

_INPUTS = {
    *("self", "hidden_states", "x", "attention_mask", "mask", "position_embeddings", "position_ids", "kwargs"),
    *("cache", "past_key_values", "past_key_value", "layer_past", "cache_position", "use_cache", "cu_seqlens"),
    *("max_seqlen", "rotary_pos_emb", "head_mask", "layer_head_mask", "causal_attention_mask", "output_attentions"),
}
"""Parameter names of self-attention. A module with another one, such as encoder states, may attend to other tokens."""


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention with the arguments and results of transformers' `sdpa_attention_forward`.

    Args:
        module: the attention module; `is_causal` defaults to its attribute, or to True.
        query: `[B, H, N, D]`.
        key, value: `[B, Hkv, M, D]`; H is a multiple of Hkv.
        attention_mask: as `sdpa_attention_forward` takes it.
        dropout, scaling, is_causal, options: as for `sdpa_attention_forward`.

    Returns:
        `[B, N, H, D]`, zeros at padded tokens if the call runs packed, and None.

    Raises:
        NotImplementedError: for soft caps and attention sinks, which sdpa attention ignores.
    """
    for name in _EAGER_OPTIONS:
        if options.get(name) is not None:
            raise NotImplementedError(f'{NAME}: {name} must be None, got a value: set attn_implementation="eager"')
    packing = None
    reason = _why_not(query, key, value, dropout, options)
    if reason is None and attention_mask is not None:
        packing = _packing_of(module, query, key, attention_mask)
        reason = "an attention mask other than padding" if packing is None else None
    if reason is not None:
        if not torch.compiler.is_compiling():
            _log_once(reason)
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
        return result
    q, k, v = (part.transpose(1, 2) for part in (query, key, value))
    if packing is not None:
        return packing.unpack(packing.attend(*map(packing.pack, (q, k, v)), scale=scaling)), None
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal, tokens = bool(is_causal and q.shape[1] > 1), q.shape[1]
    if causal and k.shape[1] > tokens:  # the rest of a static cache is empty
        k, v = k[:, :tokens], v[:, :tokens]
    return rope_attention(q, k, v, causal=causal, scale=scaling), None


def _why_not(query: Tensor, key: Tensor, value: Tensor, dropout: float, options: dict[str, Any]) -> str | None:
    """The reason against a call on the ops, whatever its mask; None if they support it."""
    if dropout:
        return "attention dropout"
    given = [name for name in _OPTIONS if options.get(name) is not None and options[name] is not False]
    if given:
        return ", ".join(given)
    if not dispatches_to("attention", query, after_linear=True, forced=True):
        return f"no kernels for {query.dtype} on {query.device.type}, or a tensor subclass or transform"
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape or query.shape[1] % key.shape[1]:
        return "shapes of queries, keys and values"
    if (query.shape[0], query.shape[3]) != (key.shape[0], key.shape[3]) or not query.dtype == key.dtype == value.dtype:
        return "shapes or dtypes of queries and keys"
    if query.is_cuda and query.shape[3] > MAX_HEAD_DIM:
        return f"heads of more than {MAX_HEAD_DIM} channels"
    return None


@cache
def _log_once(reason: str) -> None:
    _logger.warning("transformers' sdpa attention runs instead of evakernels: %s", reason)


# --- masks of padded keys ---------------------------------------------------------------------------------------------


_packings = WeakTensorKeyDictionary()
"""Version, batch and packing of each mask, which the layers of a model share."""


def _packing_of(module: Any, query: Tensor, key: Tensor, mask: Tensor) -> Packing | None:
    """The packing of a self-attention's mask; None if it isn't one of padded keys, and in compiled code."""
    cls: Any = type(module)
    if torch.compiler.is_compiling() or not _is_self_attention(cls) or mask.dim() != 4 or mask.shape[3] != key.shape[2]:
        return None
    tokens = query.transpose(1, 2)
    if mask.is_inference():  # without a version that shows changes in place
        return read_mask(mask, tokens)
    state = mask._version, tokens.shape[:2]
    packing: Packing | None
    known, packing = _packings.get(mask, (None, None))
    if known != state:
        packing = read_mask(mask, tokens)
        _packings[mask] = state, packing
    return packing


@cache
def _is_self_attention(cls: Any) -> bool:
    """Whether the module's queries and keys are the same tokens, so that padded queries can be left out."""
    return _INPUTS.issuperset(inspect.signature(cls.forward).parameters)


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
