"""Fused ops for vision-language models: one schema and one reference per op, any number of backends."""

from evakernels import nn, optim
from evakernels._checkpoint import checkpoint_policy
from evakernels._info import info
from evakernels._memory import keep_freed_memory
from evakernels._version import __version__
from evakernels.backends import BackendError, ReferenceWarning, explain, set_loss_products, use_backend
from evakernels.dropin import UnknownFormWarning, accelerate, restore
from evakernels.ops import (
    adamw_update,
    add_layer_norm,
    add_rms_norm,
    as_torch_operators,
    clip_loss,
    contrastive_statistics,
    gelu,
    gradient_norm,
    lamb_apply,
    lamb_step,
    lamb_update,
    layer_norm,
    layer_norm_add,
    packed_attention,
    rms_norm,
    rms_norm_add,
    rope_attention,
    sample_token_index,
    siglip_loss,
    swiglu,
    token_dropout,
)
from evakernels.optim import clip_grad_norm_

__all__ = [
    "BackendError",
    "ReferenceWarning",
    "UnknownFormWarning",
    "__version__",
    "accelerate",
    "adamw_update",
    "add_layer_norm",
    "add_rms_norm",
    "as_torch_operators",
    "checkpoint_policy",
    "clip_grad_norm_",
    "clip_loss",
    "contrastive_statistics",
    "explain",
    "gelu",
    "gradient_norm",
    "info",
    "keep_freed_memory",
    "lamb_apply",
    "lamb_step",
    "lamb_update",
    "layer_norm",
    "layer_norm_add",
    "nn",
    "optim",
    "packed_attention",
    "restore",
    "rms_norm",
    "rms_norm_add",
    "rope_attention",
    "sample_token_index",
    "set_loss_products",
    "siglip_loss",
    "swiglu",
    "token_dropout",
    "use_backend",
]
