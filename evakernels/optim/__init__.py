"""Optimizers on the library's ops."""

from evakernels.optim.adamw import AdamW
from evakernels.optim.lamb import Lamb

__all__ = ["AdamW", "Lamb"]
