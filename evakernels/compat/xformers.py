"""xformers' attention and SwiGLU, with its signatures and state, without xformers.

    import evakernels.compat.xformers as xops

in the place of `import xformers.ops as xops` is the whole change for the names below. All of it also runs on a CPU.
What the ops don't serve is a `NotImplementedError` that says what is accepted.
"""

from typing import Any

import torch
from torch import Tensor, nn

from evakernels.compat._attention import attend, attend_packed, check_options, refuse_lengths
from evakernels.nn import Linear, linear
from evakernels.ops import swiglu as gated

__all__ = ["LowerTriangularMask", "SwiGLU", "memory_efficient_attention", "swiglu"]

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
        flat = query.flatten(2, 3), _shared(key), _shared(value)
        out: Tensor = memory_efficient_attention(*flat, attn_bias, p, scale).unflatten(2, query.shape[2:4])
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


def _shared(keys: Tensor) -> Tensor:
    """`[B, M, G, H, K]` to the heads of keys that there are: G, where H is an expanded one."""
    return keys[:, :, :, 0] if keys.stride(3) == 0 or keys.shape[3] == 1 else keys.flatten(2, 3)


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
