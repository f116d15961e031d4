"""Calls of each op at the sizes of a configuration: what the search times, and what the tests compile.

A function here is named like its op, takes the sizes that the op's configurations are looked up by, and yields the
arguments of calls. The first is the one that models make, with all that may be present; the others differ in what is
absent. Tensors are those of a large batch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ELEMENTS = 1 << 26
"""Of an activation: more than any GPU's L2 cache holds."""

BATCH, HEADS, EPS = 64, 16, 1e-6
BETAS_AND_EPS = 0.9, 0.98, EPS

PAIRS = 1 << 15
"""Of image and text: the batch of a contrastive loss."""


@dataclass(frozen=True)
class Draw:
    """Draws the tensors of a call; on the device `meta` they take no memory."""

    device: str
    dtype: torch.dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def statistic(self, *shape: int) -> Tensor:
        return torch.rand(shape, device=self.device) + 0.5


def calls(op: str, shape: dict[str, int], draw: Draw) -> Iterator[tuple[Any, ...]]:
    """The arguments of the calls of `op` at these sizes."""
    sizes = {name: size for name, size in shape.items() if name != "itemsize"}
    function: Callable[..., Iterator[tuple[Any, ...]]] = globals()[op]
    return function(draw, **sizes)


def swiglu_forward(draw: Draw, width: int) -> Iterator[tuple[Any, ...]]:
    gate, up, weight, bias = _swiglu(draw, width)
    yield gate, up, weight, bias, EPS
    yield gate, up, weight, None, EPS
    yield gate, up, None, None, EPS


def swiglu_backward(draw: Draw, width: int) -> Iterator[tuple[Any, ...]]:
    gate, up, weight, _ = _swiglu(draw, width)
    dout, mean, rstd = draw(*gate.shape), draw.statistic(len(gate)), draw.statistic(len(gate))
    yield dout, gate, up, weight, mean, rstd, (True, True)
    yield dout, gate, up, None, mean[:0], rstd[:0], (False, False)


