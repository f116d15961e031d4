"""What this process does with memory that is freed."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of parameters in glibc's malloc.h
_NEVER = 2**31 - 1


def keep_freed_memory() -> None:
    """Makes glibc keep this process's freed memory for what comes next, instead of returning it; nothing elsewhere.

    By default the pages of large activations are mapped anew and zeroed at the first touch in every call, which can
    cost more than an op and varies: EVA02-B/16 in bfloat16, laid out by `nn.freeze`, took 350 ms for eight pictures so,
    and 303 ms with this (AMD EPYC, Zen 5, 2 threads, 2026-11-29). The process stays as large as it has been.
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _NEVER)
