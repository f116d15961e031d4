"""xformers' attention and SwiGLU, with its signatures and state, without xformers.

    import evakernels.compat.xformers as xops

in the place of `import xformers.ops as xops` is the whole change for the names below, which are enough for DINOv2. All
of it also runs on a CPU.
What the ops don't serve is a `NotImplementedError` that says what is accepted.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn

from evakernels.compat._attention import attend, attend_packed, check_options, refuse_lengths
from evakernels.compat._missing import missing
from evakernels.nn import Linear, linear
from evakernels.ops import swiglu as gated

__all__ = [
    "BlockDiagonalMask",
    "LowerTriangularMask",
    "SwiGLU",
    "fmha",
    "index_select_cat",
    "memory_efficient_attention",
    "scaled_index_add",
    "swiglu",
    "unbind",
]

__getattr__ = missing(
    __name__,
    {
        "RMSNorm rms_norm rms_norm_add": "evakernels.nn.RMSNorm and evakernels.add_rms_norm take their place",
        "rope_padded": "evakernels.rope_attention rotates queries and keys inside the attention",
        "AttentionBias AttentionMask": "memory_efficient_attention names the masks that it takes",
        "memory_efficient_attention_forward memory_efficient_attention_forward_requires_grad "
        "memory_efficient_attention_partial": "evakernels.rope_attention(return_lse=True) returns lse",
        "AttentionOp MemoryEfficientAttentionCutlassOp MemoryEfficientAttentionFlashAttentionOp": "evakernels."
        "use_backend chooses kernels",
    },
)

_DENSE = ("LowerTriangularMask", "LowerTriangularFromBottomRightMask")
_PACKED = {
    "BlockDiagonalMask": False,
    "BlockDiagonalCausalMask": True,
    "BlockDiagonalCausalFromBottomRightMask": True,
}


class LowerTriangularMask:
    """xformers' `LowerTriangularMask`: a query sees no later key."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device


class BlockDiagonalMask:
    """xformers' `BlockDiagonalMask`: of sequences that lie one behind the other each sees itself."""

    _batch_sizes: Sequence[int] | None = None  # DINOv2 sets it

    def __init__(self, q_seqinfo: Any, k_seqinfo: Any) -> None:
        self.q_seqinfo, self.k_seqinfo = q_seqinfo, k_seqinfo

    @classmethod
    def from_seqlens(
        cls, q_seqlen: Sequence[int], kv_seqlen: Sequence[int] | None = None, *, device: torch.device | None = None
    ) -> Self:
        """The mask of sequences of these lengths; without a device it fits queries on any."""
        infos = []
        for lengths in (q_seqlen, q_seqlen if kv_seqlen is None else kv_seqlen):
            starts = [0, *accumulate(lengths)]
            seqstart = torch.tensor(starts, dtype=torch.int32, device=device)
            infos.append(SimpleNamespace(seqstart=seqstart, seqstart_py=starts, max_seqlen=max(lengths, default=0)))
        return cls(*infos)

    def split(self, tensor: Tensor) -> list[Tensor]:
        """`[1, T, ...]` to the sequences, `[1, N, ...]` each; as many as `_batch_sizes` says in one batch."""
        starts = self.q_seqinfo.seqstart_py
        ends = [0, *accumulate(self._batch_sizes or [1] * (len(starts) - 1))]
        return [tensor[0, starts[a] : starts[b]].unflatten(0, (b - a, -1)) for a, b in pairwise(ends)]


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
    """xformers' attention, by `evakernels.rope_attention` without a rotation and `evakernels.packed_attention`.

    Args:
        query: `[B, N, H, K]`; `[B, N, K]` with one head; or `[B, N, G, H, K]` with G groups of heads.
        key, value: the same with M tokens, in the dtype of `query`. Of groups each has one head of keys, expanded to H.
        attn_bias: None; a `LowerTriangularMask`, this module's or xformers'; or xformers' `BlockDiagonalMask` or
            `BlockDiagonalCausalMask` of as many keys as queries, with `B = 1`. With another number of keys the causal
            mask is `LowerTriangularFromBottomRightMask`.
        p: of dropout; not offered, so 0.
        scale: factor of the scores; `K ** -0.5` by default.
        op: xformers' kernels; not offered, so None.
        output_dtype: None, or that of `query`.

    Returns:
        the shape of `query`, contiguous, in its dtype.

    Raises:
        NotImplementedError: for what isn't offered: also other masks, tensors as masks, and masks of packed sequences
            whose keys lie otherwise than the queries.
        TypeError, ValueError: as `evakernels.rope_attention`.
    """
    name = "memory_efficient_attention"
    check_options(name, p=p, op=op)
    if output_dtype not in (None, query.dtype):
        raise NotImplementedError(f"{name}: output_dtype is {output_dtype}; accepted: None or {query.dtype} (as query)")
    if query.dim() == key.dim() == value.dim() == 3:
        query, key, value = (tensor.unsqueeze(2) for tensor in (query, key, value))
        return memory_efficient_attention(query, key, value, attn_bias, p, scale).squeeze(2)
    if query.dim() == key.dim() == value.dim() == 5:
        flat, (key, value) = query.flatten(2, 3), _shared(key, value)
        out: Tensor = memory_efficient_attention(flat, key, value, attn_bias, p, scale).unflatten(2, query.shape[2:4])
        return out
    qkv, mask = {"query": query, "key": key, "value": value}, type(attn_bias).__name__
    if mask == "LowerTriangularMask" and query.shape[1] != key.shape[1]:
        refuse_lengths(name, f"key has {key.shape[1]} tokens and query has {query.shape[1]} under a {mask}")
    if attn_bias is None or mask in _DENSE:
        return attend(name, qkv, causal=attn_bias is not None, scale=scale)[0]
    if mask not in _PACKED:
        accepted = ", ".join((*_DENSE, *_PACKED))
        raise NotImplementedError(f"{name}: attn_bias is a {mask}; accepted: None, {accepted}")
    queries, keys = attn_bias.q_seqinfo, attn_bias.k_seqinfo
    if queries.seqstart_py != keys.seqstart_py:
        refuse_lengths(name, f"attn_bias is a {mask} of keys in other places than the queries")
    if len(query) != 1:
        raise ValueError(f"{name}: query has shape {tuple(query.shape)}; expected [1, T, H, K] with a {mask}")
    qkv = {part: tensor.flatten(0, 1) for part, tensor in qkv.items()}
    cu_seqlens = queries.seqstart.to(query.device)  # a mask is often made before its queries are on their device
    packed, _ = attend_packed(name, qkv, cu_seqlens, queries.max_seqlen, causal=_PACKED[mask], scale=scale)
    return packed.unsqueeze(0)


