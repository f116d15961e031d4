"""`evaclip plan`."""

import argparse
import json
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from evaclip.commands.parser import leaf, positive
from evaclip.commands.train import add_configuration, configure
from evaclip.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

    from evaclip.plan.gpus import Gpu
    from evaclip.plan.step import StepPlan

_EXAMPLES = (
    "evaclip plan eva02-e-14-plus --gpus 144 --gpu a100-80g",
    "evaclip plan eva02-l-14 --gpus 8 --gpu h100-80g --layouts",
    "evaclip plan eva02-b-16 --config my.yaml --set accumulation_steps=8 --gpus 8 --gpu h100-80g",
    "evaclip plan eva02-l-14 --gpus 8 --gpu h100-80g --set batch_size=16384 model.savings.recompute=activations --json",
    "evaclip plan finetune-eva02-b-in1k --gpus 8 --set schedule.epoch_samples=1281167",
)
_GIB, _GB = 2**30, 1e9
_MFU = 0.4
_STATIC = ("parameters", "frozen weights", "weights in 16 bits", "gradients", "optimizer state", "averaged weights")


def add_commands(subparsers: Any) -> None:
    """Add `plan` to the command line."""
    help = "plan a training run before a GPU is rented: memory, FLOPs, communication, layouts that fit"
    parser = leaf(subparsers, "plan", _run, help=help, examples=_EXAMPLES)
    add = parser.add_argument
    add("--gpus", type=int, default=1, metavar="N", help="number of GPUs (default: 1)")
    add("--gpu", default="a100-80g", metavar="KIND", help="kind of GPU (default: %(default)s)")
    help = "share of the GPU's peak FLOP/s, for times (default: %(default)s)"
    add("--mfu", type=float, default=_MFU, metavar="SHARE", help=help)
    add("--caption-tokens", type=int, metavar="N", help="mean tokens of a caption, with start and end (default: 15)")
    help = "GPU memory that isn't tensors (CUDA context, NCCL, workspaces), as 'train --dry-run' measures it"
    add("--non-tensor-gib", type=positive, metavar="GIB", help=help)
    add("--layouts", action="store_true", help="plan every parallelism and policy of recomputation")
    add("--json", action="store_true", help="print everything as one JSON object")
    add_configuration(parser)


def _run(args: argparse.Namespace) -> None:
    # Imported here so that `evaclip --help` doesn't wait for torch.
    from rich.console import Console

    from evaclip.plan.gpus import get_gpu
    from evaclip.plan.layouts import better_hybrid, plan_layouts

    if not 0 < args.mfu <= 1:
        raise UserError(f"--mfu must be more than 0 and at most 1, got {args.mfu}")
    config, gpu = configure(args, args.gpus), get_gpu(args.gpu)
    if (other := args.non_tensor_gib) is not None:
        gpu = replace(gpu, other_gib=(other, other))
    parts = _plan_parts(config, args)
    largest = max((plan for plan, _ in parts), key=lambda plan: plan.memory.total())
    peak_flops = 1e12 * (gpu.single_tflops if config.precision == "fp32" else gpu.half_tflops)
    layouts = plan_layouts(largest.config, args.gpus, gpu, args.caption_tokens) if args.layouts else []
    hybrid = better_hybrid(largest, gpu, args.caption_tokens)
    trees = [_tree(plan, steps, gpu, peak_flops * args.mfu) for plan, steps in parts]
    layout_trees = [_tree(plan, None, gpu, peak_flops * args.mfu) for plan in layouts]
    if args.json:
        memory = {"of_the_gpu": int(gpu.memory_gib * _GIB), "room": gpu.room, "host": largest.host}
        better = None if hybrid is None else _tree(hybrid, None, gpu, peak_flops * args.mfu)
        tree = {"gpu": gpu.name, "mfu": args.mfu, **memory, "parts": trees, "layouts": layout_trees, "hybrid": better}
        print(json.dumps(tree, indent=2))
        return
    console = Console()
    console.print(_summary(largest, gpu))
    console.print(_memory_table(largest, gpu))
    console.print(_step_table(largest, gpu, peak_flops * args.mfu, args.mfu))
    if len(parts) > 1 or parts[0][1]:
        console.print(_parts_table(trees, args.gpus))
    if layouts:
        console.print(_layouts_table(layout_trees, gpu))
    if hybrid is not None:
        console.print(
            f"parallel.mode=hybrid parallel.shard_size={hybrid.config.parallel.shard_size} communicates less: "
            f"{hybrid.link_seconds(gpu):,.2g} instead of {largest.link_seconds(gpu):,.2g} s of the slower link a step, "
            f"with {hybrid.memory.total() / _GIB:,.1f} instead of {largest.memory.total() / _GIB:,.1f} GiB of tensors"
        )
    if not any(tree["fits"] for tree in layout_trees or trees):
        console.print(
            "Nothing fits. More GPUs (--gpus), precision=bf16, parallel.offload=cpu or a smaller batch take less"
            if layouts
            else "It doesn't fit. --layouts tries other parallelism, recomputation and numbers of micro-batches"
        )


