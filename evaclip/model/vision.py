"""The vision tower of all EVA-CLIP models: options of one transformer, not a class for each model."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, empty, nn

from evaclip.model.config import VisionConfig
from evaclip.model.rotary import RotaryTable
from evaclip.model.savings import Savings
from evaclip.model.tower import Tower
from evaclip.model.vision_block import INIT_STD, Block, reset_linear, vision_norm
from evakernels import sample_token_index, token_dropout

_HEAD_INIT_FACTOR = 0.001


class PatchEmbed(nn.Module):
    """Images `[B, 3, H, W]` -> patches `[B, num_patches, width]`, row by row."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        patches: Tensor = self.proj(images.to(self.proj.weight.dtype))
        return patches.flatten(2).transpose(1, 2)

    def of_kept(self, images: Tensor, token_index: Tensor) -> Tensor:
        """Only the patches `token_index` `[B, K]`, `[B, K, width]`: one matrix product instead of the convolution."""
        side = self.proj.kernel_size[0]
        grid = images.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # [B, 3, rows, side, columns, side]
        rows, columns = token_index // grid.shape[4], token_index % grid.shape[4]
        samples = torch.arange(len(images), device=images.device).unsqueeze(1)
        pixels = grid.permute(0, 2, 4, 1, 3, 5)[samples, rows, columns].flatten(2)
        return F.linear(pixels.to(self.proj.weight.dtype), self.proj.weight.flatten(1), self.proj.bias)


class VisionTower(Tower):
    """Images -> one embedding per image, taken at the class token.

    Attributes:
        num_patches: patches in an image.
        patch_dropout: share of the patches left out in training; may be changed at any time.
    """

    embeddings: ClassVar[tuple[str, ...]] = ("patch_embed", "pos_embed", "cls_token")

    def __init__(self, config: VisionConfig, embed_dim: int, savings: Savings) -> None:
        super().__init__(config.layers, savings)
        self.config = config
        self.num_patches = config.num_patches
        self.patch_dropout = config.patch_dropout
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(empty(1, 1, config.width))
        self.pos_embed = nn.Parameter(empty(1, 1 + config.num_patches, config.width))
        self.rope = RotaryTable(config) if config.rope else None
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.layers))
        self.norm = vision_norm(config, config.width)
        self.head = nn.Linear(config.width, embed_dim, bias=config.qkv_bias)
        self.register_load_state_dict_post_hook(_table_follows_weights)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start values of EVA-CLIP."""
        self.patch_embed.proj.reset_parameters()
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=INIT_STD)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.reset_parameters()
        self.norm.reset_parameters()
        reset_linear(self.head, _HEAD_INIT_FACTOR)

    def num_kept_patches(self) -> int:
        """Patches that training keeps at the present rate of patch dropout, at least one."""
        return max(1, int(self.num_patches * (1 - self.patch_dropout)))

    def forward(self, images: Tensor, token_index: Tensor | None = None) -> Tensor:
        """Embeddings `[B, embed_dim]` of images `[B, 3, image_size, image_size]`.

        Args:
            images: normalised; cast to the dtype of the weights.
            token_index: int64 `[B, K]`, the patches to keep, each at most once in a row. None keeps all in
                evaluation; in training it is drawn at random where `patch_dropout` isn't 0.

        Raises:
            TypeError: for images that aren't floating-point. ValueError: for images of another size.
        """
        self._check(images)
        if token_index is None and self.training and self.patch_dropout > 0:
            keep = self.num_kept_patches()
            token_index = sample_token_index(images.shape[0], self.num_patches, keep, device=images.device)
        x = self._embed(images, token_index)
        if self.rope is None:
            x = self.run_blocks(self.blocks, x, None, None, None)
        else:
            x = self.run_blocks(self.blocks, x, self.rope.cos, self.rope.sin, token_index)
        # The norm works on each token by itself, and only the class token is used.
        embeddings: Tensor = self.head(self.norm(x[:, 0]))
        return embeddings

    def _embed(self, images: Tensor, token_index: Tensor | None) -> Tensor:
        """Class token and kept patches with their positions, `[B, 1 + K, width]`."""
        prefix, pos_embed = self.cls_token[0], self.pos_embed[0]
        if token_index is None or not self.savings.early_drop:
            return token_dropout(self.patch_embed(images), token_index, prefix=prefix, pos_embed=pos_embed)
        first, positions = pos_embed.split([1, self.num_patches])
        patches = self.patch_embed.of_kept(images, token_index) + F.embedding(token_index, positions)
        return torch.cat(((prefix + first).expand(len(images), -1, -1), patches), 1)

    def _check(self, images: Tensor) -> None:
        size = self.config.image_size
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, size, size):
            raise ValueError(f"images have shape {tuple(images.shape)}; expected [batch, 3, {size}, {size}]")
        if not images.is_floating_point():
            raise TypeError(f"images are {images.dtype}; expected normalised floating-point pixels")


def _table_follows_weights(tower: nn.Module, _: Any) -> None:
    # `load_state_dict(assign=True)` gives a tower on the meta device real weights, but no real table.
    assert isinstance(tower, VisionTower)
    if tower.rope is not None and tower.rope.cos.device != tower.cls_token.device:
        tower.rope.fill(tower.cls_token.device)
