"""The text tower: the transformer of CLIP (Radford et al. 2021), or of SigLIP (Zhai et al. 2023)."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip.model.config import Savings, TextConfig
from evaclip.model.norm import Norm, Stream, product_dtype
from evaclip.model.tower import ResidualBlock, Tower
from evakernels import Packing, gelu, rope_attention
from evakernels.nn import Linear, linear


def cut_padding(tokens: Tensor) -> Tensor:
    """Token ids `[B, N]` up to the batch's last end token, `[B, M]`: equal embeddings for less work.

    For causal towers only; others pool the last position. The tower packs captions by itself, under `torch.compile`
    with the setting of `Savings.pack_text`. Without that setting, call this before the compiled code. It synchronizes
    with the device.
    """
    return tokens[:, : int(tokens.argmax(dim=-1).max()) + 1] if len(tokens) else tokens


class TextAttention(nn.Module):
    """Multi-head self-attention, one packed projection with bias. `[T, width]` -> same."""

    linear_weights: ClassVar[tuple[str, ...]] = ("in_proj_weight",)

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads, self.width = config.heads, config.width
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.width, config.width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * config.width))
        self.out_proj = Linear(config.width, config.width)

    def forward(self, x: Tensor, packing: Packing, pooled: bool = False) -> Tensor:
        """`packing` describes the rows of `x`; `pooled` computes only the end tokens' rows, `[B, width]`."""
        out = self._attend_ends(x, packing) if pooled else self._attend_all(x, packing)
        projected: Tensor = self.out_proj(out)
        return projected

    def _attend_all(self, x: Tensor, packing: Packing) -> Tensor:
        q, k, v = self._heads(linear(x, self.in_proj_weight, self.in_proj_bias))
        if packing.rows is None:
            # With a causal mask no token of a caption sees the padding after it.
            grid = (part.unflatten(0, (packing.batch, packing.length)) for part in (q, k, v))
            return rope_attention(*grid, causal=packing.causal).flatten(0, 1).flatten(1)
        return packing.attend(q, k, v).flatten(1)

    def _attend_ends(self, x: Tensor, packing: Packing) -> Tensor:
        width = x.shape[-1]
        q_weight, kv_weight = self.in_proj_weight.split([width, 2 * width])
        q_bias, kv_bias = self.in_proj_bias.split([width, 2 * width])
        q = linear(packing.last(x), q_weight, q_bias).unflatten(-1, (self.heads, -1))
        k, v = self._heads(linear(x, kv_weight, kv_bias))
        return packing.attend_once(q, k, v).flatten(1)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """`[..., parts * width]` -> each part, `[..., heads, head_dim]`."""
        parts = x.shape[-1] // self.width
        heads: tuple[Tensor, ...] = x.unflatten(-1, (parts, self.heads, -1)).unbind(-3)
        return heads


class TextMlp(nn.Module):
    """MLP with GELU. `[T, width]` -> same."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.width, config.hidden)
        self.c_proj = Linear(config.hidden, config.width)
        self.approximate = "tanh" if config.mlp == "gelu_tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(gelu(self.c_fc(x), approximate=self.approximate))
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
        """Normal weights with a std by width, and by layers at the end of a branch; bias 0."""
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

    def attend(self, stream: Stream, packing: Packing, pooled: bool = False) -> tuple[Tensor, Tensor]:
        """`packing` and `pooled` as in `TextAttention`."""
        # A pooled block reads y twice: gradients of a 16-bit y would be summed in 16 bits.
        y, x = stream.read(self.ln_1, None if pooled else product_dtype(stream.x))
        return packing.last(x) if pooled else x, self.attn(y, packing, pooled)

    def mix(self, x: Tensor, branch: Tensor, packing: Packing | None = None) -> Stream:
        y, x = self.ln_2.of_sum(x, branch, out_dtype=product_dtype(x))
        return Stream(x, self.mlp(y))


class Transformer(nn.Module):
    """The blocks, under their name in the state dict."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(config) for _ in range(config.layers))


