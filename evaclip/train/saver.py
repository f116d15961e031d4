"""Write checkpoints during training: from a copy, in a thread, one at a time."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from evaclip.errors import UserError
from evaclip.train import checkpoint
from evaclip.train.checkpoint import Content, Lost, NotWritten
from evaclip.train.config import CheckpointConfig
from evaclip.train.distributed import World


class Saver:
    """Writes the checkpoints of a run and thins them out.

    A checkpoint that can't be written, for example on a full disk, is reported and the run goes on with the earlier
    ones. Only the last one must succeed: `lost` returns whether it is worth another try, and the end of a `with` block
    raises UserError if it failed. An error in the block stays the one that is raised.

    Args:
        root: the folder of all checkpoints.
        config: how many stay.
        world: the ranks that write together; None for one rank that holds everything.
        say: takes a line on a failure.
        device: that computes.
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        world: World | None,
        say: Callable[[str], None],
        device: torch.device | None = None,
    ) -> None:
        self._root = root
        self._config = config
        self._world = world
        self._group: Any = None if world is None else world.new_saving_group()
        self._say = say
        self._copies = _HostCopies(device or torch.device("cpu"))
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._failure: NotWritten | OSError | None = None

    def start(self, step: int, content: Content) -> None:
        """Begins to write the checkpoint of a step, after the one before is done; all of `world` must call it."""
        self.finish()
        if self._world and self.lost():  # nothing gets through the old group any more
            torch.distributed.destroy_process_group(self._group)
            self._group = self._world.new_saving_group()
        self._pending = self._thread.submit(self._write, step, self._copies.take(content))

    def hold_updates(self) -> None:
        """Makes the device finish the copies of a checkpoint; call it before its tensors change."""
        self._copies.hold_device()

    def finish(self) -> None:
        """Waits for the checkpoint in progress."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
            self._failure = None
        except (NotWritten, OSError) as exc:  # an old checkpoint that can't be deleted is an OSError
            self._failure = exc
            newest = checkpoint.newest(self._root)
            left = f"{newest.name} and earlier ones are still there" if newest else "no earlier one is there"
            self._say(f"a checkpoint could not be written: {exc}; {left}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.finish()
        self._thread.shutdown()
        if self._failure is not None and error is None:
            raise UserError(f"the last checkpoint could not be written: {self._failure}")

    def lost(self) -> bool:
        """Whether the last checkpoint failed because ranks lost each other; all of `world` must call it."""
        lost = isinstance(self._failure, Lost)
        return self._world.any(lost)[0] if self._world else lost

    def _write(self, step: int, content: Content) -> None:
        self._copies.wait()
        checkpoint.save(self._root, step, content, self._group)
        if self._group is None or torch.distributed.get_rank(self._group) == 0:
            checkpoint.prune(self._root, step, self._config.keep, self._config.keep_every)


class _HostCopies:
    """Copies a checkpoint's tensors to host memory.

    Tensors of a GPU are copied on their own stream into pinned buffers, which the next checkpoint reuses: the host
    doesn't wait, and forward and backward passes run meanwhile.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers: dict[str, Tensor] = {}
        self._source: Content | None = None
        self._end: torch.cuda.Event | None = None

    def take(self, content: Content) -> Content:
        """The content with tensors in host memory, complete after `wait`; valid until the next call."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):  # does nothing without a stream
            names = ("model", "ema", "moments", "state")
            copies = {name: self._copy(name, getattr(content, name)) for name in names}
        if self._stream is not None:
            self._source = content  # the allocator must not reuse memory that is still being copied
            self._end = self._stream.record_event()
        return replace(content, **copies)

    def hold_device(self) -> None:
        """Makes the current stream wait for the copies."""
        if self._end is not None:
            torch.cuda.current_stream(self._device).wait_event(self._end)

    def wait(self) -> None:
        """Makes the host wait for the copies."""
        if self._end is not None:
            self._end.synchronize()
            self._source = None

    def _copy(self, key: str, value: Any) -> Any:
        """A copy of a tree; `key` is its path."""
        if isinstance(value, Mapping):
            return {name: self._copy(f"{key}/{name}", item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self._copy(f"{key}/{index}", item) for index, item in enumerate(value))
        if not isinstance(value, Tensor):
            return value
        source = value.detach()
        if not source.is_cuda:
            return source.to("cpu", copy=True)
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (source.shape, source.dtype):
            buffer = self._buffers[key] = torch.empty_like(source, device="cpu", pin_memory=True)
        return buffer.copy_(source, non_blocking=True)
