"""The contrastive losses as modules."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..distributed import Group
from ..ops.contrastive import MEMORY_BUDGET, clip_loss, siglip_loss


class ClipLoss(nn.Module):
    """`evakernels.clip_loss` over the global batch of `group`.

    Args:
        label_smoothing, memory_budget: as in `clip_loss`.
        group: None for all ranks, which must all call it; False for this rank alone, as in `clip_loss`.
    """

    def __init__(self, label_smoothing: float = 0.0, group: Group = None, memory_budget: int = MEMORY_BUDGET) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.group = group
        self.memory_budget = memory_budget

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, *, counts: Sequence[int] | None = None
    ) -> Tensor:
        """Features `[b, D]` and the exponentiated scale to a 0-D float32 loss; `counts` as in `clip_loss`."""
        return clip_loss(
            image_features,
            text_features,
            logit_scale,
            label_smoothing=self.label_smoothing,
            group=self.group,
            counts=counts,
            memory_budget=self.memory_budget,
        )

    def extra_repr(self) -> str:
        return f"label_smoothing={self.label_smoothing}"


class SigLipLoss(nn.Module):
    """`evakernels.siglip_loss` over the global batch of `group`; arguments as for `ClipLoss`."""

    def __init__(self, group: Group = None) -> None:
        super().__init__()
        self.group = group

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        logit_bias: Tensor,
        *,
        counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Features `[b, D]`, the exponentiated scale and the bias to a 0-D float32 loss; `counts` as in `ClipLoss`."""
        return siglip_loss(image_features, text_features, logit_scale, logit_bias, group=self.group, counts=counts)
