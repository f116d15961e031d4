"""Names and shapes of CLIP's text tower and of SigLIP 2 in transformers."""

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

TEXT = "text_model."
"""Prefix of the text tower's parameters."""
_SIGNS = frozenset({"vision_model.head.probe", "text_model.head.weight"})
# Parts of transformers' names -> ours, or timm's of the image tower, replaced in this order.
_NAMES = {
    "text": {
        "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
        "head.weight": "text_projection",
        "head.bias": "text_projection_bias",
        "encoder.layers": "transformer.resblocks",
        "self_attn.qkv.": "attn.in_proj_",
        "self_attn": "attn",
        "layer_norm": "ln_",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    },
    "vision": {
        "embeddings.patch_embedding": "embeds.proj",
        "embeddings.position_embedding.weight": "embeds.pos_embed",
        "post_layernorm": "norm",
        "head.probe": "attn_pool.latent",
        "head.attention.out_proj": "attn_pool.proj",
        "head.attention": "attn_pool",
        "head.layernorm": "attn_pool.norm",
        "head.mlp": "attn_pool.mlp",
        "encoder.layers": "blocks",
        "self_attn.out_proj": "attn.proj",
        "self_attn": "attn",
        "layer_norm": "norm",
    },
}


def is_siglip2(state: Mapping[str, Tensor]) -> bool:
    """Whether `state` has the names of a `Siglip2Model`."""
    return state.keys() >= _SIGNS


def rename_tower(state: Mapping[str, Tensor], tower: Literal["text", "vision"]) -> dict[str, Tensor]:
    """A tower of a model of transformers, with q, k and v packed: the image tower under timm's names of NaFlexVit."""
    prefix = f"{tower}_model."
    weights = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    weights.pop("embeddings.position_ids", None)
    for name in [name for name in weights if ".q_proj." in name]:
        names = [name.replace(".q_proj.", f".{kind}_proj.") for kind in "qkv"]
        if all(name in weights for name in names):
            weights[name.replace(".q_proj.", ".qkv.")] = torch.cat([weights.pop(each) for each in names])
    for kind in ("weight", "bias"):
        if (joined := weights.pop(f"head.attention.in_proj_{kind}", None)) is not None:
            q, kv = joined.tensor_split([len(joined) // 3])
            weights |= {f"head.attention.q.{kind}": q, f"head.attention.kv.{kind}": kv}
    renamed = {}
    for name, tensor in weights.items():
        for old, new in _NAMES[tower].items():
            name = name.replace(old, new)
        renamed[name] = tensor
    if "text_projection" in renamed:
        renamed["text_projection"] = renamed["text_projection"].T.contiguous()
    return renamed
