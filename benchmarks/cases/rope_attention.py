"""Attention: with the axial rotary embedding of EVA-02 inside (vision), and causal without one (text)."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import evakernels
from benchmarks.candidates import compiled
from benchmarks.cases._inputs import kept_patches
from benchmarks.operation import Cost, Draw, Function, Inputs, Operation, Work, peer, register
from benchmarks.shapes import Shape

NUM_PREFIX = 1
"""The class token isn't rotated."""

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Attention over q, k and v `[B, N, H, D]` as they come, to `[B, N, H, D]`."""
AttentionBuilder = Callable[[Shape, bool], Attention]
"""Makes the attention for a shape, causal or not."""

_ROPE_SHAPES = {
    "cpu": (
        "eva02-b16@224 b1",
        "eva02-b16@224 b4",
        "eva02-l14@112 b1",
        "eva02-l14@224 b1",
        "eva02-l14@224 b1 drop50",
        "eva02-l14@336 b1",
    ),
    "cuda": (
        "eva02-b16@224 b64",
        "eva02-b16@224 b512",
        "eva02-l14@224 b256",
        "eva02-l14@224 b256 drop50",
        "eva02-l14@336 b128",
        "eva02-l14@448 b64",
        "eva01-g14@224 b128",
        "eva02-bige14@224 b128",
        "eva-18b@224 b64",
    ),
}
_CAUSAL_SHAPES = {
    "cpu": ("eva02-b16:text b1", "eva02-b16:text b8"),
    "cuda": ("eva02-b16:text b512", "eva02-l14:text b256", "eva02-l14:text b1024", "eva-18b:text b256"),
}


def _raw(batch: int, tokens: int, heads: int, head_dim: int) -> Shape:
    """The first token is the class token, the others are a row of patches."""
    patches = tokens - NUM_PREFIX
    return Shape(batch=batch, tokens=tokens, heads=heads, head_dim=head_dim, grid=(1, patches), kept_patches=patches)


def _qkv(shape: Shape, draw: Draw) -> Inputs:
    """q, k and v `[B, N, H, D]`: views of one packed projection, or separate ones where the model has three."""
    size = (shape.batch, shape.tokens, shape.heads, shape.head_dim)
    if shape.model and shape.tower == "vision" and shape.config.vision.sub_norm:
        return {name: draw.normal(*size) for name in ("q", "k", "v")}
    packed = draw.normal(*size[:2], 3, *size[2:])
    return dict(zip(("q", "k", "v"), packed.unbind(2), strict=True))


def _rope_inputs(shape: Shape, draw: Draw) -> Inputs:
    """Rotary tables for every model, even without a rotary embedding."""
    token_index = kept_patches("rope_attention", shape, draw)
    cos, sin = evakernels.nn.axial_rope(*shape.grid, shape.head_dim, device=draw.device)
    return _qkv(shape, draw) | {"cos": cos, "sin": sin, "token_index": token_index}


def _work(visible: float) -> Callable[[Shape, int], Work]:
    """The cost when a query sees the share `visible` of the keys.

    Forward: two matmuls, over q, k, v and out. Backward: five matmuls, as the scores are recomputed (Dao et al. 2022),
    over q, k, v, out and the gradients of all four. Tables, indices and log-sum-exps are too small to count.
    """

    def work(shape: Shape, itemsize: int) -> Work:
        product = 2 * shape.batch * shape.heads * shape.tokens**2 * shape.head_dim * visible
        unit = shape.batch * shape.tokens * shape.heads * shape.head_dim * itemsize
        return Work(Cost(2 * product, 4 * unit), Cost(5 * product, 8 * unit))

    return work


# --- plain PyTorch --------------------------------------------------------------------------------------------------


def _rope_eager(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, token_index: Tensor | None) -> Tensor:
    return _sdpa(*_rotate_both(q, k, cos, sin, token_index), v)


def _causal_eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _sdpa(q, k, v, causal=True)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    # Contiguous, as the projection after it reads it: free for the kernels that write in this order.
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).contiguous()


def _rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, token_index: Tensor | None) -> tuple[Tensor, Tensor]:
    """q and k with their patches rotated, pairs (2i, 2i + 1), rounded to their dtype."""
    if token_index is not None:
        cos, sin = cos[token_index], sin[token_index]
    cos, sin = (table.repeat_interleave(2, -1).unsqueeze(-2) for table in (cos, sin))

    def rotate(x: Tensor) -> Tensor:
        prefix, patches = x[:, :NUM_PREFIX], x[:, NUM_PREFIX:]
        across = torch.stack((-patches[..., 1::2], patches[..., ::2]), -1).flatten(-2)
        return torch.cat((prefix, (patches * cos + across * sin).to(x.dtype)), 1)

    return rotate(q), rotate(k)


@lru_cache(maxsize=4)
def _fused_rotation(shape: Shape) -> Function:
    """Compiled once for all peers of a shape: compilation takes longer than their measurement."""
    return compiled(_rotate_both)


# --- operations -----------------------------------------------------------------------------------------------------


_ROPE = register(
    Operation(
        name="rope_attention",
        summary="attention with the axial rotary embedding inside, token dropout included",
        inputs=_rope_inputs,
        eager=_rope_eager,
        ours=partial(evakernels.rope_attention, num_prefix=NUM_PREFIX),
        work=_work(visible=1),
        shapes=_ROPE_SHAPES,
        raw=_raw,
        small="1x5x1x64",
        gradients=("q", "k", "v"),
        registered="rope_attention_forward",
    )
)
register(
    replace(
        _ROPE,
        name="causal_attention",
        summary="causal attention without a rotary embedding, as in the text tower",
        inputs=_qkv,
        eager=_causal_eager,
        ours=partial(evakernels.rope_attention, causal=True),
        work=_work(visible=0.5),
        shapes=_CAUSAL_SHAPES,
    )
)


# --- peers ----------------------------------------------------------------------------------------------------------


def _attention_peer(
    name: str | None = None, *, package: str | None = None, devices: Sequence[str] = ("cpu", "cuda")
) -> Callable[[AttentionBuilder], AttentionBuilder]:
    """Registers the decorated builder for both operations; the rotation goes before it, fused on a GPU."""

    def register(build: AttentionBuilder) -> AttentionBuilder:
        @peer("rope_attention", name, package=package, devices=devices)
        def rotated(shape: Shape) -> Function:
            attend, fused = build(shape, False), _fused_rotation(shape)

            def call(q: Tensor, k: Tensor, v: Tensor, **tables: Any) -> Tensor:
                rotate = fused if q.is_cuda else _rotate_both
                q, k = rotate(q=q, k=k, **tables)
                return attend(q, k, v)

            return call

        @peer("causal_attention", name, package=package, devices=devices)
        def causal(shape: Shape) -> Function:
            return build(shape, True)

        return build

    return register


def _on_sdpa(backend: SDPBackend) -> AttentionBuilder:
    """PyTorch's attention on one of its backends."""

    def build(shape: Shape, causal: bool) -> Attention:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return _sdpa(q, k, v, causal)

        return attend

    return build


