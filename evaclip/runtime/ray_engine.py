"""Index images on many machines: a pipeline of Ray Data; only the driver writes the store."""

import logging
import os
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from evaclip.data import Source
from evaclip.errors import UserError
from evaclip.runtime.encoder import Encoder
from evaclip.runtime.indexing import Array, Batches, Progress, Work, add_thumbnails, join, keep, list_faults
from evaclip.runtime.store import Row, Store

_IMAGES = {"cuda": 4096, "cpu": 512}
"""Of a task: 16 batches, as decoding is ahead of the model within a task alone. A worker that dies costs one."""


@dataclass(frozen=True)
class Cluster:
    """Arguments of each worker.

    Attributes:
        workers: how many there are.
        device: `cuda`, with one GPU per worker, or `cpu`.
        cpus: of each worker.
    """

    workers: int
    device: str
    cpus: int


@contextmanager
def connected(device: str = "auto", workers: int | None = None) -> Iterator[Cluster]:
    """The cluster that RAY_ADDRESS names or, without it, one of this machine alone, for as long as the block runs.

    Args:
        device: `auto` for GPUs if the cluster has some, `cuda` or `cpu`.
        workers: None for one a GPU or, on CPUs, one a machine.

    Raises:
        UserError: for another device or one that no node has, fewer than one worker, or if there is no cluster there.
    """
    import ray

    if device not in ("auto", "cuda", "cpu"):
        raise UserError(f"device must be auto, cuda or cpu with Ray (one GPU per worker), got {device!r}")
    if workers is not None and workers < 1:
        raise UserError(f"the number of workers must be 1 or more, got {workers}")
    # Neither reports to Ray's makers, nor notes for them.
    for name, value in (("RAY_USAGE_STATS_ENABLED", "0"), ("RAY_BACKEND_LOG_LEVEL", "fatal")):
        os.environ.setdefault(name, value)
    address = os.environ.get("RAY_ADDRESS", "local")
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as exc:
        raise UserError(f"there is no Ray cluster at RAY_ADDRESS={address}: {exc}") from exc
    try:
        yield _shared_out([node["Resources"] for node in ray.nodes() if node["Alive"]], device, workers)
    finally:
        ray.shutdown()


def _shared_out(nodes: Sequence[Mapping[str, float]], device: str, workers: int | None) -> Cluster:
    if device == "auto":
        device = "cuda" if any(node.get("GPU", 0) >= 1 for node in nodes) else "cpu"
    # A node may have no CPU for workers: often it is the cluster's head.
    resource = "GPU" if device == "cuda" else "CPU"
    hosts = [node for node in nodes if min(node.get(resource, 0), node.get("CPU", 0)) >= 1]
    if not hosts:
        raise UserError(f"--device {device}: no node of the cluster has a {resource}")
    gpus = [int(node.get("GPU", 0)) for node in hosts]
    workers = workers or (sum(gpus) if device == "cuda" else len(hosts))
    on_each = gpus if device == "cuda" else [-(-workers // len(hosts))] * len(hosts)
    cpus = min(int(node["CPU"]) // count for node, count in zip(hosts, on_each, strict=True))
    return Cluster(workers, device, max(1, cpus))


def index_on_ray(
    source: Source,
    encoder: Callable[..., Encoder],
    store: Store,
    cluster: Cluster,
    *,
    thumbnail: int = 0,
    progress: Progress | None = None,
) -> Progress:
    """`index` on a cluster: workers read, decode and embed images; only this process writes the store.

    A lost worker is started again and repeats its images.

    Args:
        source: pickled to the workers; every node must have its files.
        encoder: called with `device`, returns an encoder of the store's model; pickled to the workers.

    Raises:
        UserError: as for `index`.
    """
    progress = progress or Progress(len(source))
    work = Work(source, store.states(), thumbnail)
    add_thumbnails(work, store, range(len(source)), Progress(len(source)))  # the workers count the same images
    keep(_embedded(work, encoder, cluster, progress), store)
    list_faults(source, store, progress)
    return progress


def _embedded(work: Work, encoder: Callable[..., Encoder], cluster: Cluster, progress: Progress) -> Batches:
    began, computed = time.monotonic(), 0.0
    for result in _pipeline(work, encoder, cluster).iter_rows():
        output = pickle.loads(result["output"])
        if isinstance(output, UserError):
            raise output
        rows, embeddings, part = output
        progress.embedded += part.embedded
        progress.unchanged += part.unchanged
        progress.faults += part.faults
        computed += part.seconds - part.waited
        progress.seconds = time.monotonic() - began
        progress.waited = progress.seconds - computed / cluster.workers
        yield rows, embeddings


def _pipeline(work: Work, encoder: Callable[..., Encoder], cluster: Cluster) -> Any:
    """A dataset of what the workers find, a row for each task."""
    import ray.data

    # Its bars and notes would get into the way of the command's own.
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    count = len(work.source)
    size = max(1, min(_IMAGES[cluster.device], count // (4 * cluster.workers)))
    tasks = [{"start": start, "stop": min(start + size, count)} for start in range(0, count, size)]
    return ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(
        _Worker,
        fn_constructor_args=(ray.put((work, encoder)), cluster.device),
        compute=ray.data.ActorPoolStrategy(size=cluster.workers),
        batch_size=1,
        num_cpus=cluster.cpus,
        num_gpus=1 if cluster.device == "cuda" else 0,
    )


class _Worker:
    """The actor of a worker: it has the source and a model, and does tasks."""

    def __init__(self, shared: Any, device: str) -> None:
        import ray

        self._work, encoder = ray.get(shared)
        self._encoder = encoder(device=device)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[bytes]]:
        numbers = range(int(batch["start"][0]), int(batch["stop"][0]))
        try:
            output: object = self._embed(numbers)
        except UserError as exc:
            output = exc  # raised here it would lose its plain message
        # Arrow, in which results travel, has no type for it.
        return {"output": [pickle.dumps(output)]}

    def _embed(self, numbers: range) -> tuple[list[Row], Array, Progress]:
        progress = Progress(len(numbers))
        return *join(self._work.embedded(numbers, self._encoder, progress), self._encoder.dim), progress
