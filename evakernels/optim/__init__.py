"""Optimizers on the library's ops, and what clips gradients for any."""

from .adamw import AdamW
from .clip_grad import clip_grad_norm_
from .lamb import Lamb

__all__ = ["AdamW", "Lamb", "clip_grad_norm_"]
