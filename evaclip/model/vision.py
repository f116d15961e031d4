"""The vision tower of all EVA-CLIP models: options of one transformer, not a class for each model."""

import math
from collections import OrderedDict
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip.model.config import VisionConfig
from evaclip.model.norm import Norm
from evaclip.model.rotary import RotaryTable
from evaclip.model.tower import Tower
from evakernels import rope_attention, sample_token_index, swiglu, token_dropout

_INIT_STD = 0.02
_HEAD_INIT_FACTOR = 0.001


def _norm(config: VisionConfig, width: int) -> Norm:
    return Norm(width, config.norm, config.norm_eps)


class PatchEmbed(nn.Module):
    """Images `[B, 3, H, W]` -> patches `[B, num_patches, width]`, row by row."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention with rotary positions. `[B, N, width]` -> same.

    There are biases on q and v, but none on k: it would shift all scores of a query alike, without effect.
    """

    q_bias: nn.Parameter | None
    v_bias: nn.Parameter | None

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.split = config.sub_norm
        if self.split:
            self.q_proj = nn.Linear(width, width, bias=False)
            self.k_proj = nn.Linear(width, width, bias=False)
            self.v_proj = nn.Linear(width, width, bias=False)
        else:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
        for name in ("q_bias", "v_bias"):
            self.register_parameter(name, nn.Parameter(torch.zeros(width)) if config.qkv_bias else None)
        self.inner_attn_ln = _norm(config, width) if config.sub_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(
        self, x: Tensor, cos: Tensor | None, sin: Tensor | None, token_index: Tensor | None
    ) -> Tensor:
        q, k, v = self._project(x)
        # The class token, in front of the patches, has no place in the image and isn't rotated.
        out = rope_attention(q, k, v, cos, sin, token_index=token_index, num_prefix=1)
        return self.proj(self.inner_attn_ln(out.flatten(2)))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.split:
            q = F.linear(x, self.q_proj.weight, self.q_bias)
            v = F.linear(x, self.v_proj.weight, self.v_bias)
            return tuple(t.unflatten(-1, (self.heads, -1)) for t in (q, self.k_proj(x), v))
        bias = None
        if self.q_bias is not None and self.v_bias is not None:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return F.linear(x, self.qkv.weight, bias).unflatten(-1, (3, self.heads, -1)).unbind(2)


