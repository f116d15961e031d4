"""Memory of a call: at its peak, and saved for backward."""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.profiler import profile

from benchmarks import accuracy

# The profiler otherwise announces its start and stop on stderr, once for every row.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a call held at once beyond the memory before it, outputs included.

    On a GPU the allocator counts them. On a CPU the allocator keeps no account, so the profiler's record of every
    allocation is added up.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    held = peak = 0
    for change in _allocations(call):
        held += change
        peak = max(peak, held)
    return peak


def saved_bytes(forward: Callable[[], object], device: torch.device) -> int:
    """The bytes saved for backward: those that only autograd's graph holds after `forward`.

    They are counted where they are allocated and not as autograd saves them, so that what a recomputation policy keeps
    in places of its own counts too. What was there before, such as inputs, doesn't.
    """

    def graph() -> list[object]:
        return [output.grad_fn for output in accuracy.tensors(forward())]

    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        held = graph()
        after = torch.cuda.memory_allocated(device)
        del held
        return int(after - before)
    return sum(_allocations(graph))


def _allocations(call: Callable[[], object]) -> list[int]:
    """Bytes allocated, and freed as negative numbers, on the CPU until the end of `call`, in order."""
    # That of torch.profiler, around this one, imports torch's compiler.
    with profile(profile_memory=True, acc_events=True) as profiler:
        result = call()
    del result
    events: Any = profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return [int(change) for _, change in changes]
