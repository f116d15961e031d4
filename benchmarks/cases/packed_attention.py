"""Causal attention within packed captions, as in the text tower: no padding between them."""

import inspect
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import evakernels
from benchmarks.cases._inputs import captions
from benchmarks.cases.rope_attention import compile_flex
from benchmarks.operation import Cost, Draw, Function, Inputs, Operation, Work, peer, register
from benchmarks.shapes import Shape
from evaclip.errors import UserError

NAME = "packed_attention"

_SHAPES = {
    "cpu": ("eva02-b16:text b8", "eva02-b16:text b64"),
    "cuda": ("eva02-b16:text b512", "eva02-l14:text b256", "eva02-l14:text b1024", "eva-18b:text b256"),
}


def lengths_of(shape: Shape) -> Tensor:
    """Tokens of each caption up to its end, int64 `[B]`; the captions repeat, so that the cost is known.

    Raises `UserError` for a shape of the vision tower.
    """
    if shape.tower != "text":
        raise UserError(f"{NAME} works on captions, and {shape.name!r} has none; expected a text shape")
    if not shape.model:
        return torch.full((shape.batch,), shape.tokens)
    known = captions(shape.config.text.context_length).argmax(1) + 1
    return known[torch.arange(shape.batch) % len(known)]


def _inputs(shape: Shape, draw: Draw) -> Inputs:
    """q, k and v `[T, H, D]`, views of one packed projection; the captions' starts, and the largest length."""
    lengths = lengths_of(shape)
    packed = draw.normal(int(lengths.sum()), 3, shape.heads, shape.head_dim)
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0)).to(draw.device, torch.int32)
    q, k, v = packed.unbind(1)
    return {"q": q, "k": k, "v": v, "cu_seqlens": cu_seqlens, "max_seqlen": int(lengths.max())}


def _work(shape: Shape, itemsize: int) -> Work:
    """The cost of `causal_attention`, for captions of these lengths."""
    lengths = lengths_of(shape)
    product = float(lengths.square().sum()) * shape.heads * shape.head_dim
    unit = float(lengths.sum()) * shape.heads * shape.head_dim * itemsize
    return Work(Cost(2 * product, 4 * unit), Cost(5 * product, 8 * unit))


def _eager(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """In a grid with padding behind the captions, which causal attention doesn't see."""
    batch, tokens = len(cu_seqlens) - 1, torch.arange(len(q), device=q.device)
    caption = torch.searchsorted(cu_seqlens[1:], tokens, right=True)
    cell = caption * max_seqlen + tokens - cu_seqlens[caption]

    def spread(x: Tensor) -> Tensor:
        grid = x.new_zeros(batch * max_seqlen, *x.shape[1:]).index_copy(0, cell, x)
        return grid.view(batch, max_seqlen, *x.shape[1:]).transpose(1, 2)

    out = F.scaled_dot_product_attention(spread(q), spread(k), spread(v), is_causal=True)
    return out.transpose(1, 2).flatten(0, 1)[cell]


register(
    Operation(
        name=NAME,
        summary="causal attention of captions without padding between them",
        inputs=_inputs,
        eager=_eager,
        ours=evakernels.packed_attention,
        work=_work,
        shapes=_SHAPES,
        raw=lambda captions, tokens, heads, head_dim: Shape(
            batch=captions, tokens=tokens, heads=heads, head_dim=head_dim, tower="text"
        ),
        small="1x4x1x64",
        gradients=("q", "k", "v"),
        registered="packed_attention_forward",
    )
)


@peer(NAME, "torch varlen", devices=("cuda",))
def varlen(shape: Shape) -> Function:
    """PyTorch's own attention of packed sequences, on FlashAttention."""
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 asks for is_causal, later versions for a window.
    has_flag = "is_causal" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"is_causal": True} if has_flag else {"window_size": (-1, 0)}

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        out = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **causal)
        assert isinstance(out, Tensor)  # not a tuple: no log-sum-exp was asked for
        return out

    return attend


@peer(NAME, "FlexAttention", devices=("cuda",))
def flex(shape: Shape) -> Function:
    """PyTorch's FlexAttention, compiled, with one block mask for these captions."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    lengths = lengths_of(shape)

    @cache
    def mask(device: torch.device) -> BlockMask:
        caption = torch.arange(len(lengths)).repeat_interleave(lengths).to(device)

        def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (caption[query] == caption[key])

        return create_block_mask(sees, None, None, len(caption), len(caption), device=device)

    compiled_flex = compile_flex()

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        out: Tensor = compiled_flex(q=q, k=k, v=v, block_mask=mask(q.device))
        return out[0].transpose(0, 1).contiguous()

    return attend


@peer(NAME, package="flash-attn", devices=("cuda",))
def flash_attn(shape: Shape) -> Function:
    """FlashAttention-2."""
    from flash_attn import flash_attn_varlen_func

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        out: Tensor = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, causal=True)
        return out

    return attend


@peer(NAME, package="xformers", devices=("cuda",))
def xformers(shape: Shape) -> Function:
    """xFormers, with the lengths in its mask."""
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    mask = BlockDiagonalCausalMask.from_seqlens(lengths_of(shape).tolist())

    def attend(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
        out: Tensor = memory_efficient_attention(q[None], k[None], v[None], attn_bias=mask)
        return out[0]

    return attend
