"""Fused ops for vision-language models: one schema and one reference per op, any number of backends."""

import ctypes
import sys

from . import image, nn, ops, optim
from ._checkpoint import checkpoint_policy
from ._explain import explain
from ._info import info
from ._version import __version__
from .backends import BackendError, ReferenceWarning, use_backend
from .dropin import ChangedModuleWarning, accelerate, restore
from .nn import layers
from .ops import *  # noqa: F403 - each is listed there
from .optim import clip_grad_norm_
from .packing import Packing

__all__ = [
    "BackendError",
    "ChangedModuleWarning",
    "Packing",
    "ReferenceWarning",
    "__version__",
    "accelerate",
    "checkpoint_policy",
    "clip_grad_norm_",
    "explain",
    "image",
    "info",
    "keep_freed_memory",
    "layers",
    "nn",
    "optim",
    "restore",
    "use_backend",
]
__all__ += ops.__all__


def keep_freed_memory() -> None:
    """Makes glibc keep this process's freed memory for reuse; no effect on other systems.

    By default glibc returns the memory of large activations to the system, and every call maps and zeroes it again,
    which can take longer than an op.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if mallopt is not None:
        mmap_max, trim_threshold = -4, -1  # parameters in glibc's malloc.h
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)
