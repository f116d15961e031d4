"""The contrastive loss as a module, with what it learns itself."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evaclip.train.config import LossConfig
from evakernels.nn import ClipLoss, SigLipLoss

SIGLIP_INITIAL_SCALE = math.log(10.0)
SIGLIP_INITIAL_BIAS = -10.0


class ContrastiveLoss(nn.Module):
    """Loss over the batch of all processes; after a mean over processes its gradients are exact.

    SigLIP's bias is a parameter of this module and not of the model, which has no use for it after training
    (initial values: arXiv 2303.15343, section 3.2).

    Args:
        config: which loss.
        group: the process group over which features are gathered; None for one process.
        counts: samples of each process, which so need not ask one another; none, where there is one process.
    """

    def __init__(self, config: LossConfig, group: Any = None, counts: Sequence[int] | None = None) -> None:
        super().__init__()
        self.logit_bias: nn.Parameter | None = None
        self.counts = counts
        group = False if group is None else group  # None would mean all that there are
        if config.name == "siglip":
            self.loss: ClipLoss | SigLipLoss = SigLipLoss(group=group)
            self.logit_bias = nn.Parameter(torch.tensor(SIGLIP_INITIAL_BIAS))
        else:
            self.loss = ClipLoss(label_smoothing=config.label_smoothing, group=group)

    def forward(self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
        """
        Args:
            image_features: [batch, embed_dim], normalised.
            text_features: [batch, embed_dim], normalised.
            logit_scale: 0-D, already exponentiated.

        Returns:
            0-D loss of this process.
        """
        scale: tuple[Tensor, ...] = (logit_scale,)
        if self.logit_bias is not None:
            scale = (logit_scale, self.logit_bias)
        loss: Tensor = self.loss(image_features, text_features, *scale, counts=self.counts)
        return loss
