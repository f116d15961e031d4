"""A plan as tables for a terminal, and as plain data."""

from typing import Any

from rich.table import Column, Table

from evaclip.plan.gpus import PER_NODE, Gpu
from evaclip.plan.job import Job
from evaclip.plan.memory import AVERAGE, OPTIMIZER, Memory
from evaclip.plan.phases import TEACHER, WORKING, Moment
from evaclip.plan.recorder import CASTS, COMMUNICATION, FROZEN, GRADIENTS, INPUTS, PARAMETERS

_GIB = 2**30
_FIRST = (PARAMETERS, FROZEN, CASTS, GRADIENTS, OPTIMIZER, AVERAGE)
_LAST = (INPUTS, COMMUNICATION, "loss", WORKING)


def summary(job: Job, memory: Memory, gpu: Gpu) -> Table:
    """What is planned."""
    savings = job.savings
    share = {"replicate": "whole on each GPU", "shard": f"cut over {job.gpus} GPUs"}
    spread = share.get(job.mode, f"cut over {job.shard_size} GPUs, {job.gpus // job.shards} copies")
    if job.offload != "none":
        spread += "; in host memory"
    if job.mode != "replicate" and not job.reshard:
        spread += "; gathered once a step"
    table = Table(show_header=False, title="Plan")
    captions = ""
    if job.has_texts:
        packed = "packed" if savings.pack_text else "padded"
        captions = f"; captions of {job.caption_tokens} on average, {packed}"
    at_most = "at most " if job.global_batch % (job.gpus * job.accumulation) else ""
    rows = [
        ("model", job.model),
        ("task", job.task.name),
        ("GPUs", f"{job.gpus} x {gpu.name}"),
        ("batch", f"{job.global_batch:,} = {job.gpus} (GPUs) x {job.accumulation} (chunks) x {at_most}{job.chunk:,}"),
        ("tokens", f"{job.kept_patches} of {job.vision.num_patches} patches" + captions),
        ("precision", f"{job.precision}; {job.optimizer} with moments in {job.state_dtype}"),
        ("parameters", f"{memory.model_parameters:,}, {spread}: {memory.parameters:,} on the first one"),
        ("computed again", savings.recompute),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def numbers(name: str, *columns: str, title: str | None = None) -> Table:
    """An empty table whose columns but for the first are numbers."""
    return Table(name, *(Column(column, justify="right") for column in columns), title=title)


def memory_table(memory: Memory, gpu: Gpu, gpus: int = 1) -> Table:
    """What one GPU holds at the highest moment of a step, by kind."""
    peak = memory.peak
    table = numbers("kind", "GiB", "share", title=f"Memory of one GPU at its peak: {when(peak)}")
    for kind, size in in_order(peak):
        table.add_row(kind, f"{size / _GIB:.2f}", f"{size / peak.total:.1%}")
    table.add_section()
    low, high = gpu.beside_gib
    known = low == high
    total = peak.total / _GIB
    table.add_row("tensors", f"{total:.2f}", "")
    beside = f"{low:.1f}" if known else f"{low:.0f} to {high:.0f}"
    table.add_row("context, NCCL, workspaces, fragments" + ("" if known else " (assumed)"), beside, "")
    table.add_row("of the GPU", f"{gpu.memory_gib:.1f}", verdict(peak.total, gpu))
    if memory.host:
        table.add_section()
        node = min(PER_NODE, gpus) * memory.host / _GIB
        table.add_row("in host memory", f"{memory.host / _GIB:.2f}", f"{node:,.0f} a node")
    return table


def verdict(total: int, gpu: Gpu) -> str:
    """Whether this fits."""
    low, high = (gpu.memory_gib - total / _GIB - reserved for reserved in gpu.beside_gib)
    if high >= 0:
        return f"fits, {high:.1f} to {low:.1f} free"
    return f"misses by {-low:.1f} to {-high:.1f}" if low < 0 else f"may fit: {high:.1f} to {low:.1f} free"


def in_order(moment: Moment) -> list[tuple[str, int]]:
    """Kinds and bytes: what stays, activations from the largest down, what comes and goes."""
    sizes = {kind: size for kind, size in moment.bytes.items() if size >= 1 << 20}
    between = sorted(sizes.keys() - {*_FIRST, *_LAST}, key=lambda kind: -sizes[kind])
    return [(kind, sizes[kind]) for kind in (*_FIRST, *between, *_LAST) if kind in sizes]


def when(moment: Moment) -> str:
    """The phase in words."""
    direction = "backward pass" if moment.phase.startswith("~") else "forward pass"
    tower, *rest = moment.phase.lstrip("~").split(".")
    if tower not in ("image", "text"):
        return {TEACHER: "the teacher", "loss": "the loss", "end": "the mean of the gradients"}.get(tower, tower)
    return f"{direction} of the {tower} tower's {' '.join(rest)}"


def memory_tree(memory: Memory, gpu: Gpu) -> dict[str, Any]:
    """The same as plain data, in bytes."""
    peak = memory.peak
    return {
        "parameters": memory.parameters,
        "model_parameters": memory.model_parameters,
        "peak": peak.total,
        "peak_phase": peak.phase,
        "host": memory.host,
        "kinds": {kind: size for kind, size in sorted(peak.bytes.items()) if size},
        "of_the_gpu": gpu.memory,
        "reserved": [int(gib * _GIB) for gib in gpu.beside_gib],
    }
