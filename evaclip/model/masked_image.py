"""Image models of the EVA series for masked image modelling, and their initialization."""

import math
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, empty, nn

from evaclip.errors import UserError
from evaclip.model.config import Preprocess, Savings, VisionConfig
from evaclip.model.vision_block import INIT_STD, Block, reset_linear, vision_norm
from evaclip.model.vision_model import VisionModel
from evaclip.packing import PackedImages
from evakernels import token_dropout
from evakernels.nn import Linear

_WITHIN_ONE = math.erf(math.sqrt(0.5))
"""Share of a normal distribution within one standard deviation."""
_LARGER_WITH_SUB_NORM = ("mlp.w", "attn.proj", "attn.v_proj")


class MaskedImageModel(VisionModel):
    """An EVA image model that predicts a teacher's features of masked patches.

    EVA (Fang et al. 2022, arXiv 2211.07636) and EVA-02 (Fang et al. 2023, arXiv 2303.11331) replace each masked patch
    by a learned token before positions are added, and compute all tokens; a linear layer after the last norm predicts.
    With `decoder_layers` masked patches are dropped instead, as in MAE (He et al. 2022, arXiv 2111.06377): the blocks
    see only visible patches, and that many further blocks after the last norm see all.

    Parameters have the authors' names: `mask_token`, `lm_head`; the further blocks are `decoder_blocks` and
    `decoder_norm`.

    Args:
        config: of the transformer, with `pool="token"`: the last norm applies to every token.
        features: width of the teacher's features.
        decoder_layers: blocks that see all tokens after masked ones were dropped, with `rope`; 0 drops none.
        patch_gradient: factor of the gradient of the patch embedding; less is a more stable start.
        preprocess: of images.
        savings: memory options.

    Raises:
        UserError: for a `config` that masked image modelling can't train.
    """

    embeddings: ClassVar[tuple[str, ...]] = (*VisionModel.embeddings, "mask_token")
    projection = "lm_head"

    def __init__(
        self,
        config: VisionConfig,
        features: int,
        decoder_layers: int = 0,
        patch_gradient: float = 1.0,
        preprocess: Preprocess | None = None,
        savings: Savings | None = None,
    ) -> None:
        for name, only in (("pool", "token"), ("prefix_tokens", 1), ("patch_dropout", 0)):
            if (value := getattr(config, name)) != only:
                raise UserError(f"{name} must be {only} for masked image modelling, got {value}")
        if decoder_layers and not config.rope:
            raise UserError(
                "rope must be True for dropped patches, as the decoder needs the positions of visible ones, got False: "
                "set task.masked=compute"
            )
        super().__init__(config, 0, preprocess, savings)
        self.patch_embed.gradient = patch_gradient
        self.mask_token = nn.Parameter(empty(1, 1, config.width))
        self.lm_head = Linear(config.width, features)
        steady = replace(config, drop_path=0.0)
        self.decoder_blocks = nn.ModuleList(Block(steady, config.layers + i) for i in range(decoder_layers))
        self.decoder_norm = vision_norm(config, config.width) if decoder_layers else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialize as EVA-02, or as EVA without SwiGLU."""
        super().reset_parameters()
        if not hasattr(self, "lm_head"):  # called by the base class before the parameters of this class exist
            return
        for block in self.decoder_blocks:
            assert isinstance(block, Block)
            block.reset_parameters()
        if self.decoder_norm is not None:
            self.decoder_norm.reset_parameters()
        with torch.no_grad():
            assert self.cls_token is not None
            for parameter in (self.cls_token, self.pos_embed, self.mask_token):
                # Normal, truncated at one standard deviation. torch's function redraws as often as necessary: the
                # random states of ranks with shards of a parameter would diverge.
                parameter.uniform_(-_WITHIN_ONE, _WITHIN_ONE).erfinv_().mul_(math.sqrt(2) * INIT_STD)
        reset_linear(self.lm_head)
        if self.config.mlp == "swiglu":
            self._reset_as_eva02()

    def _reset_as_eva02(self) -> None:
        """Xavier initialization; with norms inside the branches some are larger by `sqrt(log(2 * layers))`."""
        kernel = self.patch_embed.proj.weight
        bound = math.sqrt(6 / (kernel[0].numel() + len(kernel)))
        nn.init.uniform_(kernel, -bound, bound)
        sub_norm = self.config.sub_norm
        factor = math.sqrt(math.log(2 * self.config.layers)) if sub_norm else 1.0
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                rows, columns = module.weight.shape
                if not sub_norm and name.endswith(("mlp.w1", "mlp.w2")):
                    rows *= 2  # both are one matrix in the authors' smallest models
                scale = factor if any(part in name for part in _LARGER_WITH_SUB_NORM) else 1.0
                nn.init.normal_(module.weight, std=scale * math.sqrt(2 / (rows + columns)))

    def forward(self, images: Tensor | PackedImages, token_index: Tensor | None = None) -> Tensor:
        """Predictions `[B * K, features]` of the masked patches `token_index`, int64 `[B, K]`, each once in a row.

        Without `token_index` the features of whole images, `[B, width]`: the mean of the last block's patches through
        the last norm, as timm pools these models.

        Args:
            images: normalised, `[B, 3, height, width]`.

        Raises:
            TypeError: for images that aren't floating-point, or packed.
            ValueError: for images of another size.
        """
        result: Tensor
        images = self._check(images)
        if token_index is None:
            result = self.last_norm(self.tokens(images)[:, 1:].mean(1))
            return result
        compute = self._with_mask_tokens if self.decoder_norm is None else self._with_decoder
        # Flat, as a sharded model should not return a view.
        result = self.lm_head(compute(images, token_index).flatten(0, 1))
        return result

    def encode_image(self, images: Tensor | PackedImages, normalize: bool = False) -> Tensor:
        """Features of whole images `[B, width]`, see `forward`; of length 1 if `normalize`."""
        features: Tensor = self(images)
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def _with_mask_tokens(self, images: Tensor, masked: Tensor) -> Tensor:
        """Features of the masked patches, computed with all others."""
        patches = self.patch_embed(images)
        token = self.mask_token.to(patches.dtype).expand(*masked.shape, -1)
        patches = patches.scatter(1, _columns(masked, patches), token)
        assert self.cls_token is not None
        x = token_dropout(patches, None, prefix=self.cls_token[0], pos_embed=self._positions())
        x = self.run_blocks(self.blocks, x, *self._tables(), pooled_last=False)
        predicted: Tensor = self.last_norm(x[:, 1:].gather(1, _columns(masked, x)))
        return predicted

    def _with_decoder(self, images: Tensor, masked: Tensor) -> Tensor:
        """Features of the masked patches, which are added after the blocks."""
        is_masked = torch.zeros(len(masked), self.num_patches, dtype=torch.int8, device=masked.device)
        visible = is_masked.scatter(1, masked, 1).argsort(stable=True, dim=1)[:, : self.num_patches - masked.shape[1]]
        x, context = self.start(images, visible)
        assert self.decoder_norm is not None
        x = self.last_norm(self.run_blocks(self.blocks, x, *context, pooled_last=False))
        mask_tokens = (self.mask_token[0] + self._positions()[1:]).to(x.dtype).expand(len(x), -1, -1)
        patches = mask_tokens.scatter(1, _columns(visible, x), x[:, 1:])
        x = torch.cat((x[:, :1], patches), 1)
        x = self.run_blocks(self.decoder_blocks, x, *self._tables(), pooled_last=False)
        predicted: Tensor = self.decoder_norm(x[:, 1:].gather(1, _columns(masked, x)))
        return predicted


def _columns(index: Tensor, tokens: Tensor) -> Tensor:
    """An index `[B, K]` for all channels of `tokens`, `[B, K, width]`."""
    return index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
