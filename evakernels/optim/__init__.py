"""Optimizers on the library's ops, and gradient clipping."""

from .adamw import AdamW
from .clip_grad import clip_grad_norm_
from .lamb import Lamb

__all__ = ["AdamW", "Lamb", "clip_grad_norm_"]
