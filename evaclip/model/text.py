"""The text tower: the causal transformer of CLIP (Radford et al. 2021), with exact GELU."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip.model.captions import Layout
from evaclip.model.config import TextConfig
from evaclip.model.norm import Norm, Stream, product_dtype
from evaclip.model.recompute import ResidualBlock
from evaclip.model.savings import Savings
from evaclip.model.tower import Tower
from evakernels import gelu, packed_attention, rope_attention
from evakernels.nn import Linear, linear


def cut_padding(tokens: Tensor) -> Tensor:
    """Token ids `[B, N]` up to the batch's last end token, `[B, M]`: the same embeddings for less work.

    The text tower saves more than that by itself. This is for a model under `torch.compile`, where it can't: call
    it in front of the compiled code. On a device the host waits.
    """
    return tokens[:, : int(tokens.argmax(dim=-1).max()) + 1] if len(tokens) else tokens


class TextAttention(nn.Module):
    """Causal multi-head self-attention, one packed projection with bias. `[T, width]` -> same."""

    linear_weights: ClassVar[tuple[str, ...]] = ("in_proj_weight",)

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads, self.width = config.heads, config.width
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.width, config.width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * config.width))
        self.out_proj = Linear(config.width, config.width)

    def forward(self, x: Tensor, layout: Layout, pooled: bool = False) -> Tensor:
        """`layout` says whose the rows of `x` are; `pooled` asks for the end tokens' rows only, `[B, width]`."""
        out = self._at_ends(x, layout) if pooled else self._everywhere(x, layout)
        projected: Tensor = self.out_proj(out)
        return projected

    def _everywhere(self, x: Tensor, layout: Layout) -> Tensor:
        q, k, v = self._heads(linear(x, self.in_proj_weight, self.in_proj_bias))
        if layout.rows is None:
            # What stands behind a caption's end is seen by no token in front of it.
            grid = (part.unflatten(0, (layout.batch, layout.length)) for part in (q, k, v))
            return rope_attention(*grid, causal=True).flatten(0, 1).flatten(1)
        return packed_attention(q, k, v, layout.cu_seqlens, max_seqlen=layout.length).flatten(1)

    def _at_ends(self, x: Tensor, layout: Layout) -> Tensor:
        width = x.shape[-1]
        q_weight, kv_weight = self.in_proj_weight.split([width, 2 * width])
        q_bias, kv_bias = self.in_proj_bias.split([width, 2 * width])
        q = linear(layout.at_ends(x), q_weight, q_bias).unflatten(-1, (self.heads, -1))
        k, v = self._heads(layout.spread(linear(x, kv_weight, kv_bias)))
        mask = layout.before_ends()[:, None, None]
        q, k, v = q.unsqueeze(2), k.transpose(1, 2), v.transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).flatten(1)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """`[..., parts * width]` -> each part, `[..., heads, head_dim]`."""
        parts = x.shape[-1] // self.width
        heads: tuple[Tensor, ...] = x.unflatten(-1, (parts, self.heads, -1)).unbind(-3)
        return heads


