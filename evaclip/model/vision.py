"""The vision tower of all EVA-CLIP models, one class with options, and its rotary table."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, empty, nn

from evaclip.model.config import Savings, VisionConfig
from evaclip.model.norm import Norm
from evaclip.model.tower import Tower
from evaclip.model.vision_block import INIT_STD, AttentionPool, Block, class_tokens, reset_linear, vision_norm
from evaclip.packing import PackedImages
from evakernels import Packing, sample_token_index, token_dropout
from evakernels.nn import Linear, axial_rope, linear

_HEAD_INIT_FACTOR = 0.001


class RotaryTable(nn.Module):
    """Table of the two-dimensional rotary embedding (EVA-02, Fang et al. 2023, arXiv 2303.11331).

    Cosines and sines, float32 `[num_patches, head_dim / 2]`, are buffers outside the state dict. They stay exact
    through `.half()`, `.to_empty()` and every other conversion of the model: only the device follows, and the values
    are computed again.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self._config = config
        self.fill(torch.get_default_device())

    def resize(self, config: VisionConfig) -> None:
        """Compute the table for the grid of `config` on its device."""
        self._config = config
        self.fill(self.cos.device)

    def fill(self, device: torch.device) -> None:
        """Compute the table on `device`."""
        for name, values in zip(("cos", "sin"), self._table(device), strict=True):
            self.register_buffer(name, values, persistent=False)

    def of_cells(self, places: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """The tables' rows `[T, head_dim / 2]` of the cells `places` in grids of `sizes`, y and x each, int64 `[T, 2]`.

        The first cell isn't rotated.
        """
        config = self._config
        pairs = torch.arange(config.head_dim // 4, dtype=torch.float64, device=places.device)
        positions = places.double() * (config.pt_hw_seq_len / sizes.double())
        angles = (positions.unsqueeze(2) * config.rope_theta ** (-4 * pairs / config.head_dim)).flatten(1)
        return angles.cos().float(), angles.sin().float()

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        config = self._config
        if device.type == "meta":
            # torch.arange on meta would import torch's compiler, which takes seconds.
            shape = math.prod(config.grid), config.head_dim // 2
            return torch.empty(shape, device=device), torch.empty(shape, device=device)
        size, theta = config.pt_hw_seq_len, config.rope_theta
        return axial_rope(*config.grid, config.head_dim, reference_size=size, theta=theta, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Every conversion of a module calls this. An empty tensor shows the device of the result.
        try:
            device = fn(torch.empty(0, device=self.cos.device)).device
        except NotImplementedError:  # Tensors can't be copied from the meta device, but the table can be computed.
            device = fn(torch.empty(0, device="cpu")).device
        self.fill(device)
        return self


class PatchEmbed(nn.Module):
    """Images `[B, 3, H, W]` -> patches `[B, num_patches, width]`, row by row.

    Pixels of packed patches `[T, 3 * side * side]` -> `[T, width]`.

    Attributes:
        gradient: factor of the gradient that reaches the parameters.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.gradient = 1.0
        self.proj = nn.Conv2d(3, config.width, config.patch_size, config.patch_size)

    def forward(self, images: Tensor) -> Tensor:
        if images.dim() == 2:
            return self._multiply(images)
        # Inference on CPUs is faster as a matmul; with gradients in float32 the convolution is faster.
        if images.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self._multiply(self._grid(images).flatten(1, 2).flatten(2))
        weight, bias = self.proj.weight, self.proj.bias
        assert bias is not None
        patches = F.conv2d(images.to(weight.dtype), weight, bias.to(weight.dtype), self.proj.stride)
        return self._scale_gradient(patches.flatten(2).transpose(1, 2))

    def embed_kept(self, images: Tensor, token_index: Tensor) -> Tensor:
        """Embed only the patches `token_index` `[B, K]`, `[B, K, width]`: a matmul instead of the convolution."""
        grid = self._grid(images)
        rows, columns = token_index // grid.shape[2], token_index % grid.shape[2]
        samples = torch.arange(len(images), device=images.device).unsqueeze(1)
        return self._multiply(grid[samples, rows, columns].flatten(2))

    def _grid(self, images: Tensor) -> Tensor:
        """Pixels as patches `[B, rows, columns, 3, side, side]`."""
        side = self.proj.kernel_size[0]
        grid: Tensor = images.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5)
        return grid

    def _multiply(self, pixels: Tensor) -> Tensor:
        weight = self.proj.weight
        return self._scale_gradient(linear(pixels.to(weight.dtype), weight.flatten(1), self.proj.bias))

    def _scale_gradient(self, patches: Tensor) -> Tensor:
        return patches if self.gradient == 1.0 else patches.detach().lerp(patches, self.gradient)


class VisionTower(Tower):
    """Images -> one embedding per image, from the class token, the mean of the patches, or attention to them.

    Args:
        config: of the tower.
        embed_dim: width of the embedding; 0 for no head.
        savings: memory options.

    Attributes:
        present: `config` with the image size of `set_image_size`.
        num_patches: patches in an image.
        patch_dropout: share of the patches that training drops; may be changed at any time.
    """

    embeddings: ClassVar[tuple[str, ...]] = ("patch_embed", "pos_embed", "cls_token")

    def __init__(self, config: VisionConfig, embed_dim: int, savings: Savings) -> None:
        super().__init__(config.layers, savings)
        self.config = self.present = config
        self.num_patches = config.num_patches
        self.patch_dropout = config.patch_dropout
        self.patch_embed = PatchEmbed(config)
        prefix, width = config.prefix_tokens, config.width
        self.cls_token = nn.Parameter(empty(1, prefix, width)) if prefix else None
        self.pos_embed = nn.Parameter(empty(1, prefix + config.num_patches, width))
        self.resizing: Tensor | None
        self.register_buffer("resizing", None, persistent=False)
        self.rope = RotaryTable(config) if config.rope else None
        self.blocks = nn.ModuleList(Block(config, index) for index in range(config.layers))
        # After mean pooling the last norm has another name.
        is_mean = config.pool == "mean"
        self.norm = None if is_mean else vision_norm(config, width)
        self.fc_norm = vision_norm(config, width) if is_mean else None
        self.attn_pool = AttentionPool(config) if config.pool == "attention" else None
        self.head = Linear(config.width, embed_dim, bias=config.qkv_bias) if embed_dim else None
        self.register_load_state_dict_post_hook(_table_follows_weights)  # type: ignore[no-untyped-call]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as EVA-CLIP."""
        self.patch_embed.proj.reset_parameters()
        for parameter in (self.cls_token, self.pos_embed):
            if parameter is not None:
                nn.init.trunc_normal_(parameter, std=INIT_STD)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.reset_parameters()
        self.last_norm.reset_parameters()
        if self.attn_pool is not None:
            self.attn_pool.reset_parameters()
        self.reset_head()

    def reset_head(self) -> None:
        """Initialize the head alone."""
        if self.head is not None:
            reset_linear(self.head, _HEAD_INIT_FACTOR)

    @property
    def projection(self) -> str:
        return "attn_pool" if self.head is None and self.attn_pool is not None else "head"

    @property
    def last_norm(self) -> Norm:
        """The norm before the head or the pooling."""
        norm = self.norm or self.fc_norm
        assert norm is not None
        return norm

    def set_image_size(self, image_size: int | tuple[int, int]) -> None:
        """Change the image size without changing parameters.

        The position embedding keeps the grid of `config` and is resized in every forward pass, as for weights of
        another image size, but by a matmul with a fixed matrix, which has a deterministic gradient.

        Raises:
            UserError: for a size that isn't a multiple of the patch size.
        """
        self.present = replace(self.config, image_size=image_size)
        self.num_patches = self.present.num_patches
        is_default = self.present.grid == self.config.grid
        self.resizing = None if is_default else resizing(self.config, self.present.grid).to(self.pos_embed.device)
        if self.rope is not None:
            self.rope.resize(self.present)

    def num_kept_patches(self) -> int:
        """Number of patches that training keeps at the current `patch_dropout`, at least one."""
        return max(1, int(self.num_patches * (1 - self.patch_dropout)))

    def forward(self, images: Tensor | PackedImages, token_index: Tensor | None = None) -> Tensor:
        """Embeddings `[B, embed_dim]` of images `[B, 3, height, width]`, or of packed images of any sizes.

        Every packed image has the embedding that it has alone after `set_image_size`.

        Args:
            images: normalised; cast to the dtype of the weights.
            token_index: int64 `[B, K]`, the patches to keep, each at most once in a row. None keeps all, or draws them
                at random in training with `patch_dropout`; packed images keep all, see `drop_patches`.

        Raises:
            TypeError: for images that aren't floating-point.
            ValueError: for images of another size, or `token_index` with packed images.
        """
        pooled = self.pool(images, token_index)
        return pooled if self.head is None else self.head(pooled)

    def pool(self, images: Tensor | PackedImages, token_index: Tensor | None = None) -> Tensor:
        """Input of the head, `[B, width]`; arguments as for `forward`."""
        start: Any = self._start_packed if isinstance(images, PackedImages) else self.start
        x, context = start(images, token_index)
        is_token, packing = self.config.pool == "token", context[-1]
        x = self.run_blocks(self.blocks, x, *context, pooled_last=is_token)
        if not is_token:
            return self.pool_patches(x if self.norm is None else self.norm(x), packing)
        # A norm is per token: only the class token's is needed.
        normed: Tensor = self.last_norm(x[:, 0] if x.dim() == 3 else class_tokens(x, packing)[:, 0])
        return normed

    def pool_patches(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """Pool the patches of tokens `[B, N, width]`, or of packed rows, for the head, `[B, width]`."""
        prefix = self.config.prefix_tokens
        if packing is not None:
            packing = packing._replace(lengths=packing.lengths - prefix)
        if self.attn_pool is None:
            normed: Tensor = self.last_norm(x[:, prefix:].mean(1) if packing is None else _mean(x, packing))
            return normed
        if packing is None:
            x = x[:, prefix:]
            packing = Packing.padded(torch.full(x.shape[:1], x.shape[1], device=x.device), x.shape[1])
            x = x.flatten(0, 1)
        pooled: Tensor = self.attn_pool(x, packing)
        return pooled

    def tokens(self, images: Tensor, token_index: Tensor | None = None) -> Tensor:
        """Outputs of the last block `[B, P + K, width]`, P prefix tokens first, without the last norm."""
        x, context = self.start(images, token_index)
        return self.run_blocks(self.blocks, x, *context, pooled_last=False)

    def start(self, images: Tensor, token_index: Tensor | None = None) -> tuple[Tensor, tuple[Any, ...]]:
        """Input of the first block: tokens `[B, P + K, width]`, and the other arguments of every block."""
        self._check(images)
        if token_index is None and self.training and self.patch_dropout > 0:
            keep = self.num_kept_patches()
            token_index = sample_token_index(images.shape[0], self.num_patches, keep, device=images.device)
        return self._embed(images, token_index), self._tables(token_index)

    def _tables(self, token_index: Tensor | None = None) -> tuple[Tensor | None, ...]:
        return (None,) * 4 if self.rope is None else (self.rope.cos, self.rope.sin, token_index, None)

    def _start_packed(self, images: PackedImages, token_index: Tensor | None) -> tuple[Tensor, tuple[Any, ...]]:
        """As `start`, with the P prefix tokens of each image after its patches, reversed: rows `[T + B P, width]`."""
        columns = self.patch_embed.proj.weight[0].numel()
        if token_index is not None:
            raise ValueError("token_index must be None with packed images: drop_patches(images, share) drops patches")
        if images.patches.ndim != 2 or images.patches.shape[1] != columns:
            raise ValueError(f"images.patches must have shape [T, {columns}], got {tuple(images.patches.shape)}")
        _require_normalized(images.patches)
        count, batch = images.patches.shape[0], images.sizes.shape[0]  # len would fix the batch of a program
        prefix = self.config.prefix_tokens
        total = count + prefix * batch
        packing = Packing.from_lengths(images.lengths + prefix, total, images.max_length + prefix)
        # Row r of image b is patch r - b P, but for the image's last P rows.
        samples, rows = packing.samples(), torch.arange(total, device=images.lengths.device)
        from_end = packing.cu_seqlens[samples + 1] - 1 - rows
        is_prefix = from_end < prefix
        order = torch.where(is_prefix, count + prefix * samples + from_end, rows - prefix * samples)
        sizes = images.sizes[samples]
        # Prefix tokens are at the first cell, without rotation.
        places = F.pad(images.positions, (0, 0, 0, total - count))[order]
        x = self.patch_embed(images.patches)
        first, positions = self.pos_embed[0].split([prefix, self.config.num_patches])
        with torch.autocast(positions.device.type, enabled=False):
            weights = _resizing_of_cells(places, sizes, self.config)
            positions = (weights @ positions.float()).to(first.dtype)
        if self.cls_token is not None:
            tokens = (self.cls_token[0] + first).expand(batch, -1, -1).flatten(0, 1)
            x = torch.cat((x, tokens)).index_select(0, order)
            positions = positions.masked_fill(is_prefix.unsqueeze(1), 0)
        tables = (None, None, None) if self.rope is None else (*self.rope.of_cells(places, sizes), rows)
        return x + positions, (*tables, packing)

    def patch_features(self, images: Tensor) -> Tensor:
        """Every patch through the last norm and the head, `[B, num_patches, embed_dim]`."""
        patches: Tensor = self.last_norm(self.tokens(images)[:, self.config.prefix_tokens :])
        return patches if self.head is None else self.head(patches)

    def _embed(self, images: Tensor, token_index: Tensor | None) -> Tensor:
        """Prefix tokens and kept patches with their positions, `[B, P + K, width]`."""
        prefix, pos_embed = None if self.cls_token is None else self.cls_token[0], self._positions()
        if token_index is None or not self.savings.early_drop:
            return token_dropout(self.patch_embed(images), token_index, prefix=prefix, pos_embed=pos_embed)
        first, positions = pos_embed.split([self.config.prefix_tokens, self.num_patches])
        patches = self.patch_embed.embed_kept(images, token_index) + F.embedding(token_index, positions)
        return patches if prefix is None else torch.cat(((prefix + first).expand(len(images), -1, -1), patches), 1)

    def _positions(self) -> Tensor:
        """Position embedding of prefix tokens and of all patches of the current size, `[P + num_patches, width]`."""
        if self.resizing is None:
            return self.pos_embed[0]
        first, patches = self.pos_embed[0].split([self.config.prefix_tokens, self.config.num_patches])
        with torch.autocast(patches.device.type, enabled=False):
            # Offloaded parameters are gathered on the GPU.
            resized = self.resizing.to(patches.device).float() @ patches.float()
        return torch.cat((first, resized.to(first.dtype)))

    def _check(self, images: Tensor | PackedImages) -> Tensor:
        height, width = self.present.image_shape
        if isinstance(images, PackedImages):
            raise TypeError(f"images must be a tensor [batch, 3, {height}, {width}] here, got PackedImages")
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, height, width):
            raise ValueError(f"images must have shape [batch, 3, {height}, {width}], got {tuple(images.shape)}")
        _require_normalized(images)
        return images


def _mean(x: Tensor, packing: Packing) -> Tensor:
    """Packed rows `[T, width]` -> mean of each sequence, `[B, width]`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = (packing.unpack(x) * packing.mask().unsqueeze(2)).sum(1, dtype=dtype)
    return (total / packing.lengths.unsqueeze(1)).to(x.dtype)


def _require_normalized(pixels: Tensor) -> None:
    if not pixels.is_floating_point():
        raise TypeError(f"images must be normalized floating-point pixels, got {pixels.dtype}")


def resizing(config: VisionConfig, new: tuple[int, int]) -> Tensor:
    """The float32 matrix `[new rows * columns, old rows * columns]` that resizes values of the grid of `config`."""
    identity = torch.eye(config.num_patches).unflatten(1, config.grid).unsqueeze(0)
    return resize_grid(identity, config, new).flatten(2)[0].T.contiguous()


def resize_grid(values: Tensor, config: VisionConfig, new: tuple[int, int]) -> Tensor:
    """Interpolate `[1, C, rows, columns]` for the cells of the grid `new`."""
    size = (max(new), max(new)) if config.pos_square else new
    mode, antialias = config.pos_interpolation, config.pos_antialias
    resized = F.interpolate(values, size, mode=mode, align_corners=False, antialias=antialias)
    return resized[..., : new[0], : new[1]]


def _resizing_of_cells(places: Tensor, sizes: Tensor, config: VisionConfig) -> Tensor:
    """Rows of `resizing` for the cells `places` in grids of `sizes`, int64 `[T, 2]` each: float32 `[T, old cells]`.

    On the device, as one matrix per size would wait for the sizes and depend on them in a compiled graph.
    """
    if config.pos_square:
        sizes = sizes.amax(1, keepdim=True).expand(-1, 2)
    rows, columns = (_interpolation(places[:, axis], sizes[:, axis], config.grid[axis], config) for axis in range(2))
    return (rows.unsqueeze(2) * columns.unsqueeze(1)).flatten(1)


def _interpolation(places: Tensor, sizes: Tensor, old: int, config: VisionConfig) -> Tensor:
    """Weights `[T, old]` of the old cells along one axis, as of `F.interpolate`."""
    center = (places + 0.5) * (old / sizes) - 0.5
    if config.pos_antialias:
        far = (torch.arange(old, device=places.device) - center.unsqueeze(1)).abs()
        weights = _kernel(far / (old / sizes).clamp(min=1).unsqueeze(1), config, -0.5)
        return weights / weights.sum(1, keepdim=True)
    cell = center.floor()
    offsets = torch.arange(-1, 3, device=places.device)
    kernel = _kernel((cell - center).unsqueeze(1).add(offsets).abs(), config, -0.75)
    # Cells beyond the border are the border's.
    taps = (cell.long().unsqueeze(1) + offsets).clamp(0, old - 1)
    is_tap = taps.unsqueeze(2) == torch.arange(old, device=places.device)
    return (kernel.unsqueeze(2) * is_tap).sum(1)


def _kernel(far: Tensor, config: VisionConfig, a: float) -> Tensor:
    """The linear kernel, or the cubic one with parameter `a`, at distances `far`, in cells."""
    if config.pos_interpolation == "bilinear":
        return (1 - far).clamp(min=0)
    near = ((a + 2) * far - (a + 3)) * far**2 + 1
    return torch.where(far <= 1, near, (((a * far - 5 * a) * far + 8 * a) * far - 4 * a) * (far < 2))


def _table_follows_weights(tower: nn.Module, _: Any) -> None:
    # `load_state_dict(assign=True)` gives a tower on the meta device real weights, but no table.
    assert isinstance(tower, VisionTower)
    if tower.rope is not None and tower.rope.cos.device != tower.pos_embed.device:
        tower.rope.fill(tower.pos_embed.device)