def _shared(*tensors: Tensor) -> list[Tensor]:
    """Keys and values `[B, M, G, H, K]` to the heads that there are: G, where H is an expanded one in both."""
    if all(tensor.stride(3) == 0 or tensor.shape[3] == 1 for tensor in tensors):
        return [tensor[:, :, :, 0] for tensor in tensors]
    return [tensor.flatten(2, 3) for tensor in tensors]


fmha = SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask, memory_efficient_attention=memory_efficient_attention)
"""What is served of xformers' module of this name."""


def unbind(x: Tensor, dim: int) -> tuple[Tensor, ...]:
    """`torch.unbind`; in xformers its gradient needs no copy where those of the parts lie side by side."""
    return x.unbind(dim)


def index_select_cat(sources: Sequence[Tensor], indices: Sequence[Tensor]) -> Tensor:
    """The rows `indices[i]` of each `[N_i, D_i]` of `sources`, one behind the other in one dimension."""
    return torch.cat([x.index_select(0, index).flatten() for x, index in zip(sources, indices, strict=True)])


def scaled_index_add(
    input: Tensor, index: Tensor, source: Tensor, scaling: Tensor | None = None, alpha: float = 1.0
) -> Tensor:
    """Adds `alpha * scaling * source`, `[n, M, D]`, to the rows `index` of `input`, `[B, M, D]`, in place."""
    return input.index_add_(0, index, source if scaling is None else scaling * source, alpha=alpha)


def swiglu(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    w3: Tensor,
    b3: Tensor | None,
    *,
    op: Any = None,
) -> Tensor:
    """xformers' SwiGLU MLP, by `evakernels.swiglu`: `linear(silu(linear(x, w1, b1)) * linear(x, w2, b2), w3, b3)`.

    Args:
        x: `[..., in]`.
        w1, w2: `[hidden, in]`.
        w3: `[out, hidden]`.
        b1, b2, b3: biases, or None.
        op: xformers' kernels; not offered, so None.

    Returns:
        `[..., out]`.
    """
    check_options("swiglu", op=op)
    return linear(gated(linear(x, w1, b1), linear(x, w2, b2)), w3, b3)


class SwiGLU(nn.Module):
    """xformers' `SwiGLU`, with its state dict: `w12` and `w3`, or `w1`, `w2` and `w3`.

    Args:
        in_features: channels of the input.
        hidden_features: channels of the gated product.
        out_features: channels of the output; by default those of the input.
        bias: whether the projections have biases.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = True,
        *,
        _pack_weights: bool = True,
    ) -> None:
        super().__init__()
        self.in_features, self.hidden_features = in_features, hidden_features
        self.out_features = out_features or in_features
        if _pack_weights:
            self.w12: Linear | None = Linear(in_features, 2 * hidden_features, bias=bias)
        else:
            self.w12 = None
            self.w1 = Linear(in_features, hidden_features, bias=bias)
            self.w2 = Linear(in_features, hidden_features, bias=bias)
        self.w3 = Linear(hidden_features, self.out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        gate, up = (self.w1(x), self.w2(x)) if self.w12 is None else self.w12(x).chunk(2, -1)
        y: Tensor = self.w3(gated(gate, up))
        return y
