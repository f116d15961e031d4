"""What a run is, as 'evaclip train' and 'evaclip plan' are told."""

import argparse
from typing import Any

from evaclip.errors import UserError
from evaclip.machine import usable_cores
from evaclip.train import aliases


def add_configuration(parser: argparse.ArgumentParser) -> None:
    """Adds all that says what a run is: `configure` reads it."""
    parser.usage = "%(prog)s [RECIPE] [OPTION ...]"
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="where the configuration starts; none lists them")
    parser.add_argument(
        "--config", action="append", default=[], metavar="YAML", help="a file whose keys replace the recipe's"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="replace single keys, after all else"
    )
    group = parser.add_argument_group("spellings of open_clip and EVA-CLIP, for --set KEY=VALUE")
    for alias in aliases.ALIASES:
        if not alias.takes_value:
            group.add_argument(alias.flag, dest=alias.flag, action="store_true", help=alias.meaning)
            continue
        nargs = "*" if alias.many else None
        group.add_argument(alias.flag, dest=alias.flag, metavar="VALUE", nargs=nargs, help=alias.meaning)


def configure(args: argparse.Namespace, processes: int | None = None, *, here: bool = False) -> Any:
    """The `TrainConfig` of a command line: the recipe, then the files, then the aliases, then `--set`.

    Args:
        processes: how many there will be; None for those that torchrun has started.
        here: whether the run will use this machine, so that a recipe's `data.workers` are at most its cores.
    """
    from evaclip.train.config import process_count
    from evaclip.train.overrides import in_layers, load_yaml, parse_assignment, resolve
    from evaclip.train.recipes import get_recipe, with_fitting_parts, with_own_evaluation
    from evaclip.train.tree import nest

    if args.recipe is None:
        raise UserError("name a RECIPE: 'evaclip train' lists them; --set model.name=NAME takes another model")
    recipe = get_recipe(args.recipe)
    cores = [[nest("data.workers", min(recipe.data.workers, usable_cores()))]] if here else []
    files = [*cores, *([load_yaml(path)] for path in args.config)]
    accumulation = resolve(recipe, in_layers(files, recipe)).accumulation
    changes = aliases.changes(vars(args), accumulation, processes or process_count())
    if getattr(args, "device", None):
        changes.append({"device": args.device})
    layers = [*files, changes, list(map(parse_assignment, args.set))]
    config = resolve(recipe, in_layers(layers, recipe))
    return with_fitting_parts(with_own_evaluation(config, recipe), recipe)
