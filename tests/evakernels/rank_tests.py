"""Runs a function on several gloo ranks."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def results_of_ranks(function: Callable[[int], Any], world: int, folder: Path, *modules: str) -> list[Any]:
    """What `function(rank)` returns on each rank.

    Args:
        folder: an empty folder for the ranks' files.
        modules: what the processes have imported before they are forked, besides torch.distributed.
    """
    multiprocessing.set_forkserver_preload(["torch.distributed", *modules])
    mp.start_processes(_work, (function, world, folder), nprocs=world, start_method="forkserver")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def _work(rank: int, function: Callable[[int], Any], world: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(function(rank), folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
