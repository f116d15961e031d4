"""Optimizers on the library's ops."""

from evakernels.optim.lamb import Lamb

__all__ = ["Lamb"]
