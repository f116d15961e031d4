"""Images of 8 bits on the CPU, with the bits of Pillow's."""

from . import _native
from . import nn as nn  # the ops import it while it imports them
from .ops.resize import level_table, pixels, resize

__all__ = ["COMPILED", "level_table", "pixels", "resize"]

COMPILED: bool = _native.implemented("resize", "cpu")
"""Whether `resize` has a kernel here, and so is faster than Pillow."""
