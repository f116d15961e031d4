"""What several processes do in the tests of sharding."""

from contextlib import closing
from functools import partial
from unittest.mock import patch

from evaclip.train import build, trainer
from evaclip.train.build import compile_blocks
from evaclip.train.config import TrainConfig
from evaclip.train.distributed import World, connect


def train_all(*runs: tuple[TrainConfig, str]) -> None:
    """Trains each configuration, from none or from the checkpoint that it is to resume, one after the other."""
    with closing(connect("cpu")) as world:
        # The trainer closes its world, which the next run needs still.
        kept = patch.object(World, "close")
        # Graphs without generated code: a compiler would take longer than all the rest. One process makes them, and
        # what blocks of all others compute is what its own have to.
        compiled = partial(compile_blocks, backend="aot_eager") if world.is_main else lambda model: None
        graphs = patch.object(build, "compile_blocks", compiled)
        with patch.object(trainer, "connect", lambda device, parallel: world), kept, graphs:
            for config, resume in runs:
                trainer.train(config, resume=resume)
