"""The two towers as ONNX graphs.

What a runtime would do again for every batch is done here, once: the scale of the scores, layer scales, and the order
of the channels that are rotated are in the weights; the rotation is by constant tables, in which the class token turns
by 0. Attention stands in the form that runtimes fuse: MatMul, Softmax, MatMul. Sizes are fixed but for the batch, and
for texts, of which no more is computed than the longest one of a batch.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from evaclip.model.norm import Norm
from evaclip.model.text import TextBlock, TextTower
from evaclip.model.vision import VisionTower
from evaclip.model.vision_block import Attention, Block, GeluMlp
from evaclip.portable.graph import Graph
from evakernels.nn import SwiGLU

Array = NDArray[np.float32]

_HIDDEN = -1e4  # in fp16, too, its exponential is 0


@dataclass(frozen=True)
class Heads:
    """How tokens are split into heads, and what is done to their scores."""

    count: int
    width: int
    rotation: tuple[str, str] | None = None  # cosines and signed sines of all tokens, [N, head_dim]
    mask: str | None = None

    @property
    def dim(self) -> int:
        """Channels of a head."""
        return self.width // self.count


def image_graph(graph: Graph, tower: VisionTower, images: str) -> str:
    """Embeddings of float32 `[batch, 3, height, width]`."""
    config, proj = tower.config, tower.patch_embed.proj
    sizes: dict[str, Any] = {"kernel_shape": [config.patch_size] * 2, "strides": [config.patch_size] * 2}
    kernel, bias = graph.weight(_values(proj.weight)), graph.weight(_values(proj.bias))
    x = graph.op("Conv", graph.cast(images, "computed"), kernel, bias, **sizes)
    x = graph.transpose(graph.reshape(x, 0, config.width, config.num_patches), 0, 2, 1)
    # The class token's row is 0 in front of the sum: no shape has to be asked for, as of a token to be repeated.
    positions = _values(tower.pos_embed)[0]
    positions[0] += _values(tower.cls_token)[0, 0]
    x = graph.op("Add", graph.op("Pad", x, graph.integers(0, 1, 0, 0, 0, 0)), graph.weight(positions))
    heads = Heads(config.heads, config.width, _rotation(graph, tower))
    for block in tower.blocks:
        assert isinstance(block, Block)
        x = _image_block(graph, block, x, heads, last=block is tower.blocks[-1] and config.pool == "token")
    if config.pool == "token":
        pooled = graph.reshape(x, -1, config.width)
    else:
        patches = graph.slice(x, 1, 1 + config.num_patches, 1)
        pooled = graph.op("ReduceMean", patches, graph.integers(1), keepdims=0)
    pooled = _norm(graph, tower.last_norm, pooled)
    return pooled if tower.head is None else _linear(graph, tower.head, pooled)


def text_graph(graph: Graph, tower: TextTower, tokens: str) -> str:
    """Embeddings of token ids `[batch, context_length]`."""
    config = tower.config
    # The end token has the largest id; the first one counts. No token sees one behind it.
    ends = graph.op("ArgMax", tokens, axis=1, keepdims=1)
    length = graph.op("Add", graph.reshape(graph.op("ReduceMax", ends), 1), graph.integers(1))
    embedded = graph.op("Gather", graph.weight(_values(tower.token_embedding.weight)), _first(graph, tokens, length, 1))
    x = graph.op("Add", embedded, _first(graph, graph.weight(_values(tower.positional_embedding)), length, 0))
    hidden = np.triu(np.full([config.context_length] * 2, _HIDDEN), 1)
    mask = _first(graph, _first(graph, graph.weight(hidden), length, 0), length, 1)
    for block in tower.transformer.resblocks:
        assert isinstance(block, TextBlock)
        last = block is tower.transformer.resblocks[-1]
        x = _text_block(graph, block, x, Heads(config.heads, config.width, mask=mask), ends if last else None)
    pooled = _norm(graph, tower.ln_final, graph.reshape(x, -1, config.width))
    return graph.linear(pooled, _values(tower.text_projection).T, None)


def _image_block(graph: Graph, block: Block, x: str, heads: Heads, last: bool) -> str:
    """One block; of the `last` one the class token alone, `[batch, 1, width]`."""
    y = x if block.post_norm else _norm(graph, block.norm1, x)
    kept = graph.slice(x, 0, 1, 1) if last else x
    queried = kept if block.post_norm else graph.slice(y, 0, 1, 1) if last else y
    gains = [None if gamma is None else _values(gamma) for gamma in (block.gamma_1, block.gamma_2)]
    first, second = (None, None) if block.post_norm else gains
    out = _linear(graph, block.attn.proj, _image_attention(graph, block.attn, y, queried, heads, last), first)
    if block.post_norm:
        x = graph.op("Add", kept, _norm(graph, block.norm1, out, gains[0]))
        return str(graph.op("Add", x, _norm(graph, block.norm2, _mlp(graph, block.mlp, x, None), gains[1])))
    x = graph.op("Add", kept, out)
    return str(graph.op("Add", x, _mlp(graph, block.mlp, _norm(graph, block.norm2, x), second)))


def _text_block(graph: Graph, block: TextBlock, x: str, heads: Heads, ends: str | None) -> str:
    """One block; where `ends` are given those tokens alone, `[batch, 1, width]`."""
    y, attn = _norm(graph, block.ln_1, x), block.attn
    weights, biases = (np.split(_values(part), 3) for part in (attn.in_proj_weight, attn.in_proj_bias))
    kept, queried = (x, y) if ends is None else (_rows(graph, part, ends) for part in (x, y))
    if ends is not None and heads.mask is not None:
        of_ends = graph.op("Unsqueeze", graph.op("Gather", heads.mask, ends), graph.integers(1))
        heads = replace(heads, mask=of_ends)
    out = _attend(graph, y, queried, list(weights), list(biases), heads, ends is not None)
    x = graph.op("Add", kept, _linear(graph, attn.out_proj, out))
    hidden = _gelu(graph, _linear(graph, block.mlp.c_fc, _norm(graph, block.ln_2, x)))
    return str(graph.op("Add", x, _linear(graph, block.mlp.c_proj, hidden)))


def _first(graph: Graph, x: str, count: str, axis: int) -> str:
    """The first `count` `[1]` of `x` along a dimension."""
    return str(graph.op("Slice", x, graph.integers(0), count, graph.integers(axis)))


def _rows(graph: Graph, x: str, places: str) -> str:
    """The row `places` `[batch, 1]` of each `[N, width]` in `x`, `[batch, 1, width]`."""
    return str(graph.op("Unsqueeze", graph.op("GatherND", x, places, batch_dims=1), graph.integers(1)))


def _image_attention(graph: Graph, attn: Attention, x: str, queried: str, heads: Heads, last: bool) -> str:
    layers = [attn.q_proj, attn.k_proj, attn.v_proj] if attn.sub_norm else None
    weights = [_values(layer.weight) for layer in layers] if layers else np.split(_values(attn.qkv.weight), 3)
    biased = attn.q_bias is not None and attn.v_bias is not None
    zeros = np.zeros(heads.width, np.float32)
    biases = [_values(attn.q_bias), zeros, _values(attn.v_bias)] if biased else None
    out = _attend(graph, x, queried, list(weights), biases, heads, last)
    has_norm = attn.sub_norm and attn.inner_attn_ln is not None
    return _norm(graph, attn.inner_attn_ln, out) if has_norm else out


def _attend(
    graph: Graph, x: str, queried: str, weights: list[Array], biases: list[Array] | None, heads: Heads, pooled: bool
) -> str:
    """Attention of the tokens `queried` to those of `x`; `pooled` says that they are fewer, and aren't rotated."""
    weights[0] = weights[0] * np.float32(heads.dim**-0.5)
    biases = None if biases is None else [biases[0] * np.float32(heads.dim**-0.5), *biases[1:]]
    if heads.rotation is not None:
        order = _halves(heads)
        weights[:2] = [weight[order] for weight in weights[:2]]
        biases = None if biases is None else [*(bias[order] for bias in biases[:2]), biases[2]]

    def project(tokens: str, first: int, end: int) -> str:
        bias = None if biases is None else np.concatenate(biases[first:end])
        both = graph.linear(tokens, np.concatenate(weights[first:end]), bias)
        # [batch, N, parts * width] -> [parts, batch, heads, N, head_dim]
        return graph.transpose(graph.reshape(both, 0, 0, end - first, heads.count, heads.dim), 2, 0, 3, 1, 4)

    if pooled:
        q = graph.op("Squeeze", project(queried, 0, 1), graph.integers(0))
        k, v = (graph.op("Squeeze", part, graph.integers(0)) for part in graph.split(project(x, 1, 3), [1, 1], 0))
        k = _rotate(graph, k, heads)
    else:
        both, v = graph.split(project(x, 0, 3), [2, 1], 0)
        q, k = graph.split(_rotate(graph, both, heads), [1, 1], 0)
        q, k, v = (graph.op("Squeeze", part, graph.integers(0)) for part in (q, k, v))
    scores = graph.op("MatMul", q, graph.transpose(k, 0, 1, 3, 2))
    if heads.mask is not None:
        scores = graph.op("Add", scores, heads.mask)
    out = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), v)
    return graph.reshape(graph.transpose(out, 0, 2, 1, 3), 0, 0, heads.width)


