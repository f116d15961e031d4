"""What the children that a fused step reads do: forwards to compare those of an unknown form with."""

import torch.nn.functional as F
from torch import Tensor

from evakernels.dropin._rule import Rule
from evakernels.dropin._serve import drawn_rows
from evakernels.dropin._swap import Swapped
from evakernels.dropin.timm import LayerNorm
from evakernels.dropin.torch_modules import RMSNorm


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
    "layer_norm": LayerNorm,
    "rms_norm": RMSNorm,
    "layer_scale": LayerScale,
    "drop_path": DropPath,
    "silu": SiLU,
}
ROLE_RULES = {role: Rule(forward, f"{role}.", "") for role, forward in _FORWARDS.items()}
