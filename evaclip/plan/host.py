"""What a run asks of a node besides its GPUs: memory for batches and checkpoints, cores that decode, storage."""

from typing import Any

from rich.table import Table

from evaclip.data.loader import UNIT
from evaclip.plan.gpus import PER_NODE
from evaclip.plan.job import Job, known_steps
from evaclip.plan.memory import Memory
from evaclip.plan.tables import numbers
from evaclip.plan.time import Time
from evaclip.train.config import TrainConfig

_GB = 1e9
_HASHED = 1.9 * _GB
"""Bytes of which a core makes SHA-256 in a second, by instructions for it: a Zen 5, beside other work, 2026-11-28."""


def host_tree(
    config: TrainConfig, job: Job, memory: Memory, time: Time, images_per_core: float | None, storage_gbps: float | None
) -> dict[str, Any]:
    """Bytes, cores and seconds; of a node, where it says so.

    Args:
        time: of a step, where the images differ in size that of the fastest.
        images_per_core: pictures a second that one core decodes, as `evaclip data bench` tells; None for unknown.
        storage_gbps: GB/s at which all processes together write; None for unknown.
    """
    in_node, saving = min(PER_NODE, job.gpus), config.checkpoint
    pixels = 3 * job.vision.image_shape[0] * job.vision.image_shape[1]
    # Bytes, in parts of which each worker has as many as there are batches.
    waiting = config.data.prefetch * max(job.local_batch, config.data.workers * min(UNIT, job.local_batch))
    each = job.weight_bytes + job.state_bytes + 4 * job.averaged
    checkpoint = each * memory.model_parameters
    # Replicas write once; the copy that is written from in the background lies on the main process's node.
    in_copy = checkpoint if job.mode == "replicate" else each * memory.parameters * in_node
    steps = known_steps(config) or 0
    forever = steps // saving.keep_every if saving.keep_every else 0
    tree: dict[str, Any] = {
        "batches_waiting_in_a_node": in_node * waiting * pixels,
        "copy_of_a_checkpoint_in_a_node": in_copy if saving.background else 0,
        "checkpoint": checkpoint,
        "storage": checkpoint * (saving.keep + forever + 1),
    }
    if images_per_core:
        tree["decoding_cores_of_a_node"] = decoding_cores(job, time, images_per_core)
    if storage_gbps:
        sharded = job.mode != "replicate"
        hashing = checkpoint / _HASHED / (job.gpus if sharded else 1)  # each process its own files
        tree["seconds_of_a_checkpoint"] = checkpoint / (storage_gbps * _GB) + hashing
        if sharded:
            # By one process, after the run or beside it: read and written, and either hashed.
            weights = (job.weight_bytes + 4 * job.averaged) * memory.model_parameters
            tree["seconds_to_join_its_weights"] = 2 * weights / (storage_gbps * _GB) + 2 * weights / _HASHED
    return tree


def decoding_cores(job: Job, time: Time, images_per_core: float) -> tuple[float, float]:
    """That a node needs for its GPUs not to wait: slow and fast."""
    pictures = min(PER_NODE, job.gpus) * job.local_batch
    slow, fast = (pictures / seconds / images_per_core for seconds in time.step)
    return slow, fast


def host_table(tree: dict[str, Any]) -> Table:
    """The same for a terminal."""
    table = numbers("besides the GPUs", "", title="Nodes and storage")
    for name, value in tree.items():
        if name.startswith("decoding"):
            text = " to ".join(f"{cores:,.1f}" for cores in value)
        else:
            text = f"{value:,.1f} s" if name.startswith("seconds") else f"{value / _GB:,.1f} GB"
        table.add_row(name.replace("_", " "), text)
    return table
