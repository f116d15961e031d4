"""Modules on top of the ops."""

from evakernels.nn.layer_norm import LayerNorm, RMSNorm
from evakernels.nn.rope_attention import axial_rope
from evakernels.nn.swiglu import SwiGLU
from evakernels.nn.token_dropout import PatchDropout

__all__ = ["LayerNorm", "PatchDropout", "RMSNorm", "SwiGLU", "axial_rope"]
