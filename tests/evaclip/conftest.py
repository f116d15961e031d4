"""That tests of all folders here find `processes`, and a run whose steps take milliseconds."""

import pytest
from small_tasks import TASKS

from evaclip.train.overrides import parse_assignment, validate
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
