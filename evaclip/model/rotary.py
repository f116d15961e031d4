"""The table of the two-dimensional rotary position embedding (EVA-02, Fang et al. 2023, arXiv 2303.11331)."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from evaclip.model.config import VisionConfig


def rotary_angles(config: VisionConfig, device: torch.device | str = "cpu") -> Tensor:
    """Angles in radians, float64 `[num_patches, head_dim / 2]`, one for each rotated pair of channels.

    The first half of the pairs turns with the row of the patch, the second half with its column. Positions
    along a side are stretched to `pt_hw_seq_len`, so that a model sees the same range of angles at every
    resolution.
    """
    bands = config.head_dim // 4
    frequencies = config.rope_theta ** (-torch.arange(bands, dtype=torch.float64, device=device) / bands)
    positions = (
        torch.arange(config.grid, dtype=torch.float64, device=device) / config.grid * config.pt_hw_seq_len
    )
    axis = positions[:, None] * frequencies
    rows = axis[:, None, :].expand(config.grid, config.grid, bands)
    columns = axis[None, :, :].expand(config.grid, config.grid, bands)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


class RotaryTable(nn.Module):
    """Cosines and sines, float32 `[num_patches, head_dim / 2]`, in buffers outside the state dict.

    The table stays exact through `.half()`, `.to_empty()` and every other conversion of the model: only its
    device follows, and the values are computed anew. A model in float64 has a float64 table.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self._config = config
        self.fill(torch.get_default_device(), torch.float32)

    def fill(self, device: torch.device, dtype: torch.dtype) -> None:
        """Computes the table on `device`."""
        angles = rotary_angles(self._config, device)
        self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sin", angles.sin().to(dtype), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Every conversion of a module ends here. A stand-in shows where the table is to go, because the
        # buffers themselves may be on the meta device, which they can't be copied from.
        device = torch.device("cpu") if self.cos.is_meta else self.cos.device
        target = fn(torch.empty(0, dtype=self.cos.dtype, device=device))
        self.fill(target.device, torch.float64 if target.dtype == torch.float64 else torch.float32)
        return self
