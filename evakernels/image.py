"""Images of 8 bits on the CPU, with the bits of Pillow's."""

from . import nn  # noqa: F401 - the ops import it while it imports them
from .ops.resize import level_table, resize

__all__ = ["level_table", "resize"]