class TextTower(Tower):
    """Token ids -> one embedding per text, taken at the end token or at the last position."""

    embeddings: ClassVar[tuple[str, ...]] = ("positional_embedding", "token_embedding")
    projection = "text_projection"
    text_projection_bias: nn.Parameter | None

    def __init__(self, config: TextConfig, embed_dim: int, savings: Savings) -> None:
        super().__init__(config.layers, savings)
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.transformer = Transformer(config)
        self.ln_final = Norm(config.width, eps=config.norm_eps)
        self.text_projection = nn.Parameter(torch.empty(config.width, embed_dim))
        bias = nn.Parameter(torch.empty(embed_dim)) if config.proj_bias else None
        self.register_parameter("text_projection_bias", bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as CLIP."""
        if self.text_projection_bias is not None:
            nn.init.zeros_(self.text_projection_bias)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=self.config.width**-0.5)
        for block in self.transformer.resblocks:
            assert isinstance(block, TextBlock)
            block.reset_parameters(self.layers)
        self.ln_final.reset_parameters()

    def forward(self, tokens: Tensor, packing: Packing | None = None) -> Tensor:
        """Embeddings `[B, embed_dim]` of token ids `[B, N]`, N at most the context length.

        A causal tower takes the embedding at the first occurrence of the largest id in each row, which is the end
        token; later tokens have no influence. Others take it at the last position, and all tokens have influence.

        Args:
            tokens: int64 or int32.
            packing: of these tokens; None computes it.

        Raises:
            TypeError: for ids that aren't integers.
            ValueError: for a wrong shape.
        """
        check_tokens(tokens, self.config.context_length)
        if packing is None:
            packing = self.pack_tokens(tokens)
        x = self.run_blocks(self.transformer.resblocks, self._embed(tokens, packing), packing)
        ends = x if self.savings.pooled_last_block else packing.last(x)
        embeddings: Tensor = self.ln_final(ends) @ self.text_projection
        bias = self.text_projection_bias
        return embeddings if bias is None else embeddings + bias.to(embeddings.dtype)

    def pack_tokens(self, tokens: Tensor) -> Packing:
        """The captions of token ids `[B, N]` up to their ends, packed or padded; may synchronize with their device.

        In a graph of `torch.compile` only the number of packed rows depends on the data.
        """
        lengths, length, compiling = self.end_positions(tokens) + 1, tokens.shape[1], torch.compiler.is_compiling()
        if compiling:
            # The number of rows depends on the data, which only some graphs allow.
            packable = not torch.compiler.is_exporting() and torch._dynamo.config.capture_dynamic_output_shape_ops
        else:
            packable = not tokens.is_meta and len(tokens) > 0
        if not (packable and self.savings.pack_text and self.config.causal):
            return Packing.padded(lengths, length, causal=self.config.causal)
        length = length if compiling else int(lengths.max())
        real = torch.arange(length, device=tokens.device) < lengths.unsqueeze(1)
        rows = real.flatten().nonzero().squeeze(1)
        if compiling:
            torch._check(rows.shape[0] >= tokens.shape[0])
            torch._check(rows.shape[0] <= tokens.numel())
        cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
        return Packing(tokens.shape[0], length, rows, cu_seqlens, lengths, length, causal=True)

    def end_positions(self, tokens: Tensor) -> Tensor:
        """Position of each caption's pooled token, int64 `[B]`: the first occurrence of its largest id, or the last."""
        if self.config.causal:
            return tokens.argmax(dim=-1)
        return torch.full_like(tokens[:, 0], tokens.shape[1] - 1, dtype=torch.int64)

    def _embed(self, tokens: Tensor, packing: Packing) -> Tensor:
        """Token embeddings with positions, rows `[T, width]`."""
        tokens = tokens[:, : packing.length]
        if packing.rows is None:
            embedded: Tensor = self.token_embedding(tokens) + self.positional_embedding[: packing.length]
            return embedded.flatten(0, 1)
        # Both by F.embedding: on a CPU the gradient of indexing is summed by threads in any order.
        positions = F.embedding(packing.positions(), self.positional_embedding)
        packed: Tensor = self.token_embedding(tokens.flatten()[packing.rows]) + positions
        return packed


def check_tokens(tokens: Tensor, longest: int) -> None:
    """Raise TypeError or ValueError unless `tokens` are integers `[batch, 1..longest]`."""
    if tokens.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"tokens must be int64 or int32 ids, got {tokens.dtype}")
    if tokens.ndim != 2 or not 0 < tokens.shape[1] <= longest:
        raise ValueError(f"tokens must have shape [batch, 1..{longest}], got {tuple(tokens.shape)}")
