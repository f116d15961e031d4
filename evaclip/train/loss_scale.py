"""Dynamic loss scaling that never waits for the device."""

from typing import Any

import torch
from torch import Tensor

_GROWTH = 2.0
_BACKOFF = 0.5
_SMALLEST = 1.0


class LossScale:
    """The rule of `torch.amp.GradScaler`, in tensors.

    `GradScaler.step` reads its overflow flag on the host for every optimizer that is not torch's own; here the flag
    stays on the device, and the optimizer obeys it there.

    Args:
        device: where the scale lives.
        enabled: False for types that need no scaling; the scale is then 1 for good.
        initial: the first scale.
        growth_interval: steps without an overflow after which the scale doubles.
    """

    def __init__(
        self, device: torch.device, enabled: bool, *, initial: float = 2.0**16, growth_interval: int = 2000
    ) -> None:
        self.enabled = enabled
        self.growth_interval = growth_interval
        self.scale = torch.full((), initial if enabled else 1.0, device=device)
        self.clean_steps = torch.zeros((), dtype=torch.int64, device=device)

    def update(self, found_inf: Tensor) -> None:
        """Halves the scale after an overflow (`found_inf` is 1), doubles it after `growth_interval` clean steps."""
        if not self.enabled:
            return
        overflow = found_inf > 0
        clean = torch.where(overflow, 0, self.clean_steps + 1)
        grow = clean >= self.growth_interval
        factor = torch.where(overflow, _BACKOFF, torch.where(grow, _GROWTH, 1.0))
        self.scale.mul_(factor).clamp_(min=_SMALLEST)
        self.clean_steps.copy_(torch.where(grow, 0, clean))

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "clean_steps": self.clean_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scale.copy_(state["scale"])
        self.clean_steps.copy_(state["clean_steps"])
