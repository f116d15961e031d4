"""Modules on top of the ops."""

from .contrastive import ClipLoss, SigLipLoss
from .frozen import FrozenWeight, freeze, unfreeze
from .layer_norm import LayerNorm, RMSNorm
from .linear import Linear, linear
from .rope_attention import RotaryAttention, axial_rope, rotate
from .swiglu import SwiGLU
from .token_dropout import PatchDropout

__all__ = [
    "ClipLoss",
    "FrozenWeight",
    "LayerNorm",
    "Linear",
    "PatchDropout",
    "RMSNorm",
    "RotaryAttention",
    "SigLipLoss",
    "SwiGLU",
    "axial_rope",
    "freeze",
    "linear",
    "rotate",
    "unfreeze",
]
