"""Named starting points: each recipe is a function that returns a complete configuration.

The published ones hold the hyper-parameters of the EVA-CLIP release (Sun et al. 2023, arXiv 2303.15389): LAMB, 2000 steps
of warm-up and a cosine to 0, weight decay 0.05, gradients clipped at 5, activation checkpointing. They do not set
`data.train` or `model.pretrained`: give your shards and the weights that the towers start from. Adam's moments are
(0.9, 0.98, 1e-6), the values in force when the models were trained. Samples are what the model cards state.
"""

from collections.abc import Callable
from dataclasses import replace

from evaclip.data.config import DataConfig
from evaclip.errors import unknown_name
from evaclip.train.config import (
    CheckpointConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    Precision,
    ScheduleConfig,
    TowerConfig,
    TrainConfig,
)

Recipe = Callable[[], TrainConfig]

RECIPES: dict[str, Recipe] = {}


def recipe(function: Recipe) -> Recipe:
    """Registers a recipe under its function's name, with `-` for `_`."""
    RECIPES[function.__name__.replace("_", "-")] = function
    return function


def get_recipe(name: str) -> TrainConfig:
    """The configuration of a recipe.

    Raises:
        UserError: there is no recipe of this name; the nearest ones are named.
    """
    if name not in RECIPES:
        raise unknown_name("recipe", name, RECIPES)
    return RECIPES[name]()
