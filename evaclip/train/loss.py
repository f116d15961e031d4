"""The contrastive loss of the global batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from evaclip.train.config import LossConfig
from evakernels import clip_loss, siglip_loss
from evakernels.distributed import gather_rows, resolved

SIGLIP_START = {"init_logit_scale": math.log(10.0), "init_logit_bias": -10.0}
"""Options of a model that is trained with SigLIP (arXiv 2303.15343, section 3.2)."""
_TILE = 1 << 24
"""Similarities at a time, 64 MiB."""


@dataclass(frozen=True)
class ContrastiveLoss:
    """Loss over the global batch; its gradients are exact after a mean over ranks.

    Attributes:
        config: which loss.
        group: process group over which features are gathered; None for one rank.
        counts: samples of each rank, so that ranks need not ask each other; None for one rank.
    """

    config: LossConfig
    group: Any = None
    counts: Sequence[int] | None = None

    def __call__(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> Tensor:
        """The 0-D loss of this rank.

        Args:
            image_features, text_features: [batch, embed_dim], normalised.
            logit_scale: 0-D, already exponentiated.
            logit_bias: 0-D, for siglip only.
        """
        features, group = (image_features, text_features, logit_scale), self._group
        if self.config.name == "siglip":
            assert logit_bias is not None
            return siglip_loss(*features, logit_bias, group=group, counts=self.counts)
        return clip_loss(*features, label_smoothing=self.config.label_smoothing, group=group, counts=self.counts)

    @torch.no_grad()
    def accuracy(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Fraction of images that match their own caption best; average it over ranks.

        The first of equal similarities counts, so that equal features give no more than chance.

        Args:
            image_features, text_features: [batch, embed_dim], normalised.

        Returns:
            0-D float32, on the device.
        """
        op, counts = "accuracy", self.counts or [len(image_features)]
        text, offset = gather_rows(op, "text_features", text_features, resolved(op, self._group), counts)
        targets = torch.arange(offset, offset + len(image_features), device=text.device)
        rows = max(1, _TILE // len(text))
        tiles = zip(image_features.float().split(rows), targets.split(rows), strict=True)
        text = text.float().T
        hits = torch.cat([(image @ text).argmax(1) == label for image, label in tiles]).sum()
        # Ranks may have unequal shares of the batch.
        return hits * (len(counts) / sum(counts))

    @property
    def _group(self) -> Any:
        """For the ops, which take False for one rank and None for all."""
        return False if self.group is None else self.group
