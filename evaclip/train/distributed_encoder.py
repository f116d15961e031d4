"""Share the batches of an evaluation among ranks, which agree before each batch on whether to stop."""

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
    """A rank was asked to stop; all ranks raise this before the same batch."""


class DistributedEncoder(nn.Module):
    """A model that encodes images and captions shared by all ranks.

    Ranks vote before each batch. Sharded parameters need all ranks in every call, so ranks without batches encode
    blank ones until no rank has any left.

    Args:
        model: in evaluation mode; a CLIP, or an image model with `encode_image` and `config`.
        world: the ranks.
        tokenizer: captions to tokens.
        stop: whether this rank was asked to stop.
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
        self._is_any_busy(True)
        features: Tensor = self.model.encode_image(images, normalize)
        return features

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        self._is_any_busy(True)
        features: Tensor = self.model.encode_text(tokens, normalize)
        return features

    def share(self, items: Sequence[Any]) -> Sequence[Any]:
        """This rank's part of the items."""
        rank, size = self._world.rank, self._world.size
        return items[len(items) * rank // size : len(items) * (rank + 1) // size]

    def everywhere(self, action: Callable[[], Result], *, texts: bool = False) -> list[Result]:
        """The results of the action on all ranks.

        Raises:
            UserError: on all ranks, of the first rank on which it failed; also for files that can't be read, a lack of
                host memory, and a data worker that died.
            Stopped: on all ranks.
        """
        outcome: Result | UserError
        try:
            outcome = action()
        except UserError as exc:
            outcome = exc
        except _HARMLESS as exc:
            outcome = UserError(str(exc) if isinstance(exc, WorkerDied) else f"{type(exc).__name__}: {exc}")
        self._encode_blanks(texts)
        outcomes = self._world.gather_everywhere(outcome)
        for failure in outcomes:
            if isinstance(failure, UserError):
                raise failure
        return outcomes

    def over(self, items: Sequence[Any], action: Callable[[Any], Result]) -> list[Result]:
        """The results of an action that encodes nothing, one per item; each rank runs it on its part.

        Raises as `everywhere`.
        """
        mine = takewhile(lambda _: not self.stop(), self.share(items))
        return list(chain(*self.everywhere(lambda: [action(item) for item in mine])))

    @torch.no_grad()
    def _encode_blanks(self, texts: bool) -> None:
        while self._is_any_busy(False):
            if self._is_sharded and texts and self.tokenizer:
                self.model.encode_text(self.tokenizer([""]).to(self.device))
            elif self._is_sharded:
                self.model.encode_image(torch.zeros(1, 3, *self._image_shape, device=self.device))

    def _is_any_busy(self, is_busy: bool) -> bool:
        """Whether any rank has a batch."""
        is_busy, stop = self._world.any(is_busy, self.stop())
        if stop:
            raise Stopped
        return is_busy
