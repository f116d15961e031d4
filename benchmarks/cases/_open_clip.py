"""open_clip's EVA-CLIP for every configuration here, even without a name in open_clip."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip import CLIPConfig
from evaclip.model.config import TextConfig, VisionConfig


class PlainClip(nn.Module):
    """open_clip's EVA-CLIP from a configuration here, parameters on the meta device and named as in open_clip."""

    def __init__(self, config: CLIPConfig, device: torch.device) -> None:
        super().__init__()
        with torch.device("meta"):
            self.visual = nn.ModuleDict({"trunk": _plain_vision(config.vision, config.embed_dim)})
            self.text = _plain_text(config.text, config.embed_dim)
            self.logit_scale = nn.Parameter(torch.empty(()))
        self._fill_tables(config.vision, device)

    def forward(
        self, images: Tensor, texts: Tensor, token_index: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Features of length 1, and the temperature; with `token_index` `[B, K]` only of these patches."""
        trunk: Any = self.visual["trunk"]
        trunk.patch_drop = None if token_index is None else partial(_keep_patches, token_index)
        image_features = F.normalize(self.visual["trunk"](images), dim=-1)
        return image_features, F.normalize(self.text(texts), dim=-1), self.logit_scale.exp()

    def _fill_tables(self, config: VisionConfig, device: torch.device) -> None:
        """Fill the buffers: the causal mask, rotary positions, and the bias of zeros on k."""
        from timm.layers.pos_embed_sincos import RotaryEmbeddingCat

        text: Any = self.text
        trunk: Any = self.visual["trunk"]
        text.attn_mask = text.build_causal_mask().to(device)
        if config.rope:
            side, reference = list(config.grid), [config.pt_hw_seq_len] * 2
            trunk.rope = RotaryEmbeddingCat(
                config.head_dim,
                temperature=config.rope_theta,
                in_pixels=False,
                feat_shape=side,
                ref_feat_shape=reference,
            ).to(device)
        for block in trunk.blocks:
            if getattr(block.attn, "k_bias", None) is not None:
                block.attn.k_bias = torch.zeros(config.width, device=device)


def _keep_patches(token_index: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """timm's patch dropout behind the class token, with the given patches."""
    prefix, patches = tokens[:, :1], tokens[:, 1:]
    kept = patches.gather(1, token_index.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    return torch.cat((prefix, kept), dim=1), token_index


def _plain_vision(config: VisionConfig, embed_dim: int) -> nn.Module:
    from timm.layers.norm import LayerNorm, RmsNorm
    from timm.models.eva import Eva

    norm = LayerNorm if config.norm == "layer_norm" else RmsNorm
    model: nn.Module = Eva(
        img_size=config.image_size,
        patch_size=config.patch_size,
        num_classes=embed_dim,
        global_pool="token",
        embed_dim=config.width,
        depth=config.layers,
        num_heads=config.heads,
        qkv_bias=config.qkv_bias,
        qkv_fused=not config.sub_norm,
        mlp_ratio=config.mlp_ratio,
        swiglu_mlp=config.mlp == "swiglu",
        scale_mlp=config.sub_norm,
        scale_attn_inner=config.sub_norm,
        norm_layer=partial(norm, eps=config.norm_eps),
        init_values=config.layer_scale_init,
        use_rot_pos_emb=config.rope,
        use_post_norm=config.post_norm,
    )
    if not config.qkv_bias:
        model.head = nn.Linear(config.width, embed_dim, bias=False)
    return model


def _plain_text(config: TextConfig, embed_dim: int) -> nn.Module:
    from open_clip.transformer import LayerNorm, TextTransformer

    model: nn.Module = TextTransformer(
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        width=config.width,
        heads=config.heads,
        layers=config.layers,
        mlp_ratio=config.mlp_ratio,
        output_dim=embed_dim,
        norm_layer=partial(LayerNorm, eps=config.norm_eps),
    )
    return model
