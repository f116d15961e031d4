"""`evaclip train`, and the options of a configuration that `evaclip plan` shares."""

import argparse
from textwrap import fill
from typing import Any

from evaclip.commands.parser import CommandParser, leaf
from evaclip.errors import UserError
from evaclip.launchers import take_over
from evaclip.machine import usable_cores
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
    """Add `train` to the command line."""
    parser = leaf(subparsers, "train", _run, help="train a model from a recipe", examples=_EXAMPLES)
    add = parser.add_argument
    add_configuration(parser)
    add("--device", help="auto, cpu, cuda or cuda:N")
    help = (
        "auto: from the newest whole checkpoint, if any; latest; the path of a checkpoint; weights:PATH: a new run "
        "from the weights of a checkpoint alone; none (the default)"
    )
    add("--resume", default="none", metavar="WHAT", help=help)
    add("--overwrite", action="store_true", help="delete an earlier run of the same name")
    help = "take the lock of another process that is gone but still named in RUN/lock"
    add("--overwrite-lock", action="store_true", help=help)
    add("--print-config", action="store_true", help="print the whole configuration with the meaning of its keys")
    add("--dry-run", action="store_true", help="build everything, time a few steps, save nothing")
    help = "with --dry-run: as one of N GPUs, without the others; on a CPU the step's memory is traced"
    add("--as-gpus", type=int, metavar="N", help=help)


def _run(args: argparse.Namespace) -> None:
    """Run the trainer; a run that a signal ended exits with 130 or 143."""
    # Imported here so that `evaclip --help` does not wait for torch.
    from evaclip.train import recipes
    from evaclip.train.overrides import commented_yaml

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
        from evaclip.plan.dry_run import dry_run

        dry_run(config, resume=args.resume, overwrite=args.overwrite, gpus=args.as_gpus)
        return
    if args.as_gpus is not None:
        raise UserError("--as-gpus is for a --dry-run; torchrun starts the processes of a run")
    from evaclip.train.trainer import train

    outcome = train(config, resume=args.resume, overwrite=args.overwrite, overwrite_lock=args.overwrite_lock)
    if outcome.stopped_by is not None:
        raise SystemExit(outcome.stopped_by)


def add_configuration(parser: CommandParser) -> None:
    """Add the options that `configure` reads."""
    parser.usage, parser.instead = "%(prog)s [RECIPE] [OPTION ...]", aliases.INSTEAD
    add = parser.add_argument
    add("recipe", nargs="?", metavar="RECIPE", help="initial configuration; none lists the recipes")
    add("--config", action="append", default=[], metavar="YAML", help="file with keys that replace the recipe's")
    add("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="replace single keys, last")
    flags = fill(" ".join(aliases.FLAGS), 110, break_on_hyphens=False)
    group = parser.add_argument_group("options of open_clip and EVA-CLIP, see docs/open-clip.md", flags)
    for flag, assignments in aliases.FLAGS.items():
        takes = aliases.ARGUMENTS.get(flag, {}) if "{}" in assignments else {"action": "store_true"}
        group.add_argument(flag, dest=flag, help=argparse.SUPPRESS, default=None, **takes)


def configure(args: argparse.Namespace, processes: int | None = None, *, here: bool = False) -> Any:
    """Return the `TrainConfig` of a command line: the recipe, then the files, then open_clip's options, then `--set`.

    Args:
        processes: number of ranks; None for the number that torchrun has started.
        here: limit the recipe's `data.workers` to this machine's cores.
    """
    from evaclip.runs.log import load_yaml
    from evaclip.train.config import process_count
    from evaclip.train.overrides import in_layers, parse_assignment, resolve
    from evaclip.train.recipes import get_recipe, with_fitting_nodes, with_own_evaluation
    from evaclip.train.tree import nest

    if args.recipe is None:
        raise UserError("name a RECIPE: 'evaclip train' lists them; --set model.name=NAME takes another model")
    recipe = get_recipe(args.recipe)
    cores = [[nest("data.workers", min(recipe.data.workers, usable_cores()))]] if here else []
    files = [*cores, *([load_yaml(path)] for path in args.config)]
    accumulation = resolve(recipe, in_layers(files, recipe)).accumulation_steps
    changes = aliases.changes(vars(args), accumulation, processes or process_count())
    if getattr(args, "device", None):
        changes.append({"device": args.device})
    layers = [*files, changes, list(map(parse_assignment, args.set))]
    config = resolve(recipe, in_layers(layers, recipe))
    return with_fitting_nodes(with_own_evaluation(config, recipe), recipe)
