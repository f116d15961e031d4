"""The folder of a run: what lies where, and who may write into it."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evaclip.atomic import write_text
from evaclip.errors import UserError
from evaclip.run_files import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    EVENTS_FILE,
    LOG_FILE,
    TENSORBOARD_FOLDER,
    TRACKIO_FILE,
    WANDB_FOLDER,
)
from evaclip.train import checkpoint
from evaclip.train.config import TrainConfig
from evaclip.train.overrides import dump_yaml


@dataclass(frozen=True)
class RunFolder:
    """`OUTPUT/NAME` with config.yaml, log.jsonl, events.jsonl, tensorboard/ and checkpoints/."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS_FOLDER

    @property
    def log(self) -> Path:
        return self.path / LOG_FILE

    def create(self, config: TrainConfig, overwrite: bool) -> None:
        """Makes the folder, without what an earlier run left if `overwrite`, and writes the whole configuration."""
        if overwrite:
            self._delete_run()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        checkpoint.remove_unfinished(self.checkpoints)
        write_text(self.path / CONFIG_FILE, dump_yaml(config))

    def _delete_run(self) -> None:
        # Only what a run writes: the folder may hold notes of its owner.
        for folder in (CHECKPOINTS_FOLDER, TENSORBOARD_FOLDER, WANDB_FOLDER):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        for file in (LOG_FILE, EVENTS_FILE, TRACKIO_FILE, CONFIG_FILE):
            (self.path / file).unlink(missing_ok=True)


def locate(
    config: TrainConfig, resume: str, overwrite: bool, say: Callable[[str], None]
) -> tuple[RunFolder, Path | None]:
    """The folder of a run and the checkpoint to go on from; changes nothing.

    Raises:
        UserError: a run of this name exists and neither `resume` nor `overwrite` says what to do with it, or the
            checkpoint that was asked for cannot be used.
    """
    folder = RunFolder(Path(config.output) / config.name)
    if overwrite and resume != "none":
        raise UserError(f"--overwrite starts anew and --resume {resume} goes on: choose one")
    start = checkpoint.find(resume, folder.checkpoints, say)
    if (folder.path / CONFIG_FILE).exists() and resume == "none" and not overwrite:
        raise UserError(
            f"the run {str(folder.path)!r} exists: --resume auto goes on with it, --overwrite deletes it, "
            "--set name=NAME chooses another"
        )
    if resume == "auto" and start is None:
        say(f"no checkpoint under {folder.checkpoints}: starting from the beginning")
    return folder, start
