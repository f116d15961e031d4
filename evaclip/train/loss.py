"""The contrastive loss as a module."""

import math
from typing import Any

from torch import Tensor, nn

from evaclip.train.config import LossConfig
from evakernels.nn import ClipLoss, SigLipLoss

SIGLIP_START = {"init_logit_scale": math.log(10.0), "init_logit_bias": -10.0}
"""Options of a model that is trained with SigLIP (arXiv 2303.15343, section 3.2)."""


class ContrastiveLoss(nn.Module):
    """Loss over the batch of all processes; after a mean over processes its gradients are exact.

    Args:
        config: which loss.
        group: the process group over which features are gathered; None for one process.
    """

    def __init__(self, config: LossConfig, group: Any = None) -> None:
        super().__init__()
        self.processes = 1 if group is None else group.size()
        group = False if group is None else group  # None would mean all that there are
        self.loss: ClipLoss | SigLipLoss
        if config.name == "siglip":
            self.loss = SigLipLoss(group=group)
        else:
            self.loss = ClipLoss(label_smoothing=config.label_smoothing, group=group)

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> Tensor:
        """
        Args:
            image_features: [batch, embed_dim], normalised.
            text_features: [batch, embed_dim], normalised.
            logit_scale: 0-D, already exponentiated.
            logit_bias: 0-D, which siglip alone needs and uses.

        Returns:
            0-D loss of this process.
        """
        scale = (logit_scale, logit_bias) if isinstance(self.loss, SigLipLoss) else (logit_scale,)
        # All processes have equal parts of a batch, and need not ask one another.
        counts = [len(image_features)] * self.processes
        loss: Tensor = self.loss(image_features, text_features, *scale, counts=counts)
        return loss
