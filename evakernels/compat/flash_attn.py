"""flash-attn's functions, with its signatures and layouts, without flash-attn.

    from evakernels.compat.flash_attn import flash_attn_func, flash_attn_varlen_func

in the place of `from flash_attn import ...` is the whole change. All of it also runs on a CPU and in float32. What the
ops don't serve is a `NotImplementedError` that says what is accepted: dropout, windows, ALiBi, a cap on scores, paged
caches, and packed keys that lie otherwise than the queries.
"""

from typing import Any

import torch
from torch import Tensor

from evakernels.compat._attention import attend, attend_packed, check_options, refuse_lengths
from evakernels.compat._missing import missing

Result = Any  # a union would have every caller narrow it
"""The output; with `return_attn_probs` also lse, and in the place of probabilities a tensor of no elements."""

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
        "flash_attn_with_kvcache": "there is no cache; flash_attn_func takes more keys than queries",
        "apply_rotary_emb RotaryEmbedding": "evakernels.rope_attention rotates queries and keys inside the attention",
        "pad_input unpad_input": "torch.cat packs sequences, and torch.split gives them back",
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
    """Multi-head attention, by `evakernels.rope_attention` without a rotation.

    Args:
        q: `[B, N, H, D]`; float64, float32, bfloat16 or float16.
        k, v: `[B, M, Hkv, D]` in the dtype of `q`; H is a multiple of Hkv.
        softmax_scale: factor of the scores; `D ** -0.5` by default.
        causal: a query sees no later key; the last query sees all.
        return_attn_probs: whether to return lse, `[B, H, N]` in float32, too, without a gradient. Behind it stands, as
            of flash-attn without dropout, an empty tensor in the place of probabilities.
        deterministic: accepted; two runs give the same bits, whatever it is.
        dropout_p, window_size, softcap, alibi_slopes: not offered, so their defaults.

    Returns:
        `[B, N, H, D]` in the dtype of `q`; with `return_attn_probs` three tensors.

    Raises:
        NotImplementedError: for what isn't offered.
        TypeError, ValueError: as `evakernels.rope_attention`.
    """
    options = {"dropout_p": dropout_p, "window_size": window_size, "softcap": softcap, "alibi_slopes": alibi_slopes}
    return _attend("flash_attn_func", {"q": q, "k": k, "v": v}, options, softmax_scale, causal, return_attn_probs)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` with keys and values in one tensor `[B, M, 2, Hkv, D]`."""
    options = {"dropout_p": dropout_p, "window_size": window_size, "softcap": softcap, "alibi_slopes": alibi_slopes}
    return _attend("flash_attn_kvpacked_func", {"q": q, "kv": kv}, options, softmax_scale, causal, return_attn_probs)


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_func` of one tensor `[B, N, 3, H, D]`: queries, keys and values."""
    options = {"dropout_p": dropout_p, "window_size": window_size, "softcap": softcap, "alibi_slopes": alibi_slopes}
    return _attend("flash_attn_qkvpacked_func", {"qkv": qkv}, options, softmax_scale, causal, return_attn_probs)


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
    """Attention of sequences that lie one behind the other, by `evakernels.packed_attention`.

    Args:
        q: `[T, H, D]`, the tokens of all sequences.
        k, v: `[T, Hkv, D]` in the dtype of `q`; H is a multiple of Hkv.
        cu_seqlens_q, cu_seqlens_k: int32 or int64 `[B + 1]`, where sequences begin and the last one ends. Both are the
            same tensor; on a CPU also another with the same numbers, which elsewhere the host would have to wait for.
        max_seqlen_q, max_seqlen_k: the same number; no sequence is longer.
        block_table: not offered, so None. The others are as `flash_attn_func` has them.

    Returns:
        `[T, H, D]` in the dtype of `q`; with `return_attn_probs` also lse, `[H, T]`, and an empty tensor.

    Raises:
        NotImplementedError: for what isn't offered, and for keys that lie otherwise than queries.
        TypeError, ValueError: as `evakernels.packed_attention`.
    """
    options = {"dropout_p": dropout_p, "window_size": window_size, "softcap": softcap, "alibi_slopes": alibi_slopes}
    options["block_table"] = block_table
    where = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return _attend(
        "flash_attn_varlen_func", {"q": q, "k": k, "v": v}, options, softmax_scale, causal, return_attn_probs, where
    )


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
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
) -> Result:
    """`flash_attn_varlen_func` with keys and values in one tensor `[T, 2, Hkv, D]`."""
    options = {"dropout_p": dropout_p, "window_size": window_size, "softcap": softcap, "alibi_slopes": alibi_slopes}
    where = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
    return _attend(
        "flash_attn_varlen_kvpacked_func", {"q": q, "kv": kv}, options, softmax_scale, causal, return_attn_probs, where
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Result:
    """`flash_attn_varlen_func` of one tensor `[T, 3, H, D]`: queries, keys and values."""
    options = {"dropout_p": dropout_p, "window_size": window_size, "softcap": softcap, "alibi_slopes": alibi_slopes}
    where = cu_seqlens, cu_seqlens, max_seqlen, max_seqlen
    return _attend(
        "flash_attn_varlen_qkvpacked_func", {"qkv": qkv}, options, softmax_scale, causal, return_attn_probs, where
    )


def _attend(
    function: str,
    given: dict[str, Tensor],
    options: dict[str, Any],
    scale: float | None,
    causal: bool,
    return_lse: bool,
    where: tuple[Tensor, Tensor, int, int] | None = None,
) -> Result:
    """Attention of tensors or, under a name such as `kv`, of some in one; `where` is of sequences that are packed."""
    check_options(function, **options)
    qkv: dict[str, Tensor] = {}
    for names, tensor in given.items():
        layout = f"[{'B, N' if where is None else 'T'}, {len(names)}, H, D]"
        if len(names) > 1 and (tensor.dim() != layout.count(",") + 1 or tensor.shape[-3] != len(names)):
            raise ValueError(f"{function}: {names} has shape {tuple(tensor.shape)}; expected {layout}")
        qkv.update(zip(names, tensor.unbind(-3) if len(names) > 1 else [tensor], strict=True))
    if where is None:
        out, lse = attend(function, qkv, causal=causal, scale=scale, return_lse=return_lse)
    else:
        starts, others, longest, other = where
        if other != longest:
            refuse_lengths(function, f"max_seqlen_k is {other} and max_seqlen_q is {longest}")
        if others is not starts and not _are_same(starts, others):
            found = "cu_seqlens_k isn't cu_seqlens_q (pass one tensor for both: on a GPU none is compared)"
            refuse_lengths(function, found)
        out, lse = attend_packed(function, qkv, starts, longest, causal=causal, scale=scale, return_lse=return_lse)
    return out if lse is None else (out, lse, out.new_empty(0))


def _are_same(ours: Tensor, theirs: Tensor) -> bool:
    return ours.device.type == theirs.device.type == "cpu" and torch.equal(ours, theirs)
