"""`evaclip plan`."""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from evaclip.commands.parser import leaf
from evaclip.errors import UserError

_EXAMPLES = (
    "evaclip plan --recipe eva02-e-14-plus --gpus 144 --gpu a100-80g --savings --plot savings.png",
    "evaclip plan --model EVA02-CLIP-bigE-14-plus --gpus 144 --gpu a100-80g --global-batch 144000 --token-dropout 0.5",
    "evaclip plan --model EVA02-CLIP-L-14 --gpus 8 --gpu h100-80g --global-batch 16384 --parallel replicate",
    "evaclip plan --model EVA02-CLIP-B-16 --gpus 1 --gpu rtx-4090 --global-batch 1024 --recompute activations --json",
    "evaclip plan --recipe eva02-l-14 --gpus 8 --gpu h100-80g --fit",
)


def add_commands(subparsers: Any) -> None:
    """Adds `plan` to the command line."""
    help = "say what a training run needs before a GPU is rented: memory, operations, time"
    parser = leaf(subparsers, "plan", help=help, examples=_EXAMPLES)
    add = parser.add_argument
    add("--recipe", metavar="NAME", help="start from a recipe of 'evaclip train'; other options replace parts of it")
    add("--model", metavar="NAME", help="the model; needed without a recipe")
    add("--gpus", type=int, default=1, metavar="N", help="how many (1)")
    add("--gpu", default="a100-80g", metavar="KIND", help="which kind (a100-80g)")
    add("--global-batch", type=int, metavar="N", help="samples of a step over all GPUs (1024)")
    add("--accumulation", type=int, metavar="N", help="chunks that each GPU makes of its part of a batch (1)")
    add("--token-dropout", type=float, metavar="SHARE", help="share of the patches that are left out (0)")
    add("--caption-tokens", type=int, metavar="N", help="mean length of captions, with start and end (15)")
    add("--precision", help="fp32, amp_bf16, amp_fp16, bf16 or fp16 (amp_bf16)")
    add("--recompute", help="what is computed again instead of being kept: none, activations or block (block)")
    add("--pad-text", action="store_true", help="run captions with their padding")
    add("--parallel", metavar="MODE", help="replicate, shard, or hybrid: in groups of --shard-size (shard)")
    add("--shard-size", type=int, metavar="N", help="GPUs of a group under --parallel hybrid")
    add("--no-reshard", action="store_true", help="keep what was gathered for the backward pass (ZeRO-2)")
    add("--offload", choices=("none", "cpu"), help="keep parameters, gradients and moments in host memory (none)")
    add("--optimizer", choices=("adamw", "lamb"), help="whose moments are held (lamb)")
    add("--state-dtype", default="fp32", choices=("fp32", "bf16"), help="of the moments (fp32)")
    add("--ema", action="store_true", default=None, help="a moving average of the weights is kept")
    add("--samples", type=int, metavar="N", help="of the whole run, for GPU-hours and days")
    add("--savings", action="store_true", help="say what each saving is worth")
    add("--plot", type=Path, metavar="FILE", help="draw that as stacked bars")
    add("--fit", action="store_true", help="search the largest batch, the cheapest policy and the fewest GPUs")
    add("--json", action="store_true", help="print everything as one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Prints the plan that the command line asks for."""
    # Imported here so that `evaclip --help` does not wait for torch.
    from evaclip.plan.gpus import get_gpu

    job, gpu = job_of(args), get_gpu(args.gpu)
    if args.plot:
        from evaclip.plan.plot import check_plot

        check_plot(args.plot)
    if args.json:
        print(json.dumps(_tree(job, gpu, args), indent=2))
    else:
        _print(job, gpu, args)


def _print(job: Any, gpu: Any, args: argparse.Namespace) -> None:
    from rich.console import Console

    from evaclip.plan import tables, time_tables
    from evaclip.plan.fit import fit
    from evaclip.plan.memory import plan_memory
    from evaclip.plan.time import plan_time

    console = Console()
    memory = plan_memory(job)
    time = plan_time(job, memory, gpu)
    console.print(tables.summary(job, memory, gpu))
    console.print(tables.memory_table(memory, gpu, job.gpus))
    console.print(time_tables.flops_table(time, job))
    console.print(time_tables.time_table(time, job, gpu))
    if args.savings or args.plot:
        console.print(time_tables.savings_table(_ladder(job, gpu, args.plot), gpu))
    if args.fit:
        console.print(time_tables.fit_table(fit(job, gpu), gpu))
    console.print(time_tables.assumptions_text(gpu), highlight=False)


def _tree(job: Any, gpu: Any, args: argparse.Namespace) -> dict[str, Any]:
    from dataclasses import asdict

    from evaclip.plan import tables, time_tables
    from evaclip.plan.fit import fit
    from evaclip.plan.memory import plan_memory
    from evaclip.plan.time import ASSUMPTIONS, plan_time

    memory = plan_memory(job)
    tree: dict[str, Any] = {
        "job": asdict(job),
        "gpu": asdict(gpu),
        "assumptions": asdict(ASSUMPTIONS),
        "memory": tables.memory_tree(memory, gpu),
        "time": time_tables.time_tree(plan_time(job, memory, gpu), job, gpu),
    }
    if args.savings or args.plot:
        tree["savings"] = time_tables.savings_tree(_ladder(job, gpu, args.plot))
    if args.fit:
        tree["fit"] = time_tables.fit_tree(fit(job, gpu))
    return tree


def _ladder(job: Any, gpu: Any, plot: Path | None) -> Any:
    from evaclip.plan.savings import ladder

    rungs = ladder(job, gpu)
    if plot is not None:
        from evaclip.plan.plot import save_plot

        save_plot(rungs, plot, gpu.memory_gib)
    return rungs


def job_of(args: argparse.Namespace) -> Any:
    """The `Job` of a command line: the recipe, or the defaults, and what was given besides."""
    from evaclip.model.savings import Savings
    from evaclip.plan.job import Job

    names = (
        "model", "gpus", "global_batch", "accumulation", "token_dropout", "caption_tokens", "precision", "optimizer",
        "state_dtype", "ema", "samples", "shard_size", "offload",
    )  # fmt: skip
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    given |= {"mode": args.parallel} if args.parallel else {}
    given |= {"reshard": False} if args.no_reshard else {}
    if args.recipe is None and args.model is None:
        raise UserError("name a --model or a --recipe")
    job = Job.of_recipe(args.recipe, **given) if args.recipe else Job(savings=Savings(recompute="block"), **given)
    savings = replace(job.savings, pack_text=job.savings.pack_text and not args.pad_text)
    return replace(job, savings=replace(savings, recompute=args.recompute or savings.recompute))
