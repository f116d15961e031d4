"""Modules on top of the ops."""

from evakernels.nn.contrastive import ClipLoss, SigLipLoss
from evakernels.nn.frozen import FrozenWeight, freeze, unfreeze
from evakernels.nn.layer_norm import LayerNorm, RMSNorm
from evakernels.nn.linear import Linear, linear
from evakernels.nn.rope_attention import RotaryAttention, axial_rope
from evakernels.nn.swiglu import SwiGLU
from evakernels.nn.token_dropout import PatchDropout

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
    "unfreeze",
]
