"""What training on a CPU asks of the machine: memory that stays, and cores for the data workers."""

import resource

import torch

from evaclip.machine import multiplies_bfloat16, usable_cores
from evakernels import keep_freed_memory, set_loss_products


def prepare(device: torch.device, workers: int, loss_products: str = "tf32x3") -> None:
    """Keeps freed memory and leaves cores to the workers, for training on a CPU; on a GPU, one rule for float32."""
    # By torch's defaults cuDNN rounds to TF32 in the patch embedding, where no other product of a float32 model is.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    set_loss_products(loss_products)
    if device.type == "cpu":
        keep_freed_memory()
        leave_cores_to_workers(workers)


def leave_cores_to_workers(workers: int) -> None:
    """Takes torch's threads back to the cores that the data workers leave, at least one; never adds any.

    A worker that shares a core with one of torch's threads holds up all of them. The demo trained 435 pairs/s with one
    thread and one worker, and 376 with two threads (two AMD EPYC cores).
    """
    torch.set_num_threads(max(1, min(torch.get_num_threads(), usable_cores() - workers)))


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
