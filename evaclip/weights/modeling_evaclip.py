"""EVA-CLIP for transformers: `AutoModel.from_pretrained(FOLDER, trust_remote_code=True)`.

`evaclip convert --to transformers` copies this file next to the weights. It needs `pip install 'evakernels[hf]'`.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPOutput

try:
    from evaclip.model.clip import CLIP
    from evaclip.model.config import CLIPConfig, override
    from evaclip.model.vision import RotaryTable
except ImportError as error:
    raise ImportError(f"EVA-CLIP needs evakernels: pip install 'evakernels[hf]' ({error})") from error


class EVACLIPConfig(PretrainedConfig):
    """Configuration of an EVA-CLIP model; `clip` has the options of evaclip's `CLIPConfig`."""

    model_type = "evaclip"

    def __init__(self, clip: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.clip = clip or {}


class EVACLIPModel(PreTrainedModel):
    """EVA-CLIP with the interface of transformers' `CLIPModel`."""

    config_class = EVACLIPConfig
    main_input_name = "pixel_values"

    def __init__(self, config: EVACLIPConfig) -> None:
        super().__init__(config)
        self.clip = CLIP(override(CLIPConfig(), config.clip))
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, RotaryTable):  # from_pretrained makes the model on meta, and the file has no tables
            module.fill(next(self.parameters()).device)

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Embeddings `[B, embed_dim]` of images `[B, 3, height, width]`."""
        return self.clip.encode_image(pixel_values)

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Embeddings `[B, embed_dim]` of token ids `[B, N]`; padding follows the end token, so no mask is needed."""
        return self.clip.encode_text(input_ids)

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None) -> CLIPOutput:
        """Embeddings of length 1 and logits, the cosine similarities times the temperature."""
        images, texts, scale = self.clip(pixel_values, input_ids)
        logits = scale * images @ texts.T
        if self.clip.logit_bias is not None:
            logits = logits + self.clip.logit_bias
        return CLIPOutput(logits_per_image=logits, logits_per_text=logits.T, image_embeds=images, text_embeds=texts)
