"""What several processes do in the tests of sharding: trainings, one after the other, in one start of torchrun.

torchrun ... sharded_run.py CONFIG.yaml [--resume auto] -- CONFIG.yaml ...
"""

import sys
import warnings
from contextlib import closing
from functools import partial
from unittest.mock import patch

import torch

from evaclip.train import build, trainer
from evaclip.train.compiled import compile_blocks
from evaclip.train.distributed import World, connect
from evaclip.train.overrides import load_yaml, validate


def main() -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=UserWarning)
    with closing(connect("cpu")) as world:
        # The trainer closes its world, which the next run needs still.
        kept = patch.object(World, "close")
        # Graphs without generated code: a compiler would take longer than all the rest.
        graphs = patch.object(build, "compile_blocks", partial(compile_blocks, backend="aot_eager"))
        with patch.object(trainer, "connect", lambda device, offload: world), kept, graphs:
            for argument in sys.argv[1:]:
                name, _, resume = argument.partition(":")
                trainer.train(validate(load_yaml(name)), resume=resume)


if __name__ == "__main__":
    main()
