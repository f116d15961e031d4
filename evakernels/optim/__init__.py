"""Optimizers on the library's ops, and what clips gradients for any."""

from evakernels.optim.adamw import AdamW
from evakernels.optim.clip_grad import clip_grad_norm_
from evakernels.optim.lamb import Lamb

__all__ = ["AdamW", "Lamb", "clip_grad_norm_"]
