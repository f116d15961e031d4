"""The ops: argument checks, autograd and public docstring, one file per family."""

from ._op import as_torch_operators
from .adamw import adamw_update
from .contrastive import clip_loss, contrastive_statistics, siglip_loss
from .gelu import gelu
from .gradient_norm import gradient_norm
from .lamb import lamb_apply, lamb_step, lamb_update
from .layer_norm import add_layer_norm, add_rms_norm, layer_norm, layer_norm_add, rms_norm, rms_norm_add
from .packed_attention import packed_attention
from .rope_attention import rope_attention
from .swiglu import swiglu
from .swiglu_mlp import swiglu_mlp
from .token_dropout import sample_token_index, token_dropout

__all__ = [
    "adamw_update",
    "add_layer_norm",
    "add_rms_norm",
    "as_torch_operators",
    "clip_loss",
    "contrastive_statistics",
    "gelu",
    "gradient_norm",
    "lamb_apply",
    "lamb_step",
    "lamb_update",
    "layer_norm",
    "layer_norm_add",
    "packed_attention",
    "rms_norm",
    "rms_norm_add",
    "rope_attention",
    "sample_token_index",
    "siglip_loss",
    "swiglu",
    "swiglu_mlp",
    "token_dropout",
]
