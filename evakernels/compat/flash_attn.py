"""flash-attn's attention functions on evakernels' ops; flash-attn isn't needed.

    from .flash_attn import flash_attn_func, flash_attn_varlen_func

replaces the import from `flash_attn`. CPUs and float32 are supported, too. Dropout, windows, ALiBi, soft caps, paged
caches, and packed keys with other sequence lengths than the queries raise `NotImplementedError`.
"""

from typing import Any

import torch
from torch import Tensor

from ..ops import _check, packed_attention, rope_attention
from . import missing
from ._attention import check_options, refuse_lengths

Result = Any
"""The output; with `return_attn_probs` a tuple of output, lse and an empty tensor instead of probabilities."""

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
]

__getattr__ = missing(
    __name__,
    {
        "flash_attn_with_kvcache": "use flash_attn_func with more keys than queries",
        "apply_rotary_emb RotaryEmbedding": "use evakernels.rope_attention, which rotates queries and keys",
        "pad_input unpad_input": "use torch.cat and torch.split",
    },
)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """Multi-head attention by `evakernels.rope_attention`.

    Args:
        q: `[B, N, H, D]`; float64, float32, bfloat16 or float16.
        k, v: `[B, M, Hkv, D]` in the dtype of `q`; H is a multiple of Hkv.
        softmax_scale: factor of the scores; `D ** -0.5` by default.
        causal: mask later keys; the last query attends to all keys.
        deterministic: accepted without effect: results are deterministic.
        dropout_p, window_size, softcap, alibi_slopes: must have their defaults.

    Returns:
        `[B, N, H, D]` in the dtype of `q`; with `return_attn_probs` also lse, float32 `[B, H, N]` without gradient, and
        an empty tensor.

    Raises:
        NotImplementedError: for an option that must have its default.
        TypeError, ValueError: as `evakernels.rope_attention`.
    """
    options = {"dropout_p": dropout_p, "window_size": window_size, "softcap": softcap, "alibi_slopes": alibi_slopes}
    check_options("flash_attn_func", **options)
    if not return_attn_probs:
        return rope_attention(q, k, v, causal=causal, scale=softmax_scale)
    return *rope_attention(q, k, v, causal=causal, scale=softmax_scale, return_lse=True), q.new_empty(0)


def flash_attn_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Result:
    """`flash_attn_func` with keys and values in one tensor `[B, M, 2, Hkv, D]`; further arguments as there."""
    return flash_attn_func(q, *_unpack("kv", kv, "[B, N, 2, H, D]"), *args, **kwargs)


def flash_attn_qkvpacked_func(qkv: Tensor, *args: Any, **kwargs: Any) -> Result:
    """`flash_attn_func` of one tensor `[B, N, 3, H, D]`: queries, keys and values; further arguments as there."""
    return flash_attn_func(*_unpack("qkv", qkv, "[B, N, 3, H, D]"), *args, **kwargs)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Result:
    """Attention within packed sequences by `evakernels.packed_attention`.

    Args:
        q: `[T, H, D]`, the tokens of all sequences; dtypes and other options as for `flash_attn_func`.
        k, v: `[T, Hkv, D]` in the dtype of `q`; H is a multiple of Hkv.
        cu_seqlens_q, cu_seqlens_k: one tensor for both, int32 or int64 `[B + 1]`: first token of each sequence and T;
            on a CPU also two tensors with equal values, which a GPU can't compare without synchronisation.
        max_seqlen_q, max_seqlen_k: the same number; maximum sequence length.
        block_table: must be None.

    Returns:
        `[T, H, D]` in the dtype of `q`; with `return_attn_probs` also lse, `[H, T]`, and an empty tensor.

    Raises:
        NotImplementedError: for an option that must have its default, and for different lengths of keys and queries.
        TypeError, ValueError: as `evakernels.packed_attention`.
    """
    name = "flash_attn_varlen_func"
    options = {"dropout_p": dropout_p, "window_size": window_size, "softcap": softcap, "alibi_slopes": alibi_slopes}
    check_options(name, **options, block_table=block_table)
    if max_seqlen_k != max_seqlen_q:
        refuse_lengths(name, f"max_seqlen_k={max_seqlen_k} and max_seqlen_q={max_seqlen_q}")
    on_cpu = cu_seqlens_q.device.type == cu_seqlens_k.device.type == "cpu"
    if cu_seqlens_k is not cu_seqlens_q and not (on_cpu and torch.equal(cu_seqlens_k, cu_seqlens_q)):
        refuse_lengths(name, "another cu_seqlens_k than cu_seqlens_q (pass one tensor for both)")
    shared: dict[str, Any] = {"max_seqlen": max_seqlen_q, "causal": causal, "scale": softmax_scale}
    if not return_attn_probs:
        return packed_attention(q, k, v, cu_seqlens_q, **shared)
    return *packed_attention(q, k, v, cu_seqlens_q, **shared, return_lse=True), q.new_empty(0)


def flash_attn_varlen_kvpacked_func(q: Tensor, kv: Tensor, *args: Any, **kwargs: Any) -> Result:
    """`flash_attn_varlen_func` with keys and values in one tensor `[T, 2, Hkv, D]`; further arguments as there."""
    return flash_attn_varlen_func(q, *_unpack("kv", kv, "[T, 2, H, D]"), *args, **kwargs)


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor, cu_seqlens: Tensor, max_seqlen: int, *args: Any, **kwargs: Any
) -> Result:
    """`flash_attn_varlen_func` of one tensor `[T, 3, H, D]`: queries, keys and values; further arguments as there."""
    q, k, v = _unpack("qkv", qkv, "[T, 3, H, D]")
    return flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, *args, **kwargs)


def _unpack(name: str, packed: Tensor, layout: str) -> Any:
    """Splits `packed` into tensors, one for each letter of its name."""
    _check.floating("flash_attn", **{name: packed})
    if packed.dim() != layout.count(",") + 1 or packed.shape[-3] != len(name):
        raise ValueError(f"flash_attn: {name} must have shape {layout}, got {tuple(packed.shape)}")
    return packed.unbind(-3)
