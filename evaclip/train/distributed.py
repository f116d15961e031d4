"""Process groups and data parallelism: plain collectives, no wrapper around the model."""

import os
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

from evaclip.data.opening import allow_open_files
from evaclip.data.workers import WorkerDied
from evaclip.errors import RanksLost, ReplicasDiffer, RunInterrupted, UserError
from evaclip.train.config import ParallelConfig, process_count
from evaclip.weights import is_dtensor

BUCKET_BYTES = 32 * 2**20
_IN_FLIGHT = 4
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types of the bits of tensors, by their bytes per element."""
_ABORT_LIMIT = timedelta(minutes=1)
"""How long NCCL may take to end its kernels after an error."""
_RECORD_FILE = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
_RECORD_SIZE = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_RECORD_ON_TIMEOUT = ("TORCH_NCCL_DUMP_ON_TIMEOUT",)
_DEVICE_ERRORS = ("CUDA error", "cuDNN error")
"""Parts of errors of CUDA's libraries, which have no type of their own."""
_RECORD_SECONDS = 30.0
"""How long writing the last collectives may take: it asks a device that may hang."""


def _no_group() -> None:
    """Of one process."""


@dataclass(frozen=True)
class World:
    """The ranks that train together.

    Attributes:
        group: of all ranks, for tensors on `device`; None for one rank.
        control: of all ranks, for tensors in host memory, so that decisions never wait for the device.
        new_saving_group: makes a group like `control` for the checkpoint thread, with a longer timeout for slow disks;
            all ranks call it.
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    group: Any = None
    control: Any = None
    new_saving_group: Callable[[], Any] = _no_group

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def uses_nccl(self) -> bool:
        return self.group is not None and self.device.type == "cuda"

    @property
    def machine(self) -> range:
        """The ranks of this machine, which torchrun numbers one after the other."""
        local, count = (int(os.environ.get(f"LOCAL_{name}", 0)) for name in ("RANK", "WORLD_SIZE"))
        first = self.rank - local
        return range(max(0, first), min(self.size, first + max(1, count)))

    def mean_(self, tensor: Tensor) -> Tensor:
        """The mean over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
            tensor /= self.size
        return tensor

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether it is set on any rank."""
        return tuple(votes > 0 for votes in self.begin_count(*flags)())

    def begin_count(self, *numbers: int) -> Callable[[], list[int]]:
        """Begins the sums of integers over all ranks in host memory; the returned function waits for them."""
        if self.size == 1:
            return lambda: list(numbers)
        counts = torch.tensor(numbers, dtype=torch.int64)
        work = dist.all_reduce(counts, group=self.control, async_op=True)

        def result() -> list[int]:
            work.wait()
            return counts.tolist()

        return result

    def sum(self, *values: float) -> list[float]:
        """The sum of each value over all ranks, by the device's group, as `control` is slower; waits for the device."""
        if self.size == 1:
            return list(values)
        sums = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(sums, group=self.group)
        return sums.tolist()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks on the main rank; an empty list on others."""
        if self.size == 1:
            return [value]
        values: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(value, values, group=self.control)
        return values or []

    def gather_everywhere(self, value: Any) -> list[Any]:
        """The values of all ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def from_main(self, value: Any) -> Any:
        """The main rank's value."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def decide(self, choose: Callable[[Callable[[Any], list[Any]]], Any], work: Callable[[Any, int, int], Any]) -> Any:
        """The result of `choose(ask)` on the main rank; every rank must call it.

        Args:
            choose: may call `ask(job)`, which runs `work(job, rank, size)` on each rank and returns all results.
        """
        if not self.is_main:
            while (said := self.from_main(None))[1]:
                self.gather_everywhere(work(said[0], self.rank, self.size))
            return said[0]

        def ask(job: Any) -> list[Any]:
            self.from_main((job, True))
            return self.gather_everywhere(work(job, self.rank, self.size))

        return self.from_main((choose(ask), False))[0]

    @torch.no_grad()  # or torch warns of each one's gradient in every backward pass
    def broadcast_(self, tensors: Sequence[Tensor]) -> None:
        """Overwrites the tensors with the main rank's."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0, group=self.group)

    def close(self) -> None:
        """Leaves the process groups; under NCCL waits until all ranks have finished their collectives."""
        if self.group is not None:
            dist.destroy_process_group()

    def abort(self) -> None:
        """Leaves the process groups without waiting for the collectives of other ranks.

        `destroy_process_group` waits for all NCCL kernels; another rank may never start its part of them.
        """
        if self.group is None:
            return
        if self.device.type == "cpu":
            dist.destroy_process_group()  # gloo waits for nobody
            return
        self.group.set_timeout(_ABORT_LIMIT)
        with suppress(RuntimeError):  # of an abort that takes longer; the error that led here is the one to report
            dist.distributed_c10d._abort_process_group()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:
            self.abort()


