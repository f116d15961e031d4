"""Image models of the EVA series alone: classifiers, and starting points of CLIP training."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from evaclip.errors import UserError
from evaclip.model.config import Pool, Preprocess, Savings, VisionConfig
from evaclip.model.norm import Stream
from evaclip.model.vision import VisionTower
from evaclip.model.vision_block import Block
from evaclip.packing import PackedImages
from evakernels.nn import Linear


class VisionModel(VisionTower):
    """An EVA image model with its classifier (EVA, Fang et al. 2022; EVA-02, Fang et al. 2023).

    The methods are those of timm's models; the names of parameters are the authors'.

    Args:
        config: of the transformer.
        num_classes: of the classifier; 0 for none.
        preprocess: of images.
        savings: memory options.

    Attributes:
        num_classes: of the classifier.
        num_features: channels of a token.
    """

    def __init__(
        self,
        config: VisionConfig,
        num_classes: int = 0,
        preprocess: Preprocess | None = None,
        savings: Savings | None = None,
    ) -> None:
        super().__init__(config, num_classes, savings or Savings())
        self.num_classes = num_classes
        self.num_features = config.width
        self.preprocess = preprocess or Preprocess()

    def forward_features(self, images: Tensor, token_index: Tensor | None = None) -> Tensor:
        """Tokens `[B, P + K, width]`, prefix tokens first; after the last norm, unless that follows the pooling."""
        tokens = self.tokens(images, token_index)
        return tokens if self.norm is None else self.norm(tokens)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits `[B, num_classes]` from the outputs of `forward_features`, or the classifier's input."""
        x = tokens[:, 0] if self.config.pool == "token" else self.pool_patches(tokens)
        return x if pre_logits or self.head is None else self.head(x)

    def encode_image(self, images: Tensor | PackedImages, normalize: bool = False) -> Tensor:
        """The classifier's input `[B, width]` of images as for `forward`, of length 1 if `normalize`."""
        features = self.pool(images)
        return F.normalize(features, dim=-1) if normalize else features

    def forward_intermediates(
        self, images: Tensor, indices: int | Sequence[int] | None = None, *, norm: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        """Outputs of `forward_features`, and the patches after some blocks as images `[B, width, rows, columns]`.

        Args:
            images: as for `forward`.
            indices: blocks; an int for the last so many, None for all. Negative ones count from the end.
            norm: whether to apply the last norm to them, unless it follows the pooling.

        Raises:
            UserError: for a block that doesn't exist.
        """
        chosen = self._blocks(indices)
        x, context = self.start(images)
        stream, outputs = Stream(x), dict[int, Tensor]()
        for index, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            stream = block(stream, *context, False)
            if index in chosen:
                x = stream.total()
                patches = (x if self.norm is None or not norm else self.norm(x))[:, self.config.prefix_tokens :]
                outputs[index] = patches.transpose(1, 2).unflatten(2, self.present.grid)
        x = stream.total()
        return x if self.norm is None else self.norm(x), [outputs[index] for index in chosen]

    def reset_classifier(self, num_classes: int, pool: Pool | None = None) -> None:
        """Give the model a new, initialized classifier.

        Raises:
            UserError: if `pool` differs from the trained last norm's.
        """
        if pool is not None and pool != self.config.pool:
            raise UserError(f"pool must be {self.config.pool!r}, for which the last norm was trained, got {pool!r}")
        self.num_classes, like = num_classes, self.pos_embed
        self.head = None
        if num_classes:
            self.head = Linear(self.num_features, num_classes, device=like.device, dtype=like.dtype)
            self.reset_head()

    def _blocks(self, indices: int | Sequence[int] | None) -> list[int]:
        count = self.layers
        if indices is None:
            return list(range(count))
        if isinstance(indices, int):
            indices = range(-indices, 0)
        if any(not -count <= index < count for index in indices):
            raise UserError(f"indices must be blocks from {-count} to {count - 1}, got {list(indices)}")
        return [index % count for index in indices]
