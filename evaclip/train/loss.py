"""The contrastive loss as a module."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evaclip.train.config import LossConfig
from evakernels import clip_loss, siglip_loss
from evakernels.distributed import gather_rows, resolved
from evakernels.nn import ClipLoss, SigLipLoss

SIGLIP_START = {"init_logit_scale": math.log(10.0), "init_logit_bias": -10.0}
"""Options of a model that is trained with SigLIP (arXiv 2303.15343, section 3.2)."""
_TILE = 1 << 24
"""Similarities at a time, 64 MiB."""


class ContrastiveLoss(nn.Module):
    """Loss over the batch of all processes; after a mean over processes its gradients are exact.

    Args:
        config: which loss.
        group: the process group over which features are gathered; None for one process.
        counts: samples of each process, which so need not ask one another; none, where there is one process.
    """

    def __init__(self, config: LossConfig, group: Any = None, counts: Sequence[int] | None = None) -> None:
        super().__init__()
        self.counts = counts
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
        loss: Tensor = self.loss(image_features, text_features, *scale, counts=self.counts)
        return loss

    @torch.no_grad()
    def accuracy(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Share of images that match their own caption best; average it over ranks.

        Of equal ones the first counts, so that features that are all alike have no more than chance.

        Args:
            image_features, text_features: [batch, embed_dim], normalised.

        Returns:
            0-D float32, on the device.
        """
        op, counts = "accuracy", self.counts or [len(image_features)]
        text, offset = gather_rows(op, "text_features", text_features, resolved(op, self.loss.group), counts)
        own = torch.arange(offset, offset + len(image_features), device=text.device)
        rows = max(1, _TILE // len(text))
        tiles = zip(image_features.float().split(rows), own.split(rows), strict=True)
        text = text.float().T
        hits = torch.cat([(image @ text).argmax(1) == label for image, label in tiles]).sum()
        # Processes may have unequal parts of the batch.
        return hits * (len(counts) / sum(counts))

    @torch.no_grad()
    def of_set(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> Tensor:
        """The loss of these pairs in this process alone, without label smoothing.

        Args:
            image_features, text_features: [pairs, embed_dim] float32, normalised.
            logit_scale, logit_bias: as for the loss itself.

        Returns:
            0-D float32.
        """
        pairs = image_features, text_features, logit_scale
        if isinstance(self.loss, ClipLoss):
            return clip_loss(*pairs, group=False)
        assert logit_bias is not None
        return siglip_loss(*pairs, logit_bias, group=False)
