"""`evaclip train`."""

import argparse
from functools import partial
from typing import Any

from evaclip.commands.configuration import add_configuration, configure
from evaclip.commands.parser import leaf
from evaclip.errors import UserError
from evaclip.slurm import take_over
from evaclip.train import aliases

_EXAMPLES = (
    "evaclip train                                   # what recipes there are",
    "evaclip train tiny",
    "evaclip train finetune --train-data mine/ --pretrained EVA02-CLIP-B-16:merged2b_s8b_b131k",
    "evaclip train eva02-b-16 --print-config > my.yaml",
    "evaclip train eva02-b-16 --config my.yaml --set optim.lr=1e-3 data.workers=4 --dry-run",
    "evaclip train eva02-e-14-plus --dry-run --as-gpus 144",
    "evaclip train eva02-b-16 --config my.yaml --resume auto",
    "evaclip train eva02-b-16 --config my.yaml --resume weights:runs/mine/checkpoints/step_00001000 --set name=next",
    "torchrun --nproc-per-node 8 -m evaclip -- train eva02-b-16 --config my.yaml",
    "srun --nodes 4 --ntasks-per-node 8 evaclip train eva02-b-16 --config my.yaml      # SLURM, without torchrun",
)


def add_commands(subparsers: Any) -> None:
    """Adds `train` to the command line."""
    parser = leaf(subparsers, "train", help="train a model from a recipe", examples=_EXAMPLES)
    add_configuration(parser)
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:N")
    parser.add_argument(
        "--resume",
        default="none",
        metavar="WHAT",
        help="auto: from the newest whole checkpoint, if any; latest; the path of a checkpoint; weights:PATH: "
        "a new run from the weights of a checkpoint alone; none (the default)",
    )
    parser.add_argument("--overwrite", action="store_true", help="delete an earlier run of the same name")
    parser.add_argument(
        "--steal", action="store_true", help="take the run over from a process that trains it, which then stops"
    )
    parser.add_argument(
        "--print-config", action="store_true", help="print the whole configuration with what its keys mean"
    )
    parser.add_argument("--dry-run", action="store_true", help="build everything, time a few steps, save nothing")
    parser.add_argument(
        "--as-gpus",
        type=int,
        metavar="N",
        help="with --dry-run: as one of N GPUs, the others of which aren't there; on a CPU the step's memory is traced",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Does what the command line asks for; a run that a signal ended exits with 130 or 143."""
    # Imported here so that `evaclip --help` does not wait for torch.
    from evaclip.train import recipes
    from evaclip.train.comments import commented_yaml

    take_over()
    if all(value == args.parser.get_default(name) for name, value in vars(args).items()):
        described = recipes.describe_recipes()
        width = max(map(len, described))
        for name, description in described.items():
            print(f"{name:{width}}  {description}")
        return
    config = configure(args, args.as_gpus, here=not args.print_config)
    if args.print_config:
        print(commented_yaml(config), end="")
        return
    if args.dry_run:
        from evaclip.train.dry_run import dry_run, dry_run_as

        dry = dry_run if args.as_gpus is None else partial(dry_run_as, gpus=args.as_gpus)
        dry(config, resume=args.resume, overwrite=args.overwrite)
        return
    if args.as_gpus is not None:
        raise UserError("--as-gpus is for a --dry-run; torchrun starts the processes of a run")
    from evaclip.train.trainer import train

    for note in aliases.notes(vars(args)):
        print(note)
    outcome = train(config, resume=args.resume, overwrite=args.overwrite, steal=args.steal)
    if outcome.stopped_by is not None:
        raise SystemExit(outcome.stopped_by)
