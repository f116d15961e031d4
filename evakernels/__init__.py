"""Fused kernels for vision-language models: one schema and one reference per op, any number of backends."""

from evakernels.backends import BackendError, explain, use_backend
from evakernels.ops import *  # noqa: F403
from evakernels.ops import __all__ as _ops

__all__ = ["BackendError", "explain", "use_backend", *_ops]
