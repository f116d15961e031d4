"""What many processes and many shards cost in names alone: generated checkpoints and lists, with next to no bytes."""

import json
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from benchmarks.machine import byline
from benchmarks.table import make_console, plain_table
from evaclip.data.config import DEFAULT_WINDOW
from evaclip.data.opening import open_source
from evaclip.data.order import sample_order
from evaclip.data.remote import Version
from evaclip.data.shard_list import Entry, write_list
from evaclip.data.tar_index import ShardFacts
from evaclip.train import tensor_files
from evaclip.weights import parts

TENSORS = 1_230
"""As many as E/14+ has parameters; its moments are twice as many."""
ROWS = 4
"""Of each tensor in each process, in float32: 16 bytes."""
PER_SHARD = 10_000


@dataclass(frozen=True)
class Cost:
    """What something took.

    Attributes:
        seconds: of a processor, in this process and its threads.
        opens: of files of tensors and their index.
        megabytes: by which the process grew.
    """

    what: str
    seconds: float
    opens: int
    megabytes: float


def measure_checkpoint(ranks: int, folder: Path) -> Iterator[Cost]:
    """The costs of one set of tensors, such as the weights or the averages, in so many processes' parts."""
    whole = folder / "joined.safetensors"
    names = [f"visual.blocks.{number // 12}.part.{number % 12}.weight" for number in range(TENSORS)]
    own = {name: torch.zeros(ROWS) for name in names}
    yield _cost("save: the first process's part and the index", lambda: tensor_files.write_parts(own, folder, 0, ranks))
    _write(folder, names, ranks)
    yield _cost("join", lambda: parts.join(folder, whole))
    whole.unlink()
    with _as_process(ranks // 2, ranks) as mesh:
        shape = torch.Size([ROWS * ranks])
        how: dict[str, Any] = {"run_check": False, "shape": shape, "stride": (1,)}
        targets: dict[str, Tensor] = {
            name: DTensor.from_local(torch.zeros(ROWS), mesh, [Shard(0)], **how) for name in names
        }
        yield _cost("resume: one process", lambda: (parts.likes(folder), parts.read(targets, folder)))


def measure_list(shards: int, folder: Path) -> Iterator[Cost]:
    """The costs of opening a list of so many shards, none of which is there, and of a worker beside it."""
    path = folder / "list.json"
    facts = (ShardFacts(PER_SHARD, f"{number:032x}", "", 2**30, ()) for number in range(shards))
    entries = (Entry(str(folder / f"{n:06d}.tar"), Version(2**30, ""), fact) for n, fact in enumerate(facts))
    write_list(path, entries)
    found: list[Any] = []
    yield _cost(
        f"a list of {shards:,} shards, {shards * PER_SHARD:,} samples: open",
        lambda: found.append(open_source(str(path))),
    )
    yield _cost("the same: pickle", lambda: pickle.dumps(found[0]))
    context = get_context("fork")
    receive, send = context.Pipe(duplex=False)
    worker = context.Process(target=_work, args=(found[0], send))
    worker.start()
    yield Cost("the same: a forked worker's first units", *receive.recv())
    worker.join()


def show(ranks: Sequence[int], shards: int) -> None:
    """Measures and prints."""
    table = plain_table("", "CPU s", "opens", "MB")
    for count in ranks:
        with tempfile.TemporaryDirectory() as folder:
            for cost in measure_checkpoint(count, Path(folder)):
                _add(table, f"{count:,} processes, {cost.what}", cost)
    with tempfile.TemporaryDirectory() as folder:
        for cost in measure_list(shards, Path(folder)):
            _add(table, cost.what, cost)
    make_console().print(table)
    print(f"{TENSORS:,} tensors, {4 * ROWS} bytes of each; {byline(torch.device('cpu'))}")


def _add(table: Any, what: str, cost: Cost) -> None:
    print(what, file=sys.stderr, flush=True)
    table.add_row(what, f"{cost.seconds:.2f}", f"{cost.opens:,}", f"{cost.megabytes:.0f}")


def _work(source: Any, send: Any) -> None:
    process = psutil.Process()
    before, begin = process.memory_full_info().uss, time.process_time()
    order = sample_order(len(source), 0, DEFAULT_WINDOW, source.shard_sizes)
    for number in order.indices(np.arange(256)).tolist():
        source.shards[number // PER_SHARD]
    seconds = time.process_time() - begin
    send.send((seconds, 0, (process.memory_full_info().uss - before) / 1e6))


def _cost(what: str, call: Callable[[], object]) -> Cost:
    opens = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal opens
        if counting and event == "open" and str(arguments[0]).endswith((".safetensors", parts.INDEX)):
            opens += 1

    counting = True
    sys.addaudithook(count)
    process = psutil.Process()
    before, begin = process.memory_info().rss, time.process_time()
    call()
    seconds, after = time.process_time() - begin, process.memory_info().rss
    counting = False  # a hook can't be removed
    return Cost(what, seconds, opens, max(0, after - before) / 1e6)


def _write(folder: Path, names: Sequence[str], ranks: int) -> None:
    """The files of all processes, as `write_parts` makes them there."""
    for rank in range(ranks):
        places = json.dumps({name: {"saved_offsets": [rank * ROWS]} for name in names})
        own = {name: torch.zeros(ROWS) for name in names}
        save_file(own, folder / parts.part_name(rank), {parts.PLACES: places, "format": "pt"})
    about = {name: {"dtype": "F32", "shape": [ROWS * ranks], "files": [0, ranks]} for name in names}
    (folder / parts.INDEX).write_text(json.dumps({"files": ranks, "tensors": about}))


@contextmanager
def _as_process(rank: int, size: int) -> Iterator[Any]:
    """The mesh of one of many processes, the others of which aren't there."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        yield init_device_mesh("cpu", (size,))
    finally:
        dist.destroy_process_group()