_attention_peer("sdpa flash")(_on_sdpa(SDPBackend.FLASH_ATTENTION))
_attention_peer("sdpa efficient", devices=("cuda",))(_on_sdpa(SDPBackend.EFFICIENT_ATTENTION))
_attention_peer("sdpa cudnn", devices=("cuda",))(_on_sdpa(SDPBackend.CUDNN_ATTENTION))
_attention_peer("sdpa math")(_on_sdpa(SDPBackend.MATH))


def compile_flex() -> Function:
    """FlexAttention of q, k and v `[B, H, N, D]` under a mask of blocks, compiled for one shape."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def flex_only(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask | None) -> Tensor:
        out = flex_attention(q, k, v, block_mask=block_mask)
        assert isinstance(out, Tensor)  # not a tuple: no log-sum-exp was asked for
        return out

    return compiled(flex_only)


@_attention_peer("FlexAttention")
def flex(shape: Shape, causal: bool) -> Attention:
    """PyTorch's FlexAttention, compiled; on a CPU forward only."""
    from torch.nn.attention.flex_attention import BlockMask, create_block_mask

    @cache
    def mask(device: torch.device) -> BlockMask | None:
        if not causal:
            return None
        tokens = shape.tokens
        return create_block_mask(lambda b, h, query, key: query >= key, None, None, tokens, tokens, device=device)

    compiled_flex = compile_flex()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.requires_grad and q.device.type == "cpu":  # the compiler's own message hides it
            raise NotImplementedError("FlexAttention has no backward pass on a CPU")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = compiled_flex(q=q, k=k, v=v, block_mask=mask(q.device))
        return out.transpose(1, 2).contiguous()

    return attend


@_attention_peer(package="flash-attn", devices=("cuda",))
def flash_attn(shape: Shape, causal: bool) -> Attention:
    """FlashAttention-2."""
    from flash_attn import flash_attn_func

    return lambda q, k, v: flash_attn_func(q, k, v, causal=causal)


@_attention_peer(package="flash-attn-4", devices=("cuda",))
def flash_attn_4(shape: Shape, causal: bool) -> Attention:
    """FlashAttention-4, in the CuTe DSL; it also returns the log-sum-exps."""
    from flash_attn.cute import flash_attn_func

    return lambda q, k, v: flash_attn_func(q, k, v, causal=causal)[0]


@_attention_peer(package="xformers", devices=("cuda",))
def xformers(shape: Shape, causal: bool) -> Attention:
    """xFormers, which picks the kernel itself."""
    from xformers.ops import LowerTriangularMask, memory_efficient_attention

    mask = LowerTriangularMask() if causal else None
    return lambda q, k, v: memory_efficient_attention(q, k, v, attn_bias=mask)


@peer("rope_attention", package="timm")
def timm(shape: Shape) -> Function:
    """The rotation of timm's EVA, then PyTorch's attention as it chooses it."""
    from timm.layers import apply_keep_indices_nlc, apply_rot_embed_cat  # type: ignore[attr-defined]

    def attend(q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, token_index: Tensor | None) -> Tensor:
        table = torch.cat((sin, cos), -1).repeat_interleave(2, -1)  # the order that timm wants, sin first
        if token_index is not None:
            table = apply_keep_indices_nlc(q, table, token_index).unsqueeze(1)

        def rotate(x: Tensor) -> Tensor:
            prefix, patches = x[:, :, :NUM_PREFIX], x[:, :, NUM_PREFIX:]
            return torch.cat((prefix, apply_rot_embed_cat(patches, table)), 2)

        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(rotate(q), rotate(k), v).transpose(1, 2).contiguous()

    return attend