class TextMlp(nn.Module):
    """MLP with exact GELU. `[T, width]` -> same."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.width, config.hidden)
        self.c_proj = Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(gelu(self.c_fc(x)))
        return out


class TextBlock(ResidualBlock):
    """Pre-norm block of attention and MLP. `[T, width]` -> same, or the end tokens' rows only, `[B, width]`."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.ln_1 = Norm(config.width, eps=config.norm_eps)
        self.attn = TextAttention(config)
        self.ln_2 = Norm(config.width, eps=config.norm_eps)
        self.mlp = TextMlp(config)
        self.kept_columns = config.hidden

    def reset_parameters(self, layers: int) -> None:
        """Normal weights that shrink with the width, and where a branch ends with the layers; bias 0."""
        attn, mlp = self.attn, self.mlp
        width = attn.out_proj.in_features
        branch_std = (2 * layers * width) ** -0.5
        nn.init.normal_(attn.in_proj_weight, std=width**-0.5)
        nn.init.normal_(attn.out_proj.weight, std=branch_std)
        nn.init.normal_(mlp.c_fc.weight, std=(2 * width) ** -0.5)
        nn.init.normal_(mlp.c_proj.weight, std=branch_std)
        for bias in (attn.in_proj_bias, attn.out_proj.bias, mlp.c_fc.bias, mlp.c_proj.bias):
            nn.init.zeros_(bias)
        self.ln_1.reset_parameters()
        self.ln_2.reset_parameters()

    def attend(self, stream: Stream, layout: Layout, pooled: bool = False) -> tuple[Tensor, Tensor]:
        """`layout` and `pooled` as in `TextAttention`."""
        # Of two readers, the gradients of a 16-bit y would be summed in 16 bits.
        y, x = stream.read(self.ln_1, None if pooled else product_dtype(stream.x))
        return layout.at_ends(x) if pooled else x, self.attn(y, layout, pooled)

    def mix(self, x: Tensor, branch: Tensor) -> Stream:
        y, x = self.ln_2.of_sum(x, branch, out_dtype=product_dtype(x))
        return Stream(x, self.mlp(y))


class Transformer(nn.Module):
    """The blocks, under the name that the state dict has for them."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(config) for _ in range(config.layers))


class TextTower(Tower):
    """Token ids -> one embedding per text, taken at the end token."""

    embeddings: ClassVar[tuple[str, ...]] = ("positional_embedding", "token_embedding")
    projection: ClassVar[str] = "text_projection"

    def __init__(self, config: TextConfig, embed_dim: int, savings: Savings) -> None:
        super().__init__(config.layers, savings)
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = Transformer(config)
        self.ln_final = Norm(config.width, eps=config.norm_eps)
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values of CLIP."""
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.config.width**-0.5)
        for block in self.transformer.resblocks:
            assert isinstance(block, TextBlock)
            block.reset_parameters(self.layers)
        self.ln_final.reset_parameters()

    def forward(self, tokens: Tensor, layout: Layout | None = None) -> Tensor:
        """Embeddings `[B, embed_dim]` of token ids `[B, N]`, N at most the context length.

        The embedding is that of the first occurrence of the largest id in each row, which is the end token;
        what comes after it has no influence.

        Args:
            layout: of these tokens, where it is known already; None finds it out.

        Raises:
            TypeError: for ids that aren't integers.
            ValueError: for a wrong shape.
        """
        self._check(tokens)
        if layout is None:
            layout = self.layout(tokens)
        x = self.run_blocks(self.transformer.resblocks, self._embed(tokens, layout), layout)
        at_ends = x if self.savings.pooled_last_block else layout.at_ends(x)
        embeddings: Tensor = self.ln_final(at_ends) @ self.text_projection
        return embeddings

    def layout(self, tokens: Tensor) -> Layout:
        """Where the tower computes the tokens of ids `[B, N]`. If they are on a device, the host may wait for it."""
        # How many tokens there are is known from the data alone, and a graph can't ask for it.
        known = not torch.compiler.is_compiling() and not tokens.is_meta and len(tokens) > 0
        return Layout.packed(tokens) if known and self.savings.pack_text else Layout.padded(tokens)

    def _embed(self, tokens: Tensor, layout: Layout) -> Tensor:
        """Rows `[T, width]`."""
        tokens = tokens[:, : layout.length]
        if layout.rows is None:
            embedded: Tensor = self.token_embedding(tokens) + self.positional_embedding[: layout.length]
            return embedded.flatten(0, 1)
        # As embeddings both: the gradient of an index is a sum of threads in any order on a CPU, this one isn't.
        positions = F.embedding(layout.positions(), self.positional_embedding)
        packed: Tensor = self.token_embedding(tokens.flatten()[layout.rows]) + positions
        return packed

    def _check(self, tokens: Tensor) -> None:
        longest = self.config.context_length
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens are {tokens.dtype}; expected int64 or int32 ids")
        if tokens.ndim != 2 or not 0 < tokens.shape[1] <= longest:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; expected [batch, 1..{longest}]")
