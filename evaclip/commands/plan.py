"""`evaclip plan`."""

import argparse
import json
from dataclasses import asdict, replace
from typing import Any

from evaclip.commands.parser import leaf, positive
from evaclip.commands.train import add_configuration, configure

_EXAMPLES = (
    "evaclip plan eva02-e-14-plus --gpus 144 --gpu a100-80g --savings",
    "evaclip plan eva02-b-16 --config my.yaml --set accumulation=8 --gpus 8 --gpu h100-80g",
    "evaclip plan eva02-l-14 --gpus 8 --gpu h100-80g --set batch_size=16384 model.savings.recompute=activations --json",
    "evaclip plan eva02-l-14 --gpus 8 --gpu h100-80g --fit",
    "evaclip plan finetune-eva02-b-in1k --gpus 8 --set schedule.epoch_samples=1281167",
    "evaclip plan eva02-l-14 --gpus 128 --images-per-core 400 --storage-gbps 5",
)


def add_commands(subparsers: Any) -> None:
    """Adds `plan` to the command line."""
    help = "say what a training run needs before a GPU is rented: memory, operations, time"
    parser = leaf(subparsers, "plan", help=help, examples=_EXAMPLES)
    add = parser.add_argument
    add("--gpus", type=int, default=1, metavar="N", help="how many (1)")
    add("--gpu", default="a100-80g", metavar="KIND", help="which kind (a100-80g)")
    add("--caption-tokens", type=int, metavar="N", help="mean length of captions, with start and end (15)")
    add("--state-dtype", default="fp32", choices=("fp32", "bf16"), help="of the moments (fp32)")
    add("--beside", type=positive, metavar="GIB", help="what a GPU holds besides tensors, as 'train --dry-run' finds")
    add(
        "--images-per-core", type=positive, metavar="N", help="that one core decodes a second ('data bench'), for cores"
    )
    add(
        "--storage-gbps",
        type=positive,
        metavar="GB/S",
        help="at which all GPUs write together, for a checkpoint's time",
    )
    add("--savings", action="store_true", help="say what each saving is worth")
    add("--fit", action="store_true", help="search the largest batch, the cheapest policy and the fewest GPUs")
    add("--json", action="store_true", help="print everything as one JSON object")
    add_configuration(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints the plan that the command line asks for."""
    # Imported here so that `evaclip --help` does not wait for torch.
    from evaclip.plan import tables, time_tables
    from evaclip.plan.fit import fit
    from evaclip.plan.gpus import get_gpu
    from evaclip.plan.host import host_table, host_tree
    from evaclip.plan.job import Job
    from evaclip.plan.parts import parts_table, parts_tree, plan_parts, run_hours
    from evaclip.plan.savings import ladder
    from evaclip.plan.time import ASSUMPTIONS

    config, gpu = configure(args, args.gpus), get_gpu(args.gpu)
    if args.beside is not None:
        gpu = replace(gpu, beside_gib=(args.beside, args.beside))
    captions = {} if args.caption_tokens is None else {"caption_tokens": args.caption_tokens}
    job = Job.of(config, args.gpus, state_dtype=args.state_dtype, **captions)
    parts = plan_parts(config, job, gpu)
    largest = max(parts, key=lambda part: part.memory.peak.total)
    memory, time = largest.memory, largest.time
    fastest = min((part.time for part in parts), key=lambda time: sum(time.step))
    host = host_tree(config, job, memory, fastest, args.images_per_core, args.storage_gbps)
    # What follows is of a step with the largest images; the hours of a run of several parts stand with these.
    of_step = largest.job if len(parts) == 1 else replace(largest.job, samples=None)
    rungs = ladder(of_step, gpu) if args.savings else None
    found = fit(of_step, gpu) if args.fit else None
    if args.json:
        tree: dict[str, Any] = {
            "job": asdict(job),
            "gpu": asdict(gpu),
            "assumptions": asdict(ASSUMPTIONS),
            "memory": tables.memory_tree(memory, gpu),
            "time": {**time_tables.time_tree(time, of_step, gpu), "gpu_hours": run_hours(parts)},
            "parts": parts_tree(parts, args.images_per_core),
            "host": host,
            **({"savings": time_tables.savings_tree(rungs)} if rungs else {}),
            **({"fit": time_tables.fit_tree(found)} if found else {}),
        }
        print(json.dumps(tree, indent=2))
        return
    from rich.console import Console

    console = Console()
    console.print(tables.summary(of_step, memory, gpu))
    console.print(tables.memory_table(memory, gpu, job.gpus))
    console.print(time_tables.flops_table(time, of_step))
    console.print(time_tables.time_table(time, of_step, gpu))
    if len(parts) > 1:
        console.print(parts_table(parts, args.images_per_core))
    console.print(host_table(host))
    if rungs:
        console.print(time_tables.savings_table(rungs))
    if found:
        console.print(time_tables.fit_table(found, gpu))
    console.print(time_tables.assumptions_text(gpu), highlight=False)
