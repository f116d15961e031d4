"""Fused ops for vision-language models: one schema and one reference per op, any number of backends."""

from evakernels import nn, ops, optim
from evakernels._checkpoint import checkpoint_policy
from evakernels._info import info
from evakernels._memory import keep_freed_memory
from evakernels._version import __version__
from evakernels.backends import BackendError, ReferenceWarning, explain, set_loss_products, use_backend
from evakernels.dropin import ChangedModuleWarning, accelerate, restore
from evakernels.ops import *  # noqa: F403 - each is listed there
from evakernels.optim import clip_grad_norm_

__all__ = [
    "BackendError",
    "ChangedModuleWarning",
    "ReferenceWarning",
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
