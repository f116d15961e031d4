"""The text tower: the causal transformer of CLIP (Radford et al. 2021), with exact GELU."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip.model.config import TextConfig
from evaclip.model.norm import Norm
from evaclip.model.tower import Tower
from evakernels import rope_attention


class TextAttention(nn.Module):
    """Causal multi-head self-attention, one packed projection with bias. `[B, N, width]` -> same."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * config.width, config.width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * config.width))
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.view(*x.shape[:2], 3, self.heads, -1).unbind(2)
        out: Tensor = self.out_proj(rope_attention(q, k, v, causal=True).flatten(2))
        return out


class TextMlp(nn.Module):
    """MLP with exact GELU. `[B, N, width]` -> same."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.c_fc = nn.Linear(config.width, config.hidden)
        self.c_proj = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.c_proj(F.gelu(self.c_fc(x)))
        return out


class TextBlock(nn.Module):
    """Pre-norm block of attention and MLP. `[B, N, width]` -> same."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.ln_1 = Norm(config.width, eps=config.norm_eps)
        self.attn = TextAttention(config)
        self.ln_2 = Norm(config.width, eps=config.norm_eps)
        self.mlp = TextMlp(config)

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

    def forward(self, x: Tensor) -> Tensor:
        y, x = self.ln_2.of_sum(x, self.attn(self.ln_1(x)))
        branch: Tensor = self.mlp(y)
        return x + branch


class Transformer(nn.Module):
    """The blocks, under the name that the state dict has for them."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(TextBlock(config) for _ in range(config.layers))


class TextTower(Tower):
    """Token ids -> one embedding per text, taken at the end token."""

    embeddings: ClassVar[tuple[str, ...]] = ("positional_embedding", "token_embedding")

    def __init__(self, config: TextConfig, embed_dim: int) -> None:
        super().__init__(config.layers)
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

    def forward(self, tokens: Tensor) -> Tensor:
        """Embeddings `[B, embed_dim]` of token ids `[B, N]`, N at most the context length.

        The embedding is that of the first occurrence of the largest id in each row, which is the end token;
        what comes after it has no influence.

        Raises:
            TypeError: for ids that aren't integers. ValueError: for a wrong shape.
        """
        self._check(tokens)
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.run_blocks(self.transformer.resblocks, x)
        rows = torch.arange(x.shape[0], device=x.device)
        at_end: Tensor = self.ln_final(x[rows, tokens.argmax(dim=-1)])
        return at_end @ self.text_projection

    def _check(self, tokens: Tensor) -> None:
        longest = self.config.context_length
        if tokens.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"tokens are {tokens.dtype}; expected int64 or int32 ids")
        if tokens.ndim != 2 or not 0 < tokens.shape[1] <= longest:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; expected [batch, 1..{longest}]")