def _swiglu(draw: Draw, width: int) -> tuple[Tensor, ...]:
    """Halves of a packed projection, whose rows begin at any even address, as at the 2730 channels of EVA02-L."""
    width = 2 * (width // 3)
    gate, up = draw(ELEMENTS // width, 2 * width).chunk(2, -1)
    return gate, up, draw(width), draw(width)


def contrastive_forward(draw: Draw, depth: int) -> Iterator[tuple[Any, ...]]:
    image, text, scale, _ = _pairs(draw, depth)
    yield image, text, scale, 0


def contrastive_backward(draw: Draw, depth: int) -> Iterator[tuple[Any, ...]]:
    image, text, scale, _ = _pairs(draw, depth)
    of_row = draw.statistic(len(image))
    yield of_row, of_row, of_row, image, text, scale, of_row, of_row, 0, (True, True)


contrastive_kept_forward = contrastive_forward


def contrastive_kept_backward(draw: Draw, depth: int) -> Iterator[tuple[Any, ...]]:
    for *inputs, offset, wanted in contrastive_backward(draw, depth):
        yield *inputs, draw.statistic(PAIRS, PAIRS), offset, wanted


def siglip_forward(draw: Draw, depth: int) -> Iterator[tuple[Any, ...]]:
    yield *_pairs(draw, depth), 0, (True, True)


def siglip_value(draw: Draw, depth: int) -> Iterator[tuple[Any, ...]]:
    yield *_pairs(draw, depth), 0


def _pairs(draw: Draw, depth: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return draw(PAIRS, depth), draw(PAIRS, depth), draw.statistic(), draw.statistic()


def layer_norm_forward(draw: Draw, width: int) -> Iterator[tuple[Any, ...]]:
    x, _, weight, bias, _, _ = _norm(draw, width)
    yield x, weight, bias, EPS, False
    yield x, weight, None, EPS, True
    yield x, None, None, EPS, False
    yield x.float(), weight.float(), bias.float(), EPS, False, draw.dtype  # of a float32 stream


def layer_norm_backward(draw: Draw, width: int) -> Iterator[tuple[Any, ...]]:
    x, dy, weight, _, mean, rstd = *_norm(draw, width)[:4], *_statistics(draw, width)
    yield dy, x, weight, mean, rstd, False, (True, True)
    yield dy, x, weight, mean[:0], rstd, True, (True, False)
    yield dy, x, None, mean, rstd, False, (False, False)
    yield dy, x.float(), weight.float(), mean, rstd, False, (True, True)


def add_layer_norm_forward(draw: Draw, width: int) -> Iterator[tuple[Any, ...]]:
    residual, branch, weight, bias, layer_scale, row_scale = _norm(draw, width)
    yield residual, branch, weight, bias, layer_scale, row_scale, EPS, False
    yield residual, branch, weight, bias, None, None, EPS, False
    yield residual, branch, weight, None, None, None, EPS, True


def add_layer_norm_backward(draw: Draw, width: int) -> Iterator[tuple[Any, ...]]:
    x, branch, weight, _, layer_scale, row_scale = _norm(draw, width)
    dy, dx, mean, rstd = draw(*x.shape), draw(*x.shape), *_statistics(draw, width)
    yield dy, dx, x, branch, weight, layer_scale, row_scale, mean, rstd, False, (True, True, True, True)
    yield dy, dx, x, branch[:0], weight, None, None, mean, rstd, False, (False, True, True, False)
    yield dy, dx, x, branch[:0], weight, None, None, mean[:0], rstd, True, (False, True, False, False)


layer_norm_add_forward = add_layer_norm_forward


def layer_norm_add_backward(draw: Draw, width: int) -> Iterator[tuple[Any, ...]]:
    dx, branch, weight, bias, layer_scale, row_scale = _norm(draw, width)
    mean, rstd = _statistics(draw, width)
    yield dx, branch, weight, bias, layer_scale, row_scale, mean, rstd, False, (True, True, True)
    yield dx, branch, weight, bias, None, None, mean, rstd, False, (True, True, False)
    yield dx, branch, weight, None, None, None, mean[:0], rstd, True, (True, False, False)


def token_dropout_forward(draw: Draw, width: int) -> Iterator[tuple[Any, ...]]:
    patches, token_index = _patches(draw, width)
    _, tokens, width = patches.shape
    yield patches, token_index, draw(1, width), draw(1 + tokens, width)
    yield patches, None, draw(1, width), draw(1 + tokens, width)


def token_dropout_backward(draw: Draw, width: int) -> Iterator[tuple[Any, ...]]:
    patches, token_index = _patches(draw, width)
    (_, tokens, width), kept = patches.shape, token_index.shape[1]
    yield draw(BATCH, 1 + kept, width), token_index, 1, tokens, (True, True, True)
    yield draw(BATCH, kept, width), token_index, 0, tokens, (True, False, False)
    yield draw(BATCH, 1 + tokens, width), None, 1, tokens, (False, True, True)


def _patches(draw: Draw, width: int) -> tuple[Tensor, Tensor]:
    """Patches, and the half of them that is kept."""
    width = 3 * width // 4
    tokens = ELEMENTS // BATCH // width
    token_index = torch.rand(BATCH, tokens, device=draw.device).argsort(1)[:, : tokens // 2].sort(1).values
    return draw(BATCH, tokens, width), token_index


def _norm(draw: Draw, width: int) -> tuple[Any, ...]:
    """Two activations, weight, bias, layer_scale and row_scale; width as the 768 channels of EVA02-B."""
    width = 3 * width // 4
    size = BATCH, ELEMENTS // BATCH // width, width
    return draw(*size), draw(*size), draw(width), draw(width), draw(width), draw.statistic(BATCH)


def _statistics(draw: Draw, width: int) -> tuple[Tensor, Tensor]:
    size = BATCH, ELEMENTS // BATCH // (3 * width // 4)
    return draw.statistic(*size), draw.statistic(*size)


def rope_attention_forward(draw: Draw, head_dim: int, tokens: int) -> Iterator[tuple[Any, ...]]:
    qkv, tables = _heads(draw, head_dim, tokens)
    yield *qkv, *tables, None, 1, False, True, head_dim**-0.5
    yield *qkv, None, None, None, 0, True, True, head_dim**-0.5
    of_patches = [table[4:] for table in tables]  # behind a class token and four registers
    yield *qkv, *of_patches, None, 5, True, True, head_dim**-0.5
    q, k, v = qkv
    yield q, k[:, 1:], v[:, 1:], None, None, None, 0, True, True, head_dim**-0.5  # a query may see no key


def rope_attention_backward(draw: Draw, head_dim: int, tokens: int) -> Iterator[tuple[Any, ...]]:
    for q, k, v, *rest in rope_attention_forward(draw, head_dim, tokens):
        lse = draw.statistic(q.shape[0], HEADS, tokens)
        yield draw(*q.shape), q, k, v, draw(*q.shape), lse, *rest


def packed_attention_forward(draw: Draw, head_dim: int, tokens: int) -> Iterator[tuple[Any, ...]]:
    (q, k, v), tables = _heads(draw, head_dim, tokens)
    cu_seqlens = torch.arange(0, q.shape[0] * tokens + 1, tokens, device=draw.device)
    qkv = [x.flatten(0, 1) for x in (q, k, v)]
    options = tokens, True, True, head_dim**-0.5
    yield *qkv, cu_seqlens, None, None, None, *options
    index = torch.zeros(len(qkv[0]), dtype=torch.int64, device=draw.device)
    yield *qkv, cu_seqlens, *tables, index, *options


def packed_attention_backward(draw: Draw, head_dim: int, tokens: int) -> Iterator[tuple[Any, ...]]:
    for q, k, v, *rest in packed_attention_forward(draw, head_dim, tokens):
        yield draw(*q.shape), q, k, v, draw(*q.shape), draw.statistic(HEADS, len(q)), *rest


def adamw_update(draw: Draw) -> Iterator[tuple[Any, ...]]:
    tensors, numbers, flags, rounding = _optimizer(draw)
    rates = numbers, numbers
    yield *tensors, *rates, BETAS_AND_EPS, *flags, *rounding
    yield *tensors, *rates, BETAS_AND_EPS, None, None, [], []


def lamb_update(draw: Draw) -> Iterator[tuple[Any, ...]]:
    tensors, numbers, flags, _ = _optimizer(draw)
    yield *tensors, numbers, BETAS_AND_EPS, True, *flags
    yield *tensors, numbers, BETAS_AND_EPS, False, None, None


def lamb_apply(draw: Draw) -> Iterator[tuple[Any, ...]]:
    (params, _, *state), numbers, (_, found_inf), rounding = _optimizer(draw)
    arguments = params, *state, draw.statistic(len(params), 2), numbers, numbers, BETAS_AND_EPS
    yield *arguments, True, found_inf, *rounding
    yield *arguments, False, None, [], []


def _optimizer(draw: Draw) -> tuple[Any, ...]:
    """Tensors of a matrix and a bias, float32 moments; rates; flags; and, of bfloat16, seeds and first elements."""
    sizes = (ELEMENTS // 1024, 1024), (1365,)  # vectors don't fit the second
    params, grads = ([draw(*size) for size in sizes] for _ in range(2))
    exp_avgs, exp_avg_sqs = ([draw.statistic(*size) for size in sizes] for _ in range(2))
    rounding = ([1, 2], [0, 0]) if draw.dtype == torch.bfloat16 else ([], [])
    tensors = params, grads, exp_avgs, exp_avg_sqs, [draw.statistic() for _ in sizes]
    return tensors, [0.1, 0.2], (draw.statistic(), torch.zeros((), device=draw.device)), rounding


def _heads(draw: Draw, head_dim: int, tokens: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]:
    """q, k and v, views of one packed projection, and the tables of all tokens but the class token."""
    batch = max(1, ELEMENTS // (tokens * HEADS * head_dim))
    tables = draw.statistic(tokens - 1, head_dim // 2), draw.statistic(tokens - 1, head_dim // 2)
    return draw(batch, tokens, 3, HEADS, head_dim).unbind(2), tables
