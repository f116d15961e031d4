"""Small runs, and the path on which the tests of all folders here find the modules beside this file."""

from dataclasses import replace

import pytest
from small_tasks import TASKS

from evaclip.train.config import LogConfig
from evaclip.train.overrides import parse_assignment, validate
from evaclip.train.recipes import get_recipe
from evaclip.train.tree import merge


@pytest.fixture
def run_config(tmp_path):
    """Makes the configuration of a run of 6 steps; arguments are assignments as in `--set`, and one of `TASKS`."""

    def make(*assignments, task="clip"):
        tree = {
            "name": "run",
            "output": str(tmp_path),
            "batch_size": 8,
            "device": "cpu",
            "data": {"train": "synthetic", "num_samples": 40, "workers": 0},
            "optim": {"lr": 1e-3},
            "schedule": {"steps": 6},
            "checkpoint": {"every_minutes": None},
            "log": {"every_steps": 1, "tensorboard": False, "progress": "plain"},
        }
        tree = merge(tree, TASKS[task].tree)
        for assignment in assignments:
            tree = merge(tree, parse_assignment(assignment))
        return validate(tree)

    return make


@pytest.fixture(scope="session")
def averaged_run(tmp_path_factory):
    """A run of three steps with an evaluation. Its averaged weights differ from those of the last step."""
    from evaclip.train.trainer import train  # takes seconds to import

    recipe = get_recipe("tiny")
    log = LogConfig(every_steps=1, tensorboard=False, progress="none")
    config = replace(recipe, batch_size=16, ema_decay=0.9, schedule=replace(recipe.schedule, steps=3), log=log)
    return train(replace(config, output=str(tmp_path_factory.mktemp("averaged")))).folder
