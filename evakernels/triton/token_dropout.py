"""Token dropout: the gather of the kept patches with position embedding and prefix, and its backward.

Backward inverts the index first, so that each element is written once, without atomics. A program has one position of
all samples, and sums the gradient of its position embedding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tuning import config, entry
from ._launch import dense, device_guard, in_vectors

MAX_BLOCK = 1 << 10
"""Channels of a program."""

_ENTRIES = [
    entry(width=512, ROWS=4, num_warps=4, num_stages=1),
    entry(width=1024, ROWS=4, num_warps=8, num_stages=1),
]
CONFIGS = {80: {"token_dropout_forward": _ENTRIES, "token_dropout_backward": _ENTRIES}}
"""Launch configurations by compute capability; a GPU has those of the highest up to its own."""


@triton.jit(do_not_specialize=["rows", "num_keep", "tokens", "sample_stride", "token_stride"])
def forward_kernel(
    inputs,
    out,
    rows,
    num_keep,
    tokens,
    sample_stride: tl.int64,
    token_stride: tl.int64,
    VECTOR: tl.constexpr,
    PREFIX: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    patches, token_index, prefix, pos_embed = inputs
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    channel = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    exists = row < rows
    inside = channel < WIDTH
    sample = (row // (PREFIX + num_keep)).to(tl.int64)
    place = row % (PREFIX + num_keep)
    in_prefix = exists & (place < PREFIX)
    token = place - PREFIX
    if token_index is not None:
        token = tl.load(token_index + sample * num_keep + token, mask=exists & (place >= PREFIX), other=-1)
    is_patch = exists & (place >= PREFIX) & (token >= 0) & (token < tokens)
    at = (sample * sample_stride + token * token_stride) * VECTOR + channel
    values = tl.load(patches + at, mask=is_patch & inside, other=0.0).to(tl.float32)
    if prefix is not None:
        values += tl.load(prefix + place * WIDTH + channel, mask=in_prefix & inside, other=0.0).to(tl.float32)
    if pos_embed is not None:
        position = tl.where(in_prefix, place, PREFIX + token)
        has_position = in_prefix | is_patch
        values += tl.load(pos_embed + position * WIDTH + channel, mask=has_position & inside, other=0.0).to(tl.float32)
    values = tl.where(in_prefix | is_patch, values, float("nan"))  # for an index out of range
    tl.store(out + row.to(tl.int64) * WIDTH + channel, values.to(out.dtype.element_ty), mask=exists & inside)


@triton.jit(do_not_specialize=["batch", "num_keep", "tokens"])
def backward_kernel(
    dout,
    places,
    outputs,
    batch,
    num_keep,
    tokens,
    PREFIX: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    dpatches, dprefix, dpos_embed = outputs
    position = (tl.program_id(0) + tl.arange(0, 1)).to(tl.int64)[:, None]
    token = position - PREFIX
    channel = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = channel < WIDTH
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, batch, ROWS):
        sample = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        exists = sample < batch
        row = position + tl.zeros_like(sample)
        if places is not None:
            place = tl.load(places + sample * tokens + token, mask=exists & (token >= 0), other=-1)
            row = tl.where(token >= 0, tl.where(place >= 0, PREFIX + place, -1), row)
        at = (sample * (PREFIX + num_keep) + row) * WIDTH + channel
        d = tl.load(dout + at, mask=exists & (row >= 0) & inside, other=0.0)
        if dpatches is not None:
            at = (sample * tokens + token) * WIDTH + channel
            tl.store(dpatches + at, d, mask=exists & (token >= 0) & inside)
        sums += d.to(tl.float32)
    total = tl.sum(sums, 0)[None, :].to(dout.dtype.element_ty)
    if dprefix is not None:
        tl.store(dprefix + position * WIDTH + channel, total, mask=(token < 0) & inside)
    if dpos_embed is not None:
        tl.store(dpos_embed + position * WIDTH + channel, total, mask=inside)


def token_dropout_forward(patches, token_index, prefix, pos_embed):
    batch, tokens, width = patches.shape
    num_keep = tokens if token_index is None else token_index.shape[1]
    num_prefix, dtype = 0 if prefix is None else prefix.shape[0], patches.dtype
    for addend in (prefix, pos_embed):
        dtype = dtype if addend is None else torch.promote_types(dtype, addend.dtype)
    out = patches.new_empty(batch, num_prefix + num_keep, width, dtype=dtype)
    if out.numel() == 0:
        return out
    # A convolution's output is strided along the channels.
    patches = patches if patches.stride(2) == 1 else patches.contiguous()
    rows, block = batch * (num_prefix + num_keep), min(triton.next_power_of_2(width), MAX_BLOCK)
    options = config("token_dropout_forward", {"width": block}, out)
    vector, strides = in_vectors(patches.stride()[:2], patches.element_size())
    with device_guard(patches):
        forward_kernel[(triton.cdiv(rows, options["ROWS"]), triton.cdiv(width, block))](
            (patches, dense(token_index), dense(prefix), dense(pos_embed)),
            *(out, rows, num_keep, tokens, *strides),
            VECTOR=vector,
            PREFIX=num_prefix,
            WIDTH=width,
            BLOCK=block,
            **options,
        )
    return out


def token_dropout_backward(dout, token_index, num_prefix, num_tokens, needs_grad):
    batch, rows, width = dout.shape
    sizes = (batch, num_tokens, width), (num_prefix, width), (num_prefix + num_tokens, width)
    dpatches, dprefix, dpos_embed = (
        dout.new_empty(size if needed else (0,)) for size, needed in zip(sizes, needs_grad, strict=True)
    )
    outputs = tuple(x if x.numel() > 0 else None for x in (dpatches, dprefix, dpos_embed))
    positions = num_prefix + (num_tokens if needs_grad[0] or needs_grad[2] else 0)
    if outputs == (None, None, None):
        return dpatches, dprefix, dpos_embed
    places = None if token_index is None else _places(token_index, num_tokens)
    block = min(triton.next_power_of_2(width), MAX_BLOCK)
    options = config("token_dropout_backward", {"width": block}, dout)
    with device_guard(dout):
        backward_kernel[(positions, triton.cdiv(width, block))](
            *(dout.contiguous(), places, outputs, batch, rows - num_prefix, num_tokens),
            PREFIX=num_prefix,
            WIDTH=width,
            BLOCK=block,
            **options,
        )
    return dpatches, dprefix, dpos_embed


def _places(token_index: Tensor, num_tokens: int) -> Tensor:
    """`[B, N]`: index of each token among the kept ones of its sample, -1 if it was dropped."""
    batch, num_keep = token_index.shape
    in_order = torch.arange(num_keep, device=token_index.device, dtype=torch.int32).expand(batch, num_keep)
    return in_order.new_full((batch, num_tokens), -1).scatter_(1, token_index, in_order)


# --- calls that are timed and compiled for each entry of CONFIGS ------------------------------------------------------


def token_dropout_forward_calls(draw, width):
    patches, token_index = _patches(draw, width)
    _, tokens, width = patches.shape
    yield patches, token_index, draw(1, width), draw(1 + tokens, width)
    yield patches, None, draw(1, width), draw(1 + tokens, width)


def token_dropout_backward_calls(draw, width):
    patches, token_index = _patches(draw, width)
    (_, tokens, width), num_keep = patches.shape, token_index.shape[1]
    yield draw(draw.batch, 1 + num_keep, width), token_index, 1, tokens, (True, True, True)
    yield draw(draw.batch, num_keep, width), token_index, 0, tokens, (True, False, False)
    yield draw(draw.batch, 1 + tokens, width), None, 1, tokens, (False, True, True)


def _patches(draw, width):
    """Patches, and an index of half of them."""
    width = 3 * width // 4
    tokens = draw.elements // draw.batch // width
    token_index = torch.rand(draw.batch, tokens, device=draw.device).argsort(1)[:, : tokens // 2].sort(1).values
    return draw(draw.batch, tokens, width), token_index
