"""An evaluation's work, shared by all processes of a training, which agree between batches on whether to stop."""

from collections.abc import Callable, Sequence
from itertools import chain, takewhile
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from evaclip.data.workers import WorkerDied
from evaclip.errors import UserError
from evaclip.train.distributed import World
from evaclip.weights import is_sharded

Result = TypeVar("Result")
_HARMLESS = (OSError, MemoryError, WorkerDied)
"""What leaves a process able to go on, other than an error of a device or a process that is lost."""


class Stopped(Exception):
    """A process was asked to stop; all raise this, at the same place."""


class Spread(nn.Module):
    """A model that encodes images and texts shared by all ranks.

    They meet before each batch. Where parameters are sharded, every call takes all processes, so those with fewer
    batches compute blank ones until none has any left.

    Args:
        model: in evaluation mode; a CLIP, or what has its `encode_image` and the `config` of an image tower.
        world: the processes.
        tokenizer: texts to tokens.
        stop: whether this process was asked to stop.
    """

    def __init__(
        self, model: Any, world: World, tokenizer: Callable[[list[str]], Tensor] | None, stop: Callable[[], bool]
    ) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self._image_shape = getattr(model.config, "vision", model.config).image_shape
        self.tokenizer: Any = tokenizer
        self.stop = stop
        self.device = world.device
        self._world = world
        self._is_sharded = is_sharded(model)
        self.train(model.training)

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor:
        self._meet(True)
        features: Tensor = self.model.encode_image(images, normalize)
        return features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        self._meet(True)
        features: Tensor = self.model.encode_text(tokens, normalize)
        return features

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This process's part, next to those of the others."""
        rank, size = self._world.rank, self._world.size
        return items[len(items) * rank // size : len(items) * (rank + 1) // size]

    def everywhere(self, action: Callable[[], Result], *, texts: bool = False) -> list[Result]:
        """What the action gives in every process.

        Raises:
            UserError: that of the first process in which it failed, in all; also for what can't be read, a lack of host
                memory, and a data worker that died.
            Stopped: in all.
        """
        outcome: Result | UserError
        try:
            outcome = action()
        except UserError as exc:
            outcome = exc
        except _HARMLESS as exc:
            outcome = UserError(str(exc) if isinstance(exc, WorkerDied) else f"{type(exc).__name__}: {exc}")
        self._keep_up(texts)
        outcomes = self._world.gather_everywhere(outcome)
        for failure in outcomes:
            if isinstance(failure, UserError):
                raise failure
        return outcomes

    def over(self, items: Sequence[Any], action: Callable[[Any], Result]) -> list[Result]:
        """What the action, which encodes nothing, gives of each item; each process does it with its part of them.

        Raises as `everywhere`.
        """
        mine = takewhile(lambda _: not self.stop(), self.share(items))
        return list(chain(*self.everywhere(lambda: [action(item) for item in mine])))

    @torch.no_grad()
    def _keep_up(self, texts: bool) -> None:
        while self._meet(False):
            if self._is_sharded and texts and self.tokenizer:
                self.model.encode_text(self.tokenizer([""]).to(self.device))
            elif self._is_sharded:
                self.model.encode_image(torch.zeros(1, 3, *self._image_shape, device=self.device))

    def _meet(self, is_busy: bool) -> bool:
        """Whether any process has a batch."""
        is_busy, stop = self._world.any(is_busy, self.stop())
        if stop:
            raise Stopped
        return is_busy
