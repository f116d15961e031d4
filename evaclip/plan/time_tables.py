"""Time, savings and what fits, as tables for a terminal and as plain data."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from evaclip.plan.fit import Fit, Option
from evaclip.plan.gpus import Gpu
from evaclip.plan.job import Job
from evaclip.plan.savings import Rung
from evaclip.plan.tables import numbers
from evaclip.plan.time import ASSUMPTIONS, Assumptions, Time

_GIB = 2**30
Range = tuple[float, float]


def flops_table(time: Time, job: Job) -> Table:
    """Floating-point operations of one GPU and step."""
    terms = sorted({term for of_stage in time.flops.values() for term in of_stage})
    table = numbers("TFLOP of a GPU and step", *terms, "all", "GFLOP a sample")
    for stage, of_stage in time.flops.items():
        _add_flops(table, stage, [of_stage.get(term, 0) for term in terms], job)
    table.add_section()
    sums = [sum(of_stage.get(term, 0) for of_stage in time.flops.values()) for term in terms]
    _add_flops(table, "all", sums, job)
    return table


def time_table(time: Time, job: Job, gpu: Gpu) -> Table:
    """Seconds of a step by term, and what follows for the run."""
    table = numbers("of a step", "seconds", title="Time: predicted, from slow to fast")
    for term, seconds in time.terms.items():
        table.add_row(term, spread(seconds))
    table.add_section()
    table.add_row("step", spread(time.step))
    rate = (job.global_batch / time.step[0], job.global_batch / time.step[1])
    table.add_row("samples a second", f"{rate[0]:,.0f} to {rate[1]:,.0f}")
    low, high = time.utilization(job, gpu)
    table.add_row("MFU", f"{low:.0%} to {high:.0%}")
    if job.samples is not None:
        table.add_section()
        hours = time.gpu_hours(job)
        table.add_row(f"GPU-hours for {job.samples:,} samples", f"{hours[0]:,.0f} to {hours[1]:,.0f}")
        table.add_row("days", f"{hours[0] / job.gpus / 24:.1f} to {hours[1] / job.gpus / 24:.1f}")
    return table


def assumptions_text(gpu: Gpu, assumptions: Assumptions = ASSUMPTIONS) -> str:
    """What the ranges stand on."""
    shares = {
        "products": f"of {gpu.half_tflops:g} TFLOP/s ({gpu.single_tflops:g} in float32)",
        "attention": "of the same",
        "memory": f"of {gpu.memory_gbps:g} GB/s",
        "links": f"of {gpu.node_gbps:g} GB/s in a node of 8 and {gpu.network_gbps[0]:g} to {gpu.network_gbps[1]:g} "
        "between nodes",
        "overlap": "of communication goes on beside the towers' work",
    }
    lines = [f"  {name}: {spread(getattr(assumptions, name), percent=True)} {what}" for name, what in shares.items()]
    host = spread(assumptions.host_link_gbps), spread(assumptions.host_memory_gbps)
    lines.append(f"  offload: {host[0]} GB/s between a GPU and host memory, {host[1]} GB/s of that for its optimizer")
    return "\n".join(["Assumed, not measured:", *lines, f"  {gpu.name}: {gpu.source}"])


def savings_table(rungs: Sequence[Rung]) -> Table:
    """A row for each saving: the job with it and all above it."""
    table = numbers("saving", "GiB", "change", "seconds", "change", "GPU-hours", title="Each row adds one saving")
    previous: Rung | None = None
    for rung in rungs:
        memory, seconds = rung.memory.peak.total / _GIB, middle(rung.time.step)
        changes = ["", ""]
        if previous is not None:
            changes[0] = f"{memory / (previous.memory.peak.total / _GIB) - 1:+.1%}"
            changes[1] = f"{seconds / middle(previous.time.step) - 1:+.1%}"
        hours = f"{middle(rung.time.gpu_hours(rung.job)):,.0f}" if rung.job.samples else ""
        table.add_row(rung.name, f"{memory:,.1f}", changes[0], f"{seconds:,.1f}", changes[1], hours)
        previous = rung
    return table


def fit_table(found: Fit, gpu: Gpu) -> Table:
    """What was found, with the options that were looked at."""
    table = Table("", "GPUs", "computed again", "chunks x samples", "GiB", "seconds", "fits", title=f"Fit: {gpu.name}")
    for option in found.options:
        _add_option(table, "as planned", option)
    table.add_section()
    chosen_for = {"largest batch": found.largest, "cheapest": found.cheapest, "fewest GPUs": found.smallest}
    for name, chosen in chosen_for.items():
        if chosen is None:
            table.add_row(name, *["-"] * 5, "none")
        else:
            _add_option(table, name, chosen)
    return table


def time_tree(time: Time, job: Job, gpu: Gpu) -> dict[str, Any]:
    """The same as plain data; ranges are [slow, fast]."""
    return {
        "seconds": {**time.terms, "step": time.step},
        "flops": time.flops,
        "model_flops": time.model_flops,
        "mfu": time.utilization(job, gpu),
        "gpu_hours": None if job.samples is None else time.gpu_hours(job),
    }


def savings_tree(rungs: Sequence[Rung]) -> list[dict[str, Any]]:
    """The same as plain data."""
    trees = []
    for rung in rungs:
        peak = rung.memory.peak
        kinds = {kind: size for kind, size in peak.bytes.items() if size}
        trees.append({"saving": rung.name, "peak": peak.total, "seconds": rung.time.step, "kinds": kinds})
    return trees


def fit_tree(found: Fit) -> dict[str, Any]:
    """The same as plain data."""
    chosen = {"largest": found.largest, "cheapest": found.cheapest, "smallest": found.smallest}
    return {
        **{name: None if option is None else _option_tree(option) for name, option in chosen.items()},
        "options": [_option_tree(option) for option in found.options],
    }


def middle(both: Range) -> float:
    """The mean of a range."""
    return sum(both) / 2


def spread(both: Range, percent: bool = False) -> str:
    """A range in words."""
    if percent:
        return " to ".join(f"{value:.0%}" for value in both)
    return " to ".join(f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in both)


def _add_flops(table: Table, name: str, flops: list[int], job: Job) -> None:
    sample = f"{sum(flops) / job.local_batch / 1e9:,.1f}"
    table.add_row(name, *(f"{value / 1e12:,.1f}" for value in (*flops, sum(flops))), sample)


def _add_option(table: Table, name: str, option: Option) -> None:
    job = option.job
    table.add_row(
        name,
        f"{job.gpus}",
        job.savings.recompute,
        f"{job.accumulation} x {job.chunk:,}",
        f"{option.memory.peak.total / _GIB:,.1f}",
        spread(option.time.step),
        "yes" if option.fits else "no",
    )


def _option_tree(option: Option) -> dict[str, Any]:
    job = option.job
    return {
        "gpus": job.gpus,
        "global_batch": job.global_batch,
        "accumulation": job.accumulation,
        "recompute": job.savings.recompute,
        "peak": option.memory.peak.total,
        "seconds": option.time.step,
        "fits": option.fits,
    }
