"""What training on a CPU asks of the machine: memory that stays, and cores for the data workers."""

import ctypes
import os
import resource
import sys

import torch

from evaclip.machine import multiplies_bfloat16

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of parameters in glibc's malloc.h
_NEVER = 2**31 - 1


def prepare(device: torch.device, workers: int) -> None:
    """Does for training on a CPU what the other functions say; does nothing for another device."""
    if device.type == "cpu":
        keep_freed_memory()
        leave_cores_to_workers(workers)


def keep_freed_memory() -> None:
    """Makes glibc keep freed memory for what comes next instead of returning it; does nothing on other systems.

    By default every activation above 128 KiB is mapped anew and its pages are zeroed at the first touch, which costs
    more than many an op and varies: the reference of layer_norm took 1.0 or 7.5 ms from pass to pass. The demo's step
    took 0.68 s so and 0.60 s with this (two AMD EPYC cores, 2026-11-24).
    """
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _NEVER)


def leave_cores_to_workers(workers: int) -> None:
    """Takes torch's threads back to the cores that the data workers leave, at least one; never adds any.

    A worker that shares a core with one of torch's threads holds up all of them. The demo trained 435 pairs/s with one
    thread beside one worker and 376 with two (two AMD EPYC cores, 2026-11-24).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(max(1, min(torch.get_num_threads(), cores - workers)))


def slow_precision(device: torch.device, precision: str) -> str | None:
    """What to say where training computes in a type that the processor has no instructions for."""
    if device.type != "cpu" or precision not in ("amp_bf16", "bf16") or multiplies_bfloat16():
        return None
    return f"precision={precision} is slow here: this processor multiplies no bfloat16; precision=fp32 is faster"


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on a GPU, or by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
