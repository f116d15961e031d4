"""The operations that ship, one file per op family, each with its peers. Importing this package registers them all."""

from benchmarks.cases import contrastive, lamb, layer_norm, models, rope_attention, swiglu, token_dropout

__all__ = ["contrastive", "lamb", "layer_norm", "models", "rope_attention", "swiglu", "token_dropout"]