def _plan_parts(config: Any, args: argparse.Namespace) -> "list[tuple[StepPlan, int | None]]":
    """A plan, and the number of steps if known, for each image size of the run."""
    from evaclip.plan.step import plan_step
    from evaclip.train.schedule import image_size_phases, total_steps

    schedule, sizes = config.schedule, [(None, part.image_size) for part in config.schedule.resolutions]
    parts: list[tuple[int | None, int | None]] = [*sizes, (None, None)]
    if schedule.steps or schedule.epoch_samples:
        steps = total_steps(schedule, config.batch_size, 0)
        parts = [(len(part), size) for part, size in image_size_phases(steps, schedule)]
    plan = partial(plan_step, config, args.gpus, caption_tokens=args.caption_tokens)
    return [(plan(image_size=size), steps_of_part) for steps_of_part, size in parts]


def _tree(plan: "StepPlan", steps: int | None, gpu: "Gpu", rate: float) -> dict[str, Any]:
    """A plan as plain data: bytes, FLOPs, seconds."""
    seconds = sum(plan.flops.values()) / rate
    return {
        "image_size": max(plan.image_shape),
        "steps": steps,
        "mode": plan.config.parallel.mode if plan.is_sharded else "replicate",
        "shard_size": plan.config.parallel.shard_size if plan.is_sharded else None,
        "recompute": plan.config.model.savings.recompute,
        "accumulation": plan.config.accumulation_steps,
        "micro_batch": plan.micro_batch,
        "parameters": plan.parameters,
        "model_parameters": plan.model_parameters,
        "peak": plan.memory.total(),
        "peak_phase": plan.phase,
        "kinds": dict(plan.memory),
        "flops": plan.flops,
        "traffic": plan.traffic,
        "received": plan.received,
        "links": plan.links,
        "seconds": seconds,
        "link_seconds": plan.link_seconds(gpu),
        "gpu_hours": None if steps is None else steps * seconds * plan.gpus / 3600,
        "fits": plan.memory.total() <= gpu.room,
    }


def _table(name: str, *columns: str, title: str | None = None) -> "Table":
    """An empty table in which all columns except the first are numbers."""
    from rich.table import Column, Table

    return Table(name, *(Column(column, justify="right") for column in columns), title=title)


def _summary(plan: "StepPlan", gpu: "Gpu") -> "Table":
    from rich.table import Table

    config, parallel = plan.config, plan.config.parallel
    spread = "whole on each GPU"
    if plan.is_sharded:
        size = parallel.shard_size or plan.gpus
        spread = f"cut over {size} GPUs" + (f", {plan.gpus // size} copies" if size < plan.gpus else "")
        spread += "; in host memory" if parallel.offload != "none" else ""
    samples = f"{plan.gpus} (GPUs) x {config.accumulation_steps} (micro-batches) x {plan.micro_batch:,}"
    is_uneven = config.batch_size % (plan.gpus * config.accumulation_steps) > 0
    table = Table(show_header=False, title="Plan")
    for row in (
        ("model", f"{config.model.name}; {config.task.name}"),
        ("GPUs", f"{plan.gpus} x {gpu.name}"),
        ("batch", f"{config.batch_size:,} = {samples}" + (" at most" if is_uneven else "")),
        ("precision", f"{config.precision}; {config.optim.name}"),
        ("parameters", f"{plan.model_parameters:,}, {spread}: {plan.parameters:,} on a GPU"),
        ("recomputed", config.model.savings.recompute),
    ):
        table.add_row(*row)
    return table