def _halves(heads: Heads) -> NDArray[np.int64]:
    """Channels in the order (even, odd) within each head: pairs lie half a head apart, and scores don't change."""
    of_head = np.concatenate([np.arange(0, heads.dim, 2), np.arange(1, heads.dim, 2)])
    return np.asarray((np.arange(heads.count)[:, None] * heads.dim + of_head).ravel())


def _rotation(graph: Graph, tower: VisionTower) -> tuple[str, str] | None:
    if tower.rope is None:
        return None
    cos, sin = (_values(table) for table in (tower.rope.cos, tower.rope.sin))
    unturned = np.ones((1, cos.shape[1]), np.float32)
    cos, sin = np.concatenate([unturned, cos]), np.concatenate([0 * unturned, sin])
    return graph.weight(np.concatenate([cos, cos], 1)), graph.weight(np.concatenate([-sin, sin], 1))


def _rotate(graph: Graph, x: str, heads: Heads) -> str:
    """`x` `[..., N, head_dim]`, whose pairs lie half a head apart, turned."""
    if heads.rotation is None:
        return x
    cos, sin = heads.rotation
    first, second = graph.split(x, [heads.dim // 2] * 2, -1)
    swapped = graph.op("Concat", second, first, axis=-1)
    return str(graph.op("Add", graph.op("Mul", x, cos), graph.op("Mul", swapped, sin)))


def _mlp(graph: Graph, mlp: SwiGLU | GeluMlp, x: str, gain: Array | None) -> str:
    if isinstance(mlp, GeluMlp):
        return _linear(graph, mlp.fc2, _gelu(graph, _linear(graph, mlp.fc1, x)), gain)
    gate, up = _linear(graph, mlp.w1, x), _linear(graph, mlp.w2, x)
    hidden = graph.op("Mul", graph.op("Mul", gate, graph.op("Sigmoid", gate)), up)
    if mlp.ffn_ln is not None:
        hidden = _layer_norm(graph, hidden, mlp.ffn_ln.weight, mlp.ffn_ln.bias, mlp.ffn_ln.eps)
    return _linear(graph, mlp.w3, hidden, gain)


def _gelu(graph: Graph, x: str) -> str:
    return str(graph.op("Gelu", x))


def _norm(graph: Graph, norm: nn.Module | None, x: str, gain: Array | None = None) -> str:
    """`gain * norm(x)`."""
    assert isinstance(norm, Norm)
    if not norm.rms:
        return _layer_norm(graph, x, norm.weight, norm.bias, norm.eps, gain)
    # In float32: squares leave the range of fp16.
    wide = graph.cast(x, "float32")
    mean = graph.op("ReduceMean", graph.op("Mul", wide, wide), graph.integers(-1), keepdims=1)
    eps = graph.scalar(norm.eps)
    wide = graph.op("Div", wide, graph.op("Sqrt", graph.op("Add", mean, eps)))
    return str(graph.op("Mul", graph.cast(wide, "computed"), graph.weight(_scaled(norm.weight, gain))))


def _layer_norm(
    graph: Graph, x: str, weight: Tensor | None, bias: Tensor | None, eps: float, gain: Array | None = None
) -> str:
    given = [weight] if bias is None else [weight, bias]
    parameters = [graph.weight(_scaled(parameter, gain)) for parameter in given]
    return str(graph.op("LayerNormalization", x, *parameters, axis=-1, epsilon=eps))


def _linear(graph: Graph, layer: nn.Module, x: str, gain: Array | None = None) -> str:
    """`gain * layer(x)`."""
    assert isinstance(layer, nn.Linear)
    weight = _values(layer.weight) if gain is None else _values(layer.weight) * gain[:, None]
    return graph.linear(x, weight, None if layer.bias is None else _scaled(layer.bias, gain))


def _scaled(parameter: Tensor | None, gain: Array | None) -> Array:
    return _values(parameter) if gain is None else _values(parameter) * gain


def _values(parameter: Tensor | None) -> Array:
    """A copy in float32."""
    assert isinstance(parameter, Tensor)
    return np.array(parameter.detach().to("cpu", torch.float32).numpy())
