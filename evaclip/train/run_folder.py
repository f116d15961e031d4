"""The folder of a run: its files, and permission to write into it."""

import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from evaclip.atomic import write_text
from evaclip.errors import UserError
from evaclip.runs.files import (
    CHECKPOINTS_FOLDER,
    CONFIG_FILE,
    EVALUATIONS_FOLDER,
    EVENTS_FILE,
    FLIGHT_RECORDER_FOLDER,
    GALLERIES_FOLDER,
    LOCK_FILE,
    LOG_FILE,
    MODEL_FILE,
    REPORT_FILE,
    TENSORBOARD_FOLDER,
    WANDB_FOLDER,
)
from evaclip.runs.lock import Owner, RunLock, read_lock
from evaclip.train import checkpoint
from evaclip.train.checkpoint import Ask, DamagedCheckpoint, Start
from evaclip.train.config import TrainConfig
from evaclip.train.distributed import World
from evaclip.train.overrides import dump_yaml
from evaclip.weights.shards import ensure_joined

_WEIGHTS = "weights:"
ATTRIBUTES = 70.0
"""Seconds after which NFS shows new files of a folder; its cache expires after 60 by default."""


@dataclass(frozen=True)
class RunFolder:
    """`OUTPUT/NAME` with config.yaml, log.jsonl, events.jsonl, tensorboard/ and checkpoints/."""

    path: Path

    @classmethod
    def of(cls, config: TrainConfig) -> Self:
        return cls(Path(config.output) / config.name)

    @property
    def checkpoints(self) -> Path:
        return self.path / CHECKPOINTS_FOLDER

    @property
    def log(self) -> Path:
        return self.path / LOG_FILE

    @property
    def collectives(self) -> Path:
        """Files of `flight_recorder`."""
        return self.path / FLIGHT_RECORDER_FOLDER

    @property
    def exists(self) -> bool:
        """Whether a run has written into it."""
        return (self.path / CONFIG_FILE).exists()

    def lock(self, overwrite: bool) -> RunLock:
        """Locks the folder for this process; see `RunLock`.

        Raises:
            UserError: another process holds the lock, or the folder can't be written.
        """
        with self.writing():
            return RunLock(self.path, overwrite=overwrite)

    def require_shared(self, world: World, lock: RunLock | None) -> None:
        """Checks that all ranks see the main rank's lock; every rank must call it.

        Raises:
            UserError: on every rank, if one doesn't see it: its folder is another one.
        """
        owner, where = world.from_main((lock and lock.owner, str(self.path.absolute())))
        end = time.monotonic() + ATTRIBUTES
        while not (sees := self._sees(owner)) and time.monotonic() < end:
            time.sleep(0.5)
        hosts = world.gather_everywhere((socket.gethostname(), sees))
        if blind := sorted({host for host, sees in hosts if not sees}):
            raise UserError(
                f"the run folder {where!r} of {hosts[0][0]} must be shared by all nodes, got another one for "
                f"{sum(not sees for _, sees in hosts)} of {world.size} ranks, on {', '.join(blind)}; "
                "--set output=FOLDER names one"
            )

    def _sees(self, owner: Owner) -> bool:
        try:
            # Listing makes NFS ask the server again for missing files.
            next(self.path.iterdir(), None)
            return read_lock(self.path / LOCK_FILE) == owner
        except OSError:
            return False

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns an OSError inside into a UserError: the folder can't be written."""
        try:
            yield
        except OSError as exc:
            raise UserError(
                f"the run folder {str(self.path)!r} can't be written ({exc.filename or self.path}: "
                f"{exc.strerror or exc}); --set output=FOLDER puts the run elsewhere"
            ) from exc

    def create(self, config: TrainConfig, overwrite: bool) -> None:
        """Makes the folder, without an earlier run if `overwrite`, and writes the whole configuration."""
        if overwrite:
            self._delete_run()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        write_text(self.path / CONFIG_FILE, dump_yaml(config))

    def _delete_run(self) -> None:
        # Only files of the run and its evaluations: the folder may contain notes of its owner.
        for folder in (
            CHECKPOINTS_FOLDER,
            TENSORBOARD_FOLDER,
            WANDB_FOLDER,
            EVALUATIONS_FOLDER,
            GALLERIES_FOLDER,
            FLIGHT_RECORDER_FOLDER,
        ):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        for file in (LOG_FILE, EVENTS_FILE, REPORT_FILE, CONFIG_FILE):
            (self.path / file).unlink(missing_ok=True)


def locate(
    config: TrainConfig, resume: str, overwrite: bool, say: Callable[[str], None], ask: Ask = checkpoint.alone
) -> Start | None:
    """The checkpoint from which a run starts, None for the beginning; changes no file, except to join weights.

    Args:
        resume: `weights:PATH` for only the weights of a checkpoint folder, or as for `checkpoint.find`.
        ask: checks files, on several ranks.

    Raises:
        UserError: as `permit`, or the requested checkpoint can't be used.
    """
    folder = permit(config, resume, overwrite)
    if resume.startswith(_WEIGHTS):
        return _weights_of(Path(resume.removeprefix(_WEIGHTS)), folder, overwrite, say)
    newest = checkpoint.find(resume, folder.checkpoints, say, ask)
    if resume == "auto" and newest is None:
        say(f"no checkpoint under {folder.checkpoints}: starting from the beginning")
    return None if newest is None else Start(newest)


def permit(config: TrainConfig, resume: str, overwrite: bool) -> RunFolder:
    """The folder of a run.

    Raises:
        UserError: the run exists, and neither `resume` nor `overwrite` is given, or both are.
    """
    folder = RunFolder.of(config)
    is_new = resume == "none" or resume.startswith(_WEIGHTS)
    if overwrite and not is_new:
        raise UserError(f"--overwrite starts anew and --resume {resume} goes on: choose one")
    if folder.exists and is_new and not overwrite:
        raise UserError(
            f"the run {str(folder.path)!r} exists: --resume auto goes on with it, --overwrite deletes it, "
            "--set name=NAME chooses another"
        )
    return folder


def _weights_of(source: Path, folder: RunFolder, overwrite: bool, say: Callable[[str], None]) -> Start:
    if overwrite and folder.path.resolve() in source.resolve().parents:
        raise UserError(f"--overwrite would delete the weights {str(source)!r} themselves; --set name=NAME keeps them")
    if not source.is_dir():
        raise UserError(f"there is no checkpoint folder {str(source)!r}; --resume weights:PATH takes one")
    try:
        remark = checkpoint.check_weights(source)
    except DamagedCheckpoint as exc:
        raise UserError(f"the weights of the checkpoint {str(source)!r} are damaged: {exc}") from exc
    if remark:
        say(remark)
    ensure_joined(source / MODEL_FILE)  # here, where one process does it
    return Start(source, weights_only=True)
