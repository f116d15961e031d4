"""xformers' `memory_efficient_attention` and its masks on evakernels' ops; xformers isn't needed.

    import evakernels.compat.xformers as xops

replaces `import xformers.ops as xops` for these names. CPUs are supported, too.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor

from ..ops import packed_attention, rope_attention
from . import missing
from ._attention import check_options, refuse_lengths

__all__ = [
    "BlockDiagonalCausalFromBottomRightMask",
    "BlockDiagonalCausalMask",
    "BlockDiagonalMask",
    "LowerTriangularFromBottomRightMask",
    "LowerTriangularMask",
    "memory_efficient_attention",
]

__getattr__ = missing(
    __name__,
    {
        "AttentionBias AttentionMask": "memory_efficient_attention lists the supported masks",
        "AttentionOp MemoryEfficientAttentionCutlassOp MemoryEfficientAttentionFlashAttentionOp": "use "
        "evakernels.use_backend",
        "RMSNorm rms_norm rms_norm_add": "use evakernels.nn.RMSNorm and evakernels.add_rms_norm",
        "SwiGLU swiglu": "use evakernels.nn.SwiGLU(sub_ln=False) or evakernels.swiglu",
        "fmha": "import the masks from evakernels.compat.xformers",
        "index_select_cat": "use torch.cat of index_select",
        "memory_efficient_attention_forward memory_efficient_attention_forward_requires_grad "
        "memory_efficient_attention_partial": "use evakernels.rope_attention(return_lse=True)",
        "rope_padded": "use evakernels.rope_attention, which rotates queries and keys",
        "scaled_index_add": "use torch.Tensor.index_add_",
        "unbind": "use torch.unbind",
    },
)

_CAUSAL = {
    "LowerTriangularMask": True,
    "LowerTriangularFromBottomRightMask": True,
    "BlockDiagonalMask": False,
    "BlockDiagonalCausalMask": True,
    "BlockDiagonalCausalFromBottomRightMask": True,
}
"""Whether a mask is causal, by its class's name, so that xformers' own masks are accepted, too."""


class LowerTriangularMask:
    """xformers' `LowerTriangularMask`: mask later keys; as many keys as queries."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device


class LowerTriangularFromBottomRightMask(LowerTriangularMask):
    """xformers' `LowerTriangularFromBottomRightMask`: mask later keys; the last query attends to all keys."""


class BlockDiagonalMask:
    """xformers' `BlockDiagonalMask`: attention within each packed sequence."""

    _batch_sizes: Sequence[int] | None = None  # DINOv2 sets it

    def __init__(self, q_seqinfo: Any, k_seqinfo: Any) -> None:
        self.q_seqinfo, self.k_seqinfo = q_seqinfo, k_seqinfo

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, *, device: torch.device | None = None
    ) -> Self:
        """The mask of sequences of these lengths; it may be on another device than the queries."""
        infos = []
        for lengths in (q_seqlen, q_seqlen if kv_seqlen is None else kv_seqlen):
            starts = [0, *accumulate(lengths)]
            seqstart = torch.tensor(starts, dtype=torch.int32, device=device)
            infos.append(SimpleNamespace(seqstart=seqstart, seqstart_py=starts, max_seqlen=max(lengths, default=0)))
        return cls(*infos)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """Splits `[1, T, ...]` into sequences `[1, N, ...]`, or into batches of `_batch_sizes` sequences."""
        starts = self.q_seqinfo.seqstart_py
        ends = [0, *accumulate(self._batch_sizes or [1] * (len(starts) - 1))]
        return [tensor[0, starts[a] : starts[b]].unflatten(0, (b - a, -1)) for a, b in pairwise(ends)]


class BlockDiagonalCausalMask(BlockDiagonalMask):
    """xformers' `BlockDiagonalCausalMask`: `BlockDiagonalMask` that masks later keys."""


class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """xformers' `BlockDiagonalCausalFromBottomRightMask`; with as many keys as queries the same mask."""


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """xformers' attention by `evakernels.rope_attention` and `evakernels.packed_attention`.

    Args:
        query: `[B, N, H, K]`, or `[B, N, K]` with one head.
        key, value: the same with M tokens, in the dtype of `query`. H is a multiple of the number of key heads.
        attn_bias: None or a mask, of this module or xformers'. Block-diagonal masks need `B = 1` and as many keys as
            queries in each sequence.
        p, op: must be 0 and None.
        scale: factor of the scores; `K ** -0.5` by default.
        output_dtype: None or the dtype of `query`.

    Returns:
        Contiguous, in the shape and dtype of `query`.

    Raises:
        NotImplementedError: for unsupported options and masks.
        TypeError, ValueError: as `evakernels.rope_attention`.
    """
    name = "memory_efficient_attention"
    check_options(name, p=p, op=op)
    if output_dtype not in (None, query.dtype):
        raise NotImplementedError(f"{name}: output_dtype must be None or {query.dtype} (as query), got {output_dtype}")
    shape = query.shape
    if query.dim() not in (3, 4):
        raise ValueError(f"{name}: query must have shape [B, N, H, K] or [B, N, K], got {tuple(shape)}")
    if query.dim() == key.dim() == value.dim() == 3:
        query, key, value = (tensor.unsqueeze(2) for tensor in (query, key, value))
    mask = type(attn_bias).__name__
    if attn_bias is not None and mask not in _CAUSAL:
        raise NotImplementedError(f"{name}: attn_bias must be None, {', '.join(_CAUSAL)}, got {mask}")
    if not mask.startswith("BlockDiagonal"):
        if mask == "LowerTriangularMask" and query.shape[1] != key.shape[1]:
            refuse_lengths(name, f"key of {key.shape[1]} tokens and query of {query.shape[1]} with a {mask}")
        return rope_attention(query, key, value, causal=attn_bias is not None, scale=scale).view(shape)
    queries = attn_bias.q_seqinfo
    if queries.seqstart_py != attn_bias.k_seqinfo.seqstart_py:
        refuse_lengths(name, f"attn_bias, a {mask}, with other sequences of keys")
    if query.dim() != 4 or len(query) != 1:
        raise ValueError(f"{name}: query must have shape [1, T, H, K], got {tuple(query.shape)}")
    q, k, v = (tensor.flatten(0, 1) for tensor in (query, key, value))
    cu_seqlens = queries.seqstart.to(query.device)
    causal, max_seqlen = _CAUSAL[mask], queries.max_seqlen
    return packed_attention(q, k, v, cu_seqlens, max_seqlen=max_seqlen, causal=causal, scale=scale).view(shape)
