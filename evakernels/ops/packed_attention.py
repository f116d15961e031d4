"""Attention within the sequences of a packed batch."""

from functools import partial
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ..autocast import matmul_inputs
from ..reference import accumulation_dtype, rope_attention
from ..reference import packed_attention as reference
from ..triton import head_reasons
from . import _check
from ._check import token_range
from ._op import define, differentiable
from .rope_attention import (
    check_tables,
    gpu_reasons,
    gradients_fake,
    list_heads,
    refuse_gradients,
    sum_shared_heads,
)


@overload
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    cos: Tensor | None = ...,
    sin: Tensor | None = ...,
    positions: Tensor | None = ...,
    causal: bool = ...,
    interleaved: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
) -> Tensor: ...


@overload
def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    cos: Tensor | None = ...,
    sin: Tensor | None = ...,
    positions: Tensor | None = ...,
    causal: bool = ...,
    interleaved: bool = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def packed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    positions: Tensor | None = None,
    causal: bool = True,
    interleaved: bool = True,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head attention within packed sequences, such as captions of different lengths or images of several sizes.

    Args:
        q: `[T, H, D]`, the tokens of all sequences; may be a view of a packed projection.
        k, v: `[T, Hkv, D]` in the dtype of `q`. H is a multiple of Hkv: query head h uses head h // (H // Hkv).
        cu_seqlens: int32 or int64 `[B + 1]`, from 0 to T: sequence b has the tokens `cu_seqlens[b]` to
            `cu_seqlens[b + 1] - 1`; it may be empty.
        max_seqlen: upper bound of the sequence lengths.
        cos, sin: tables as for `rope_attention`; None for no rotation.
        positions: int64 `[T]`, the table row of each token; -1 for no rotation. None for a token's index in its
            sequence; P is then at least `max_seqlen`.
        causal: mask later keys.
        interleaved, scale, return_lse: as for `rope_attention`.

    Returns:
        `[T, H, D]`, contiguous, in the dtype of `q`. Precision and autocast are as for `rope_attention`. With
        `return_lse` also `[H, T]`, float32 (float64 for float64 input), without gradient.

    Raises:
        TypeError: for a dtype that isn't accepted.
        ValueError: for shapes, devices or options that don't fit together; on a CPU also for values of `cu_seqlens`.
        IndexError: on a CPU, for `positions` outside the table.

    Examples:
        >>> lengths = torch.tensor([5, 77, 12])
        >>> cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
        >>> q, k, v = torch.randn(94, 3, 8, 64).unbind(1)
        >>> evakernels.packed_attention(q, k, v, cu_seqlens, max_seqlen=77).shape
        torch.Size([94, 8, 64])
    """
    args = q, k, v, cu_seqlens, cos, sin, positions, max_seqlen, causal, interleaved, scale
    if return_lse:
        both: tuple[Tensor, Tensor] = _forward.every_output(*args)
        return both[0], both[1].detach()
    out: Tensor = _forward(*args)
    return out


def _check_call(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *rest: Any) -> Any:
    cos, sin, positions, max_seqlen, causal, interleaved, scale = rest
    op = "packed_attention"
    _check.floating(op, q=q, k=k, v=v)
    q, k, v = matmul_inputs(q, k, v)
    _check.heads(op, "[T, H, D]", q, k, v)
    _check.dtypes(op, (torch.int32, torch.int64), cu_seqlens=cu_seqlens)
    _check.same_device(op, q=q, cu_seqlens=cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:  # len would fix a size that a program leaves open
        raise ValueError(f"{op}: cu_seqlens must have shape [B + 1], got {tuple(cu_seqlens.shape)}")
    _check.integer(op, "max_seqlen", max_seqlen, "at least 0")
    _check.scale(op, scale)
    if max_seqlen < 0:
        raise ValueError(f"{op}: max_seqlen must be at least 0, got {max_seqlen}")
    sequences, total = cu_seqlens.shape[0] - 1, q.shape[0]
    if isinstance(total, int) and isinstance(sequences, int) and total > sequences * max_seqlen:
        raise ValueError(
            f"{op}: max_seqlen must be the longest sequence, got {max_seqlen} for {total} tokens in {sequences} of them"
        )
    if positions is not None:
        if cos is None:
            raise ValueError(f"{op}: positions must be None without cos and sin, got {_check.kind(positions)}")
        _check.dtypes(op, (torch.int64,), positions=positions)
        _check.same_device(op, q=q, positions=positions)
        _check.shape(op, "positions", positions, (q.shape[0],), "[T]")
    check_tables(op, q, k, cos, sin)
    if cos is not None and positions is None and (rows := cos.shape[-2]) < max_seqlen:
        raise ValueError(f"{op}: cos must have max_seqlen = {max_seqlen} rows or more, got {rows}")
    options = max_seqlen, causal, interleaved, q.shape[-1] ** -0.5 if scale is None else scale
    return q, k, v, cu_seqlens, cos, sin, positions, *options


# --- ops ------------------------------------------------------------------------------------------------------------


def _forward_fake(q: Tensor, *rest: Any) -> Any:
    lse = q.new_empty(q.shape[1], q.shape[0], dtype=accumulation_dtype(q))
    return torch.empty_like(q, memory_format=torch.contiguous_format), lse


def _check_values(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, *rest: Any) -> None:
    """Only on a CPU: reading values would synchronise another device."""
    op, (cos, _, token_index, max_seqlen, *_) = "packed_attention", rest
    if cos is not None and token_index is not None:
        token_range(op, token_index, cos.shape[-2], lowest=-1, name="positions")
    if cu_seqlens.device.type != "cpu":
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0 or last != q.shape[0]:
        raise ValueError(f"{op}: cu_seqlens must be from 0 to T = {q.shape[0]}, got {first} to {last}")
    if len(cu_seqlens) > 1:
        shortest, longest = (int(bound) for bound in torch.aminmax(cu_seqlens.diff()))
        if shortest < 0 or longest > max_seqlen:
            bounds = f"0 to max_seqlen = {max_seqlen}"
            raise ValueError(f"{op}: lengths in cu_seqlens must be {bounds}, got {shortest} to {longest}")


def _gpu_reasons(*, max_seqlen: int = 0, **tensors: Any) -> list[str]:
    heads = list_heads(tensors)
    return gpu_reasons(heads, min(max_seqlen, len(heads[0])), tensors.get("cos")) if heads[0].dim() == 3 else []


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, cu_seqlens, cos, sin, token_index, *ctx.options = inputs
    out, lse = output
    refuse_gradients("packed_attention", cos, sin)
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, cos, sin, token_index)


def _gradient(ctx: Any, dout: Tensor) -> Any:
    saved = ctx.saved_tensors  # once, as a checkpoint recomputes them at each access
    return sum_shared_heads(saved[1], _backward(dout, *saved, *ctx.options))


_forward = define(
    reference.packed_attention_forward,
    check=_check_call,
    check_values=_check_values,
    fake=_forward_fake,
    decomposition=partial(reference.packed_attention, rope_attention.rope_attention_forward),
    exported=reference.packed_attention_sdpa,
    gpu_reasons=_gpu_reasons,
    triton_reasons=head_reasons,
)
_backward = define(
    reference.packed_attention_backward,
    check_values=lambda dout, q, k, v, out, lse, *rest: _check_values(q, k, v, *rest),
    fake=gradients_fake,
    gpu_reasons=_gpu_reasons,
    triton_reasons=head_reasons,
)
differentiable(_forward, _backward, setup_context=_setup, formula=_gradient, returned=1)