class SwiGlu(nn.Module):
    """Gated MLP (Shazeer 2020) with a norm in front of its last matrix. `[B, N, width]` -> same."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.width, config.hidden)
        self.w2 = nn.Linear(config.width, config.hidden)
        self.ffn_ln = _norm(config, config.hidden) if config.sub_norm else None
        self.w3 = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.w1(x), self.w2(x)
        if self.ffn_ln is None:
            return self.w3(swiglu(gate, up))
        return self.w3(swiglu(gate, up, self.ffn_ln.weight, self.ffn_ln.bias, self.ffn_ln.eps))


def _mlp(config: VisionConfig) -> nn.Module:
    if config.mlp == "swiglu":
        return SwiGlu(config)
    fc1, fc2 = nn.Linear(config.width, config.hidden), nn.Linear(config.hidden, config.width)
    return nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))


class Block(nn.Module):
    """Attention and MLP, each with its norm before or after it. `[B, N, width]` -> same.

    Args:
        config: of the tower.
        drop_path: probability that training leaves a sub-layer out, for each sample (Huang et al. 2016).
    """

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(self, config: VisionConfig, drop_path: float) -> None:
        super().__init__()
        self.post_norm = config.post_norm
        self.drop_path = drop_path
        self.norm1 = _norm(config, config.width)
        self.attn = Attention(config)
        self.norm2 = _norm(config, config.width)
        self.mlp = _mlp(config)
        for name in ("gamma_1", "gamma_2"):
            scaled = config.layer_scale_init is not None
            self.register_parameter(name, nn.Parameter(torch.empty(config.width)) if scaled else None)

    def forward(
        self,
        x: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        token_index: Tensor | None = None,
    ) -> Tensor:
        if self.post_norm:
            x = self.norm1.of_branch(x, self.attn(x, cos, sin, token_index), self.gamma_1, self._row_scale(x))
            return self.norm2.of_branch(x, self.mlp(x), self.gamma_2, self._row_scale(x))
        branch = self.attn(self.norm1(x), cos, sin, token_index)
        y, x = self.norm2.of_sum(x, branch, self.gamma_1, self._row_scale(x))
        return x + self._scaled(self.mlp(y), self.gamma_2, self._row_scale(x))

    def _row_scale(self, x: Tensor) -> Tensor | None:
        """0 for a sample whose sub-layer is left out, else 1 / keep, so that the mean stays. `[B]`."""
        if not self.training or self.drop_path == 0:
            return None
        keep = 1 - self.drop_path
        return torch.rand(x.shape[0], device=x.device).lt(keep).to(x.dtype) / keep

    @staticmethod
    def _scaled(branch: Tensor, layer_scale: Tensor | None, row_scale: Tensor | None) -> Tensor:
        if layer_scale is not None:
            branch = branch * layer_scale
        if row_scale is not None:
            branch = branch * row_scale[:, None, None]
        return branch


class VisionTower(Tower):
    """Images -> one embedding per image, taken at the class token.

    Attributes:
        num_patches: patches in an image.
        patch_dropout: share of the patches left out in training; may be changed at any time.
    """

    embeddings: ClassVar[tuple[str, ...]] = ("patch_embed", "pos_embed", "cls_token")

    def __init__(self, config: VisionConfig, embed_dim: int) -> None:
        super().__init__(config.layers)
        self.config = config
        self.num_patches = config.num_patches
        self.patch_dropout = config.patch_dropout
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + config.num_patches, config.width))
        self.rope = RotaryTable(config) if config.rope else None
        last = max(config.layers - 1, 1)
        self.blocks = nn.ModuleList(Block(config, config.drop_path * i / last) for i in range(config.layers))
        self.norm = _norm(config, config.width)
        self.head = nn.Linear(config.width, embed_dim, bias=config.qkv_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values of EVA-CLIP; the last matrix of each branch is the smaller, the deeper its block."""
        self.patch_embed.proj.reset_parameters()
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=_INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_INIT_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, Norm):
                module.reset_parameters()
        with torch.no_grad():
            for depth, block in enumerate(self.blocks, start=1):
                self._reset_block(block, depth)
            self.head.weight.mul_(_HEAD_INIT_FACTOR)

    def _reset_block(self, block: nn.Module, depth: int) -> None:
        last = block.mlp.w3 if self.config.mlp == "swiglu" else block.mlp.fc2
        for linear in (block.attn.proj, last):
            linear.weight.div_(math.sqrt(2 * depth))
        for bias in (block.attn.q_bias, block.attn.v_bias):
            if bias is not None:
                bias.zero_()
        for scale in (block.gamma_1, block.gamma_2):
            if scale is not None:
                scale.fill_(self.config.layer_scale_init)

    def num_kept_patches(self) -> int:
        """Patches that training keeps at the present rate of patch dropout, at least one."""
        return max(1, int(self.num_patches * (1 - self.patch_dropout)))

    def forward(self, images: Tensor, token_index: Tensor | None = None) -> Tensor:
        """Embeddings `[B, embed_dim]` of images `[B, 3, image_size, image_size]`.

        Args:
            images: normalised; cast to the dtype of the weights.
            token_index: int64 `[B, K]`, the patches to keep, each at most once in a row. None keeps all in
                evaluation; in training it is drawn at random when `patch_dropout` isn't 0.
        """
        self._check(images)
        patches = self.patch_embed(images.to(self.patch_embed.proj.weight.dtype))
        if token_index is None and self.training and self.patch_dropout > 0:
            token_index = sample_token_index(
                images.shape[0], self.num_patches, self.num_kept_patches(), device=images.device
            )
        x = token_dropout(patches, token_index, prefix=self.cls_token[0], pos_embed=self.pos_embed[0])
        cos, sin = (None, None) if self.rope is None else (self.rope.cos, self.rope.sin)
        x = self.run_blocks(self.blocks, x, cos, sin, token_index)
        # The norm works on each token by itself, and only the class token is used.
        return self.head(self.norm(x[:, 0]))

    def _check(self, images: Tensor) -> None:
        size = self.config.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(f"images have shape {tuple(images.shape)}; expected [batch, 3, {size}, {size}]")
        if not images.is_floating_point():
            raise TypeError(f"images are {images.dtype}; expected normalised floating-point pixels")
