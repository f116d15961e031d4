"""Exponential moving average of the weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice

import torch
from torch import Tensor, nn

from evaclip.train.distributed import buckets
from evaclip.train.sharding import forget_gathered
from evaclip.weights import is_dtensor, shard_like


class Ema:
    """Follows a model's parameters: `average += (1 - decay) * (parameter - average)`, in fp32 at least.

    The first steps have a lower decay, `(1 + steps) / (10 + steps)`, to forget the random start.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self._model = model
        self._parameters = dict(model.named_parameters())
        self.restart()

    def restart(self) -> None:
        """Restarts the average from the model's present weights."""
        self._average = {name: _at_least_fp32(value).clone() for name, value in self._parameters.items()}

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Call after each optimizer step; `steps` counts the steps so far, this one included."""
        decay = min(self.decay, (1 + steps) / (10 + steps))
        averages = iter([_local(value) for value in self._average.values()])
        # Few float32 copies of 16-bit weights at a time: those of a bucket are gone before the next one's.
        for bucket in buckets(map(_local, self._parameters.values())):
            torch._foreach_lerp_(list(islice(averages, len(bucket))), [_at_least_fp32(v) for v in bucket], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model holds the averaged weights.

        Tensors and shards are swapped one at a time. Only 16-bit weights are copied: in a float32 average they would
        replace it.
        """
        pairs = [(parameter, self._average[name]) for name, parameter in self._parameters.items()]
        weights = [None if value.dtype == parameter.dtype else parameter.detach().clone() for parameter, value in pairs]
        for parameter, value in pairs:
            _exchange(parameter, value)
        forget_gathered(self._model)
        try:
            yield
        finally:
            for (parameter, value), kept in zip(pairs, weights, strict=True):
                _exchange(parameter, value, kept)
            forget_gathered(self._model)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights by the model's names."""
        return dict(self._average)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        for name, value in self._average.items():
            value.copy_(shard_like(state[name], value))


@torch.no_grad()
def _exchange(parameter: Tensor, average: Tensor, weights: Tensor | None = None) -> None:
    """Puts the average, or `weights`, into the parameter; and what was there into an average of the same dtype."""
    before = parameter.detach().clone() if average.dtype == parameter.dtype else None
    parameter.copy_(average if weights is None else weights)
    if before is not None:
        average.copy_(before)


def _local(value: Tensor) -> Tensor:
    return value.to_local() if is_dtensor(value) else value


def _at_least_fp32(value: Tensor) -> Tensor:
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))
