"""The operations that ship, one file per op family, each with its peers. Importing this package registers them all."""

from benchmarks.cases import (
    adamw,
    contrastive,
    dropin,
    gelu,
    gradient_norm,
    lamb,
    layer_norm,
    models,
    packed_attention,
    rope_attention,
    swiglu,
    token_dropout,
)

__all__ = [
    "adamw",
    "contrastive",
    "dropin",
    "gelu",
    "gradient_norm",
    "lamb",
    "layer_norm",
    "models",
    "packed_attention",
    "rope_attention",
    "swiglu",
    "token_dropout",
]
