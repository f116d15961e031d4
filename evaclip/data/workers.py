"""Batches from worker processes, with an error when a worker dies and a warning when no batch comes."""

import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from multiprocessing import parent_process
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar, cast

import torch
from torch.utils.data import DataLoader, Dataset

from evaclip.errors import UserError

_LOG = logging.getLogger("evaclip.data")
_LOOK_EVERY = 5.0
"""Seconds of waiting after which torch looks whether all workers are alive."""
_A_MOMENT = 1.0
"""Seconds from a broken connection to a worker until its end must be there to be seen."""

T = TypeVar("T")


class WorkerDied(RuntimeError):
    """A data worker ended; the message has its number and exit status."""


class WorkerLoader(DataLoader[T]):
    """Iterates over `dataset[item]` for the given items, in order, read in worker processes.

    The default random generators are neither read nor changed.

    Args:
        dataset: returns its UserErrors, which are raised here: DataLoader would put a worker's traceback into the
            message of one that is raised.
        items: what a worker reads at a time.
        workers: processes; 0 works in the calling process.
        prefetch: results that each worker may hold ready.
        pin: a thread copies the workers' tensors into pinned memory, if there is a GPU.
        patience: seconds without a batch after which a warning is logged, and again after each such time.

    Attributes:
        waits: whether a consumer of this process waits for a batch.

    Raises:
        UserError: the data set returned it, a number is out of range, or no worker can be started.
        WorkerDied: a worker has ended.
    """

    waits = False

    def __init__(
        self,
        dataset: Dataset[T | UserError],
        items: Iterable[Any],
        workers: int = 0,
        prefetch: int = 2,
        pin: bool = False,
        patience: float = 60.0,
    ) -> None:
        if workers < 0:
            raise UserError(f"workers must be 0 or more, got {workers}")
        if prefetch < 1:
            raise UserError(f"prefetch must be 1 or more, got {prefetch}")
        super().__init__(
            cast("Dataset[T]", dataset),
            batch_size=None,
            sampler=items,
            num_workers=workers,
            prefetch_factor=prefetch if workers else None,
            collate_fn=_unchanged,
            pin_memory=pin,
            timeout=min(patience, _LOOK_EVERY) if workers else 0,
            worker_init_fn=_init_worker,
            # Linux's default before Python 3.14. Other start methods import torch again in each worker.
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            # A seed for the workers is drawn from it, and not from the generator of the training.
            generator=torch.Generator(),
        )
        self._patience = patience

    def __iter__(self) -> Iterator[T]:  # type: ignore[override]  # DataLoader's has private methods too
        try:
            batches = super().__iter__()
        except OSError as exc:
            needs = "a /dev/shm that can be written to, and of this user's limits processes and open files"
            failed = f"{self.num_workers} data workers can't be started ({exc}): they need {needs}"
            raise UserError(f"{failed}; 0 (data.workers, --workers) does without") from exc
        processes: Sequence[BaseProcess] = getattr(batches, "_workers", ())
        _raise_only_while_waiting()
        for number in count():
            try:
                batch = self._next(batches, processes, number)
            except StopIteration:
                return
            if isinstance(batch, UserError):
                raise batch
            yield batch

    def _next(self, batches: Iterator[T], processes: Sequence[BaseProcess], number: int) -> T:
        """The next batch; each `patience` seconds without one are logged."""
        began = reported = time.monotonic()
        while True:
            try:
                try:
                    WorkerLoader.waits = True
                    return next(batches)
                finally:  # a dead worker's SIGCHLD may arrive during the search below
                    WorkerLoader.waits = False
            except (RuntimeError, OSError, EOFError) as exc:  # the latter two within what a worker was sending
                if not str(exc).startswith("DataLoader timed out"):
                    if not (ended := _ended(processes)):
                        raise
                    raise WorkerDied(ended) from exc
            now = time.monotonic()
            if now - reported >= self._patience:
                reported = now
                worker = number % len(processes)
                state = f"pid {processes[worker].pid}, {'alive' if processes[worker].is_alive() else 'dead'}"
                waited = f"no samples for {now - began:.0f} s: waiting for result {number}"
                _LOG.warning("%s from data worker %d (%s)", waited, worker, state)


def _raise_only_while_waiting() -> None:
    """Make torch's handler of SIGCHLD raise only while the main thread waits for a batch.

    Torch raises wherever the main thread is when a worker ends, even inside a collective. A wait checks every 5 s
    whether its workers are alive.
    """
    handler: Any = signal.getsignal(signal.SIGCHLD)
    if threading.current_thread() is threading.main_thread() and getattr(handler, "__module__", "").startswith(
        "torch."
    ):
        signal.signal(signal.SIGCHLD, lambda number, frame: handler(number, frame) if WorkerLoader.waits else None)


def _unchanged(batch: Any) -> Any:
    return batch


def _init_worker(worker: int) -> None:
    gc.enable()  # which the trainer has taken over in its own process
    # Ctrl-C, and a job scheduler's SIGTERM, reach the whole process group. The trainer wants to end its step and
    # save, and a worker that died meanwhile would break that off: only the parent may end a worker.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey_parent, args=(parent_process(),), daemon=True).start()
    # Rust tokenizers start one thread per core, in each worker.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _obey_parent(parent: BaseProcess) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(0)


def _ended(processes: Sequence[BaseProcess]) -> str:
    ready = wait([process.sentinel for process in processes], timeout=_A_MOMENT) if processes else []
    for process in processes:
        if process.sentinel in ready:
            process.join(_A_MOMENT)
    return "; ".join(
        f"data worker {number} (pid {process.pid}) {_describe_exit(process.exitcode)}"
        for number, process in enumerate(processes)
        if not process.is_alive() and process.exitcode
    )


def _describe_exit(code: int) -> str:
    if code > 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = {
        "SIGKILL": ": most often the machine ran out of memory; use fewer workers or a smaller prefetch",
        "SIGBUS": ": most often /dev/shm is full; enlarge it or use fewer workers. Or a shard's index was overwritten"
        " in its place, as cp does it",
    }.get(name, "")
    return f"was killed by {name}{hint}"
