"""Write checkpoints during training: from a copy, in a thread, one at a time."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evaclip.errors import UserError
from evaclip.train import checkpoint
from evaclip.train.checkpoint import Content, Lost, NotWritten
from evaclip.train.config import CheckpointConfig
from evaclip.train.distributed import World


class Saver:
    """Writes the checkpoints of a run and thins them out.

    A checkpoint that can't be written, because the disk is full for example, is reported and the run goes on: the
    earlier ones stay as they are. Only the last one must succeed: `lost` says that it is worth another try.

    Args:
        root: the folder of all checkpoints.
        config: how many stay, and whether they are written in the background.
        world: the processes that write together; None for one that has everything.
        say: takes a line on what could not be written.
        guard: as for `checkpoint.save`.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        world: World | None,
        say: Callable[[str], None],
        guard: Callable[[], None],
    ) -> None:
        self._root = root
        self._config = config
        self._world = world
        self._group: Any = None if world is None else world.new_saving_group()
        self._say = say
        self._guard = guard
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._failure: NotWritten | None = None

    def start(self, step: int, content: Content) -> None:
        """Begins to write the checkpoint of a step, after the one before is done; all of `world` must call it."""
        self.finish()
        self._find_each_other()
        background = self._config.background
        self._pending = self._thread.submit(self._write, step, _copied(content) if background else content)
        if not background:
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint in progress."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
            self._failure = None
        except NotWritten as exc:
            self._failure = exc
            newest = checkpoint.newest(self._root)
            left = f"{newest.name} and what is older is still there" if newest else "no earlier one is there"
            self._say(f"a checkpoint could not be written: {exc}; the run goes on, {left}")

    def close(self) -> None:
        """Waits for the last checkpoint.

        Raises:
            UserError: it could not be written.
        """
        self.finish()
        self._thread.shutdown()
        if self._failure is not None:
            raise UserError(f"the last checkpoint could not be written: {self._failure}")

    def lost(self) -> bool:
        """Whether the last checkpoint failed as processes lost each other; all of `world` must call it."""
        lost = isinstance(self._failure, Lost)
        return self._world.any(lost)[0] if self._world else lost

    def _find_each_other(self) -> None:
        """Makes the group anew if a process waited too long in it, as nothing gets through it any more."""
        if self._world and self.lost():
            torch.distributed.destroy_process_group(self._group)
            self._group = self._world.new_saving_group()

    def _write(self, step: int, content: Content) -> None:
        checkpoint.save(self._root, step, content, self._group, self._guard)
        if self._group is None or torch.distributed.get_rank(self._group) == 0:
            checkpoint.prune(self._root, step, self._config.keep, self._config.keep_every)


def _copied(content: Content) -> Content:
    return replace(
        content,
        model=_copies(content.model),
        ema=None if content.ema is None else _copies(content.ema),
        moments=_copies(content.moments),
        state=_copy(content.state),
    )


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: _copy(tensor) for name, tensor in tensors.items()}


def _copy(value: Any) -> Any:
    """A copy of a tree, with its tensors in host memory."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item) for item in value)
    return value
