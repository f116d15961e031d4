"""The table of the two-dimensional rotary position embedding (EVA-02, Fang et al. 2023, arXiv 2303.11331)."""

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from evaclip.model.config import VisionConfig
from evakernels.nn import axial_rope


class RotaryTable(nn.Module):
    """Cosines and sines, float32 `[num_patches, head_dim / 2]`, in buffers outside the state dict.

    The table stays exact through `.half()`, `.to_empty()` and every other conversion of the model: only its
    device follows, and the values are computed anew.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self._config = config
        self.fill(torch.get_default_device())

    def resize(self, config: VisionConfig) -> None:
        """Computes the table for the grid of `config`, where it is."""
        self._config = config
        self.fill(self.cos.device)

    def fill(self, device: torch.device) -> None:
        """Computes the table on `device`."""
        for name, values in zip(("cos", "sin"), self._table(device), strict=True):
            self.register_buffer(name, values, persistent=False)

    def _table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        config = self._config
        if device.type == "meta":
            # There, torch.arange has torch import its compiler, which takes seconds.
            shape = math.prod(config.grid), config.head_dim // 2
            return torch.empty(shape, device=device), torch.empty(shape, device=device)
        size, theta = config.pt_hw_seq_len, config.rope_theta
        return axial_rope(*config.grid, config.head_dim, reference_size=size, theta=theta, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # Every conversion of a module ends here. A stand-in shows where the table is to go.
        stand_in = torch.empty(0, device=self.cos.device)
        try:
            device = fn(stand_in).device
        except NotImplementedError:  # Nothing can be copied from the meta device, but the table can be computed.
            device = fn(torch.empty(0, device="cpu")).device
        self.fill(device)
        return self
