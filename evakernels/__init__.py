"""Fused ops for vision-language models: one schema and one reference per op, any number of backends."""

from . import nn, ops, optim
from ._checkpoint import checkpoint_policy
from ._explain import explain
from ._info import info
from ._memory import keep_freed_memory
from ._version import __version__
from .backends import BackendError, ReferenceWarning, set_loss_products, use_backend
from .dropin import UnknownFormWarning, accelerate, restore
from .ops import *  # noqa: F403 - each is listed there
from .optim import clip_grad_norm_

__all__ = [
    "BackendError",
    "ReferenceWarning",
    "UnknownFormWarning",
    "__version__",
    "accelerate",
    "checkpoint_policy",
    "clip_grad_norm_",
    "explain",
    "info",
    "keep_freed_memory",
    "nn",
    "optim",
    "restore",
    "set_loss_products",
    "use_backend",
]
__all__ += ops.__all__