def connect(device_name: str, config: ParallelConfig | None = None) -> World:
    """Joins the ranks that torchrun started, or returns a world of one.

    Args:
        device_name: a torch device, or auto for a GPU if there is one.
        config: timeouts. With `offload` one rank also has groups, which also take tensors in host memory.

    Raises:
        UserError: the device does not exist.
    """
    config = config or ParallelConfig()
    allow_open_files()  # each group has a connection to every rank
    size, offload = process_count(), config.offload != "none"
    device = device_of(device_name, int(os.environ.get("LOCAL_RANK", "0")) if size > 1 else None)
    if size == 1 and not offload:
        return World(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit, saving_limit = timedelta(minutes=config.timeout_minutes), timedelta(minutes=config.saving_timeout_minutes)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl" if offload else "nccl"
    if size == 1:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)
    else:
        dist.init_process_group(backend, timeout=limit)
    new_group = partial(dist.new_group, backend="gloo")
    control, new_saving_group = new_group(timeout=limit), partial(new_group, timeout=saving_limit)
    return World(device, dist.get_rank(), size, dist.group.WORLD, control, new_saving_group)


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, errors of a GPU, of NCCL or of a connection, and a killed data worker, become `RunInterrupted`."""
    try:
        yield
    except RuntimeError as exc:
        is_device = isinstance(exc, torch.AcceleratorError) or any(name in str(exc) for name in _DEVICE_ERRORS)
        if not is_device and not isinstance(exc, dist.DistError | WorkerDied):
            raise
        line = next(iter(str(exc).splitlines()), "no message")
        raise RunInterrupted(f"{type(exc).__name__}: {line}; --resume auto goes on from the last checkpoint") from exc


@contextmanager
def naming_lost_ranks(config: ParallelConfig, world: World) -> Iterator[None]:
    """Inside, errors of collectives say in plain words what happened to another rank.

    Raises:
        RanksLost: another rank ended, or didn't answer in time. The message names the key of the limit, and the file
            of the rank's last collectives.
    """
    try:
        yield
    except RuntimeError as exc:  # of gloo, which has no type of its own
        text = str(exc).lower()
        if "timed out" in text or "timeout" in text:
            message = (
                f"another rank must answer within parallel.timeout_minutes={config.timeout_minutes:g}; the watchdog's "
                "lines, if any, name the slow rank"
            )
            if world.uses_nccl and (line := write_collectives(world.rank)):
                message += f"; {line}"
        elif "closed by peer" in text or "reset by peer" in text:
            message = (
                "another rank has ended, and its own output says why; if it has none, it was killed (signal 9), often "
                "for lack of memory: torchrun's summary or the scheduler's log names it"
            )
        else:
            raise
        raise RanksLost(f"{message} ({str(exc).splitlines()[0]})") from exc


@contextmanager
def recording_collectives(folder: Path) -> Iterator[None]:
    """Inside, torch's flight recorder writes `folder`/rank_N when a collective of rank N times out.

    Enter it before process groups exist. Environment variables that the user has set stay.
    """
    values = {_RECORD_FILE: f"{folder.absolute()}/rank_", _RECORD_SIZE: "2000", _RECORD_ON_TIMEOUT: "1"}
    added = {names[0]: value for names, value in values.items() if not any(name in os.environ for name in names)}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def write_collectives(rank: int) -> str | None:
    """Writes the last NCCL collectives of this rank; returns how to read them, or None if they can't be written."""
    prefix = next((os.environ[name] for name in _RECORD_FILE if name in os.environ), None)
    dump = getattr(torch._C._distributed_c10d, "_dump_nccl_trace", None)
    if prefix is None or dump is None:
        return None
    path, written = Path(f"{prefix}{rank}"), list[int]()

    def work() -> None:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            written.append(path.write_bytes(dump()))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(_RECORD_SECONDS)
    if not written:
        return None
    return (
        f"the last collectives of this rank are in {path}; `torchfrtrace {quote(str(path.parent))}` compares the ranks "
        "and names the collective that some of them didn't join"
    )


