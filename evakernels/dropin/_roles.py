"""Forwards of the roles that child modules have for fused steps, to compare the children with."""

import torch.nn.functional as F
from torch import Tensor

from ._replacement import Replacement
from ._serve import drawn_rows
from ._swap import Swapped
from .torch_modules import LayerNorm, RMSNorm, last_dimension


class Identity(Swapped):
    """The identity."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class Dropout(Swapped):
    """Dropout of elements."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training, self.inplace)


class LayerScale(Swapped):
    """A factor of each channel."""

    def forward(self, x: Tensor) -> Tensor:
        factor: Tensor = self.gamma if hasattr(self, "gamma") else self.lambda1
        return x * factor


class DropPath(Swapped):
    """Stochastic depth."""

    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0 or not self.training:
            return x
        return x * drawn_rows(self, x, x.dtype)


class SiLU(Swapped):
    """The activation."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x)


_FORWARDS = {
    "identity": Identity,
    "dropout": Dropout,
    "layer_norm": LayerNorm,
    "rms_norm": RMSNorm,
    "layer_scale": LayerScale,
    "drop_path": DropPath,
    "silu": SiLU,
}
ROLE_REPLACEMENTS = {role: Replacement(forward, "", "", reason=last_dimension) for role, forward in _FORWARDS.items()}