def _memory_table(plan: "StepPlan", gpu: "Gpu") -> "Table":
    """Memory of one GPU by kind, at the highest moment of a step."""
    total = plan.memory.total()
    tower, *place = plan.phase.lstrip("~").split(".")
    phase = f"{tower} tower, {place[0]}" if place else tower
    direction = "backward pass of the " if plan.phase.startswith("~") else ""
    table = _table("kind", "GiB", "share", title=f"Memory of one GPU at its peak: {direction}{phase}")
    first = [kind for kind in _STATIC if plan.memory[kind]]
    others = sorted(plan.memory.keys() - set(first), key=lambda kind: -plan.memory[kind])
    for kind in (*first, *others):
        if plan.memory[kind] >= 1 << 20 or kind in first:
            table.add_row(kind, f"{plan.memory[kind] / _GIB:.2f}", f"{plan.memory[kind] / total:.1%}")
    table.add_section()
    table.add_row("tensors", f"{total / _GIB:.2f}", "")
    low, high = gpu.other_gib
    measured = low == high
    other = "CUDA context, NCCL, workspaces, fragments" + ("" if measured else " (assumed)")
    table.add_row(other, f"{low:.1f}" if measured else f"{low:.0f} to {high:.0f}", "")
    free = [gpu.memory_gib - total / _GIB - reserved for reserved in (high, low)]
    words = (
        "fits, {:.1f} to {:.1f} free" if free[0] >= 0 else "may fit" if free[1] >= 0 else "misses by {:.1f} to {:.1f}"
    )
    table.add_row("of the GPU", f"{gpu.memory_gib:.1f}", words.format(*sorted(map(abs, free))))
    if plan.host:
        table.add_row("in host memory", f"{plan.host / _GIB:.2f}", "")
    return table


def _step_table(plan: "StepPlan", gpu: "Gpu", rate: float, mfu: float) -> "Table":
    """FLOPs, memory traffic and communication of one GPU in a step."""
    from evaclip.plan.recorder import NETWORK

    table = _table("of a GPU and step", "", "of a sample")
    for stage, flops in (*plan.flops.items(), ("all", sum(plan.flops.values()))):
        table.add_row(f"FLOPs, {stage}", f"{flops / 1e12:,.1f} T", f"{flops / plan.local_batch / 1e9:,.1f} G")
    table.add_section()
    table.add_row("read and written by operators", f"{plan.traffic / _GB:,.0f} GB", "")
    for collective, size in plan.received.items():
        table.add_row(f"received, {collective}", f"{size / _GB:,.2f} GB", "")
    table.add_section()
    seconds = sum(plan.flops.values()) / rate
    table.add_row(f"FLOPs at {mfu:.0%} of {rate / mfu / 1e12:g} TFLOP/s", f"{seconds:,.3g} s", "")
    for link, size in plan.links.items():
        speed = gpu.network_gbps if link == NETWORK else gpu.node_gbps
        if size:
            table.add_row(
                f"received {link}: {size / _GB:,.1f} GB at {speed:g} GB/s", f"{size / _GB / speed:,.3g} s", ""
            )
    table.add_row("samples a second, all GPUs", f"{plan.config.batch_size / seconds:,.0f}", "")
    return table


def _parts_table(trees: list[dict[str, Any]], gpus: int) -> "Table":
    table = _table("image size", "steps", "GiB", "TFLOP of a GPU and step", "seconds a step", "GPU-hours", title="Run")
    for tree in trees:
        flops, hours = sum(tree["flops"].values()) / 1e12, tree["gpu_hours"]
        steps = "?" if tree["steps"] is None else f"{tree['steps']:,}"
        spent = "?" if hours is None else f"{hours:,.0f}"
        row = (f"{tree['peak'] / _GIB:.2f}", f"{flops:,.1f}", f"{tree['seconds']:,.3g}", spent)
        table.add_row(f"{tree['image_size']}", steps, *row)
    if all(tree["gpu_hours"] is not None for tree in trees):
        hours = sum(tree["gpu_hours"] for tree in trees)
        steps = sum(tree["steps"] for tree in trees)
        table.add_section()
        table.add_row("all", f"{steps:,}", "", "", "", f"{hours:,.0f}, {hours / gpus / 24:,.1f} days")
    return table


def _layouts_table(trees: list[dict[str, Any]], gpu: "Gpu") -> "Table":
    columns = ("recomputed", "micro-batches", "GiB", "TFLOP", "GB received", "seconds", "of links", "fits")
    table = _table("parallel", *columns, title=f"Layouts with the fewest micro-batches that fit {gpu.name}")
    for tree in trees:
        size = f" {tree['shard_size']}" if tree["shard_size"] else ""
        table.add_row(
            f"{tree['mode']}{size}",
            tree["recompute"],
            f"{tree['accumulation']} x {tree['micro_batch']:,}",
            f"{tree['peak'] / _GIB:,.1f}",
            f"{sum(tree['flops'].values()) / 1e12:,.0f}",
            f"{sum(tree['received'].values()) / _GB:,.1f}",
            f"{tree['seconds']:,.3g}",
            f"{tree['link_seconds']:,.2g}",
            "yes" if tree["fits"] else "no",
        )
    return table
