"""CLIP: two towers and a temperature."""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip.model.config import CLIPConfig, Savings
from evaclip.model.hf_text import HFTextTower
from evaclip.model.text import TextTower
from evaclip.model.vision import VisionTower
from evaclip.packing import PackedImages
from evakernels import Packing


class CLIP(nn.Module):
    """EVA-CLIP (Sun et al. 2023, arXiv 2303.15389): images and texts in one space.

    Args:
        config: of both towers.
        savings: memory options.

    Attributes:
        visual, text: the towers.
        logit_scale: 0-D, the logarithm of the factor of the cosine similarities.
        logit_bias: 0-D, the bias of SigLIP; None for a model without one.
        config: of the model.
        context_length: maximum number of tokens of a text.
    """

    def __init__(self, config: CLIPConfig, savings: Savings | None = None) -> None:
        super().__init__()
        savings = savings or Savings()
        self.visual = VisionTower(config.vision, config.image_projection, savings)
        self.text: TextTower | HFTextTower
        if config.text.hf_model_name is None:
            self.text = TextTower(config.text, config.embed_dim, savings)
        else:
            self.text = HFTextTower(config.text, config.embed_dim, savings)
        self.config = replace(config, text=self.text.config)
        self.logit_scale = nn.Parameter(torch.tensor(float(config.init_logit_scale)))
        bias = config.init_logit_bias
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor(float(bias)))

    def reset_parameters(self) -> None:
        """Start values for training from scratch, as after construction."""
        self.visual.reset_parameters()
        self.text.reset_parameters()
        nn.init.constant_(self.logit_scale, self.config.init_logit_scale)
        if self.logit_bias is not None:
            nn.init.constant_(self.logit_bias, self.config.init_logit_bias or 0.0)

    def set_savings(self, savings: Savings) -> None:
        """Set the memory options of both towers from the next forward pass on."""
        self.visual.savings = self.text.savings = savings

    @property
    def context_length(self) -> int:
        return self.config.text.context_length

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Checkpoint whole blocks in training: only their inputs are saved for backward.

        Example:
            `model.set_grad_checkpointing()`
        """
        self.set_savings(replace(self.visual.savings, recompute="block" if enable else "none"))

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        """Freeze the image tower (LiT, Zhai et al. 2022, arXiv 2111.07991); call before the optimizer is made.

        Args:
            unlocked_groups: groups that stay trainable, from the output: the projection or attention pooling, the last
                block with the norm after it, each block before it, the embeddings.
            freeze_bn_stats: no effect, as there is no batch norm.

        Example:
            `model.lock_image_tower(unlocked_groups=2)`
        """
        self.visual.lock(unlocked_groups)

    def lock_text_tower(self, unlocked_layers: int = 0, freeze_layer_norm: bool = True) -> None:
        """Freeze the text tower, as `lock_image_tower`; `freeze_layer_norm` has no effect: frozen blocks include norms.

        The projection of an encoder of transformers is always trained and isn't counted, as in open_clip.

        Example:
            `model.lock_text_tower()`
        """
        self.text.lock(unlocked_layers)

    def encode_image(
        self, images: Tensor | PackedImages, normalize: bool = False, *, token_index: Tensor | None = None
    ) -> Tensor:
        """Embeddings `[B, embed_dim]` of images, of length 1 if `normalize`.

        Args:
            images: preprocessed, `[B, 3, image_size, image_size]`, or of any sizes by `evaclip.pack_images`.
            normalize: divide by the L2 norm.
            token_index: int64 `[B, K]`, the patches to keep; see `VisionTower.forward`.
        """
        features = self.visual(images, token_index)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor, normalize: bool = False, *, packing: Packing | None = None) -> Tensor:
        """Embeddings `[B, embed_dim]` of token ids `[B, N]`, of length 1 if `normalize`; `packing` as for the tower."""
        features = self.text(tokens, packing)
        return F.normalize(features, dim=-1) if normalize else features

    def get_logits(self, images: Tensor | PackedImages, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[B, M]` of B images as for `encode_image` and token ids `[M, N]`, and their transpose.

        Cosine similarities times `logit_scale.exp()`, plus `logit_bias` if the model has one.

        Example:
            `model.get_logits(images, tokenizer(names))[0].softmax(-1)`; with a `logit_bias` `.sigmoid()`
        """
        image_features, text_features, scale = self(images, tokens)
        logits = scale * image_features @ text_features.T
        if self.logit_bias is not None:
            logits = logits + self.logit_bias
        return logits, logits.T

    def forward(
        self,
        images: Tensor | PackedImages,
        tokens: Tensor,
        *,
        token_index: Tensor | None = None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`(image_features, text_features, logit_scale.exp())`, features `[B, embed_dim]` of length 1.

        `token_index` and `packing` as for the towers.
        """
        image_features = self.encode_image(images, normalize=True, token_index=token_index)
        text_features = self.encode_text(tokens, normalize=True, packing=packing)
        return image_features, text_features, self.logit_scale.exp()
