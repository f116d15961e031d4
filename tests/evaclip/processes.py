"""Several processes that compute together, without torchrun: it would import torch anew for each of them."""

import os
import socket
import time
import warnings
from collections.abc import Callable
from multiprocessing import set_forkserver_preload
from typing import Any

import torch
import torch.multiprocessing as mp

SECONDS = 500
PRELOADED = [
    "torch.distributed.fsdp", "torch._dynamo", "evaclip.train.trainer",
    "evaclip.train.tasks.contrastive", "evaclip.plan.step", "tensorboard",
]  # fmt: skip


def in_processes(count: int, work: Callable[..., None], *arguments: Any) -> None:
    """Calls `work(*arguments)`, a function of a module, in `count` processes, with the variables that torchrun sets.

    They are forked from a process that has imported what they need, and that serves all calls of this one.

    Raises:
        ProcessRaisedException: the call failed in one of them; the others are ended.
        TimeoutError: they wait for each other, or take more than `SECONDS`.
    """
    set_forkserver_preload(PRELOADED)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    given = (count, port, work, arguments)
    context = mp.start_processes(_work, given, nprocs=count, join=False, start_method="forkserver")
    end = time.monotonic() + SECONDS
    while not context.join(timeout=max(0.0, end - time.monotonic())):
        if time.monotonic() >= end:
            for process in context.processes:
                process.kill()
            raise TimeoutError(f"{work.__name__} in {count} processes took more than {SECONDS} s")


def _work(rank: int, count: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    os.environ |= {name: str(number) for name, number in numbers.items()} | {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    work(*arguments)
