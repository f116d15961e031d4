"""Attention for transformers: `attn_implementation="evakernels"`.

Importing this module registers the name with transformers' `AttentionInterface` and `AttentionMaskInterface`. Masks are
those of "sdpa". Calls with a mask or other options run transformers' sdpa attention. Models that refuse "sdpa" refuse
this name, too.
"""

import inspect
import logging
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
except ImportError as error:
    text = f"evakernels.transformers: transformers must be 4.53 or later ({error}): pip install -U transformers"
    raise type(error)(text, name=error.name) from error

from .dropin._dispatch import dispatches_to
from .ops import rope_attention
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
        `[B, N, H, D]` and None.

    Raises:
        NotImplementedError: for soft caps and attention sinks, which sdpa attention ignores.
    """
    for name in _EAGER_OPTIONS:
        if options.get(name) is not None:
            raise NotImplementedError(f'{NAME}: {name} must be None, got a value: set attn_implementation="eager"')
    reason = _unsupported_reason(query, key, value, dropout, options)
    if reason is None and attention_mask is not None:
        reason = "an attention mask"
    if reason is not None:
        if not torch.compiler.is_compiling():
            _log_once(reason)
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **options
        )
        return result
    q, k, v = (part.transpose(1, 2) for part in (query, key, value))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    causal, tokens = bool(is_causal and q.shape[1] > 1), q.shape[1]
    if causal and k.shape[1] > tokens:  # the rest of a static cache is empty
        k, v = k[:, :tokens], v[:, :tokens]
    return rope_attention(q, k, v, causal=causal, scale=scaling), None


def _unsupported_reason(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, options: dict[str, Any]
) -> str | None:
    """The reason against a call on the ops, whatever its mask; None if they support it."""
    if dropout:
        return "attention dropout"
    names = [name for name in _OPTIONS if options.get(name) is not None and options[name] is not False]
    if names:
        return ", ".join(names)
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


def _refuse_without_sdpa(original: Any) -> Any:
    """A model's choice of its attention that refuses `NAME` where the model refuses "sdpa"."""

    @wraps(original)
    def choose(self: Any, requested_attention: str | None, *args: Any, **options: Any) -> str:
        if requested_attention == NAME:
            try:
                original(self, "sdpa", *args, **options)
            except ValueError as error:
                accepted = f'"eager" for {type(self).__name__}'
                raise ValueError(f'attn_implementation must be {accepted}, got "{NAME}": {error}') from error
        chosen: str = original(self, requested_attention, *args, **options)
        return chosen

    return choose


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, AttentionMaskInterface()["sdpa"])
if hasattr(PreTrainedModel, "get_correct_attn_implementation"):  # since transformers 4.55
    PreTrainedModel.get_correct_attn_implementation = _refuse_without_sdpa(  # type: ignore[method-assign]
        PreTrainedModel.get_correct_attn_implementation
    )