def fake_ranks(device: str, size: int) -> World:
    """The world of rank 0 of `size` ranks. Collectives return at once with uninitialised memory.

    Raises:
        UserError: a process group exists already, or the device does not exist.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if size < 1:
        raise UserError(f"--as-gpus must be at least 1, got {size}")
    if (dist.is_available() and dist.is_initialized()) or dist.is_torchelastic_launched():
        raise UserError("--as-gpus and `evaclip plan` stand for many ranks: start one process, without torchrun")
    present = device_of(device)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    return World(present, 0, size, dist.group.WORLD, dist.group.WORLD, lambda: dist.group.WORLD)


def device_of(name: str, local_rank: int | None = None) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda" and device.index is None and local_rank is not None:
            device = torch.device("cuda", local_rank)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError(f"{device.type} is not a device that models are trained on")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as exc:
        reason = str(exc).splitlines()[0]
        raise UserError(f"device {name!r} cannot be used ({reason}); accepted: auto, cpu, cuda, cuda:N") from exc
    return device


def accumulate_in_float32(parameters: Iterable[Tensor], *, reduce_each_micro_batch: bool) -> None:
    """Makes 16-bit parameters sum the gradients of a step's micro-batches in float32.

    From the first micro-batch on `grad` is float32. Call it only for steps of several micro-batches: one needs no sum.
    `fully_shard` sums in float32 itself, unless it reduces after every micro-batch.

    Args:
        parameters: trained parameters; only 16-bit ones change.
        reduce_each_micro_batch: whether gradients of shards are reduced after every micro-batch.
    """
    for parameter in parameters:
        is_narrow = parameter.dtype in (torch.bfloat16, torch.float16)
        if is_narrow and (reduce_each_micro_batch or not is_dtensor(parameter)):
            parameter.grad_dtype = None  # any
            parameter.register_post_accumulate_grad_hook(_widen_gradient)


def _widen_gradient(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad = parameter.grad.float()


class GradientMean:
    """Averages gradients over all ranks during the backward pass.

    Buckets and their order are fixed: a reduction begins when its gradients and those of all earlier buckets exist. A
    resumed run therefore sums like an undisturbed one; torch's `DistributedDataParallel` rebuilds its buckets after the
    first step. At most `_IN_FLIGHT` buckets have memory at a time. Sums are in float32 (float64 of float64 parameters).

    Args:
        parameters: in the order of the forward pass; sharded ones are skipped.
        others: parameters with gradients that may exist before the last backward pass.
    """

    def __init__(self, parameters: Sequence[Tensor], others: Sequence[Tensor], world: World) -> None:
        self._world = world
        self._buckets: list[list[Tensor]] = []
        self._missing: list[int] = []
        self._begun = 0
        self._running: deque[tuple[Any, Tensor, list[Tensor]]] = deque()
        if world.size == 1:
            return
        whole = [p for p in reversed(parameters) if p.requires_grad and not is_dtensor(p)]
        self._buckets = [*buckets(whole), *buckets([p for p in others if not is_dtensor(p)])]
        numbers = {id(p): index for index, bucket in enumerate(self._buckets) for p in bucket}
        for parameter in whole:
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, numbers[id(parameter)]))

    def begin(self) -> None:
        """Call it before the last backward pass of a step."""
        self._missing, self._begun = [len(bucket) for bucket in self._buckets], 0

    def finish(self) -> None:
        """Call it after the last backward pass: then gradients are the mean."""
        while self._begun < len(self._buckets):
            self._start()
        while self._running:
            self._take()
        self._missing = []

    def _arrived(self, index: int, _: Tensor) -> None:
        if not self._missing:  # other micro-batches follow
            return
        self._missing[index] -= 1
        while self._begun < len(self._buckets) and self._missing[self._begun] == 0:
            self._start()

    @torch.no_grad()
    def _start(self) -> None:
        gradients = [p.grad for p in self._buckets[self._begun] if p.grad is not None]
        self._begun += 1
        if len(self._running) == _IN_FLIGHT:
            self._take()
        if gradients:
            dtype = torch.promote_types(gradients[0].dtype, torch.float32)
            flat = gradients[0].new_empty(sum(gradient.numel() for gradient in gradients), dtype=dtype)
            torch.cat([gradient.reshape(-1) for gradient in gradients], out=flat)
            work = dist.all_reduce(flat, group=self._world.group, async_op=True)
            self._running.append((work, flat, gradients))

    @torch.no_grad()
    def _take(self) -> None:
        work, flat, gradients = self._running.popleft()
        work.wait()
        flat /= self._world.size
        slices = flat.split([gradient.numel() for gradient in gradients])
        for gradient, piece in zip(gradients, slices, strict=True):
            gradient.copy_(piece.view_as(gradient))


def check_replicas(tensors: Iterable[Tensor], world: World) -> None:
    """Compare checksums of tensors over the ranks that must hold the same elements; all ranks call it.

    A checksum is the sum of the elements' bits as integers, taken on the tensors' device.

    Args:
        tensors: whole, equal on all ranks, or sharded on one mesh, equal on ranks with the same shard.

    Raises:
        ReplicasDiffer: on all ranks; the message names the ranks that differ from most replicas, or from the first
            one if there is no majority.
    """
    if world.size == 1:
        return
    sums_of: dict[int, list[Tensor]] = {}  # by shard, from 1; 0 has whole tensors
    shards = 0
    for tensor in tensors:
        shard, local = 0, tensor.detach()
        if is_dtensor(local):
            coordinate, shards = local.device_mesh.get_coordinate(), local.device_mesh.size(-1)
            assert coordinate is not None
            shard, local = 1 + coordinate[-1], local.to_local()
        sums_of.setdefault(shard, []).append(local.view(_INTEGERS[local.itemsize]).sum(dtype=torch.int64))
    # The largest checksum and, as ~x falls with x, the smallest of each shard.
    absent = torch.iinfo(torch.int64).min
    bounds = torch.full((2, 1 + shards), absent, device=world.device)
    for shard, sums in sums_of.items():
        checksum = torch.stack(sums).sum().to(world.device)
        bounds[:, shard] = torch.stack([checksum, ~checksum])
    own = bounds[0].clone()
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=world.group)
    if bool(((bounds[0] == ~bounds[1]) | (bounds[1] == absent)).all()):
        return
    checksums = {shard: int(own[shard]) for shard in sums_of}
    ranks = world.gather_everywhere((socket.gethostname(), checksums))
    differing = set[int]()
    for shard in {shard for _, checksums in ranks for shard in checksums}:
        by_rank = {rank: checksums[shard] for rank, (_, checksums) in enumerate(ranks) if shard in checksums}
        ((common, _),) = Counter(by_rank.values()).most_common(1)
        differing |= {rank for rank, checksum in by_rank.items() if checksum != common}
    if differing:
        raise ReplicasDiffer(
            "weights must be equal in all replicas, got other bits on "
            f"{', '.join(f'rank {rank} ({ranks[rank][0]})' for rank in sorted(differing))}; --resume auto goes on from "
            "the last checkpoint, whose replicas were equal; if a rank is named again, replace its GPU or machine"
        )


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Groups consecutive tensors, float64 apart, up to `BUCKET_BYTES` of float32 copies; a larger tensor is alone."""
    bucket: list[Tensor] = []
    size = 0
    for tensor in tensors:
        copied = tensor.numel() * max(4, tensor.itemsize)
        is_other = bucket and (tensor.dtype == torch.float64) != (bucket[0].dtype == torch.float64)
        if bucket and (is_other or size + copied > BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += copied
    if bucket:
        yield bucket
