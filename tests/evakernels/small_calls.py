"""Arguments of a small call of each op with a GPU kernel, by the op's schema."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from evakernels import tuning
from evakernels.reference import contrastive as reference
from evakernels.tuning import calls

_BETAS_AND_EPS = [0.9, 0.98, 1e-6]


class _Draw(calls.Draw):
    """Small numbers: the logits of contrastive losses are products of them."""

    def __call__(self, *shape: int) -> Tensor:
        return super().__call__(*shape) * 0.1


def arguments(op: str, device: str, dtype: torch.dtype) -> tuple[Any, ...]:
    """Those of one call, the same each time."""
    torch.manual_seed(0)
    draw = _Draw(device, dtype, elements=1 << 15, batch=2, heads=2, pairs=64)
    if op in _CALLS:
        return _CALLS[op](draw)
    return next(calls.calls(op, tuning.table("", 80)[op][0]["shape"], draw))


def _state(draw: _Draw) -> list[list[Tensor]]:
    """Parameters, gradients, both moments and step counts of three tensors."""
    values = [draw(33), draw(20, 96), draw(5000)]
    grads, exp_avgs = ([draw(*value.shape) for value in values] for _ in range(2))
    exp_avg_sqs = [draw.statistic(*value.shape) for value in values]
    steps = [torch.tensor(3.0, device=draw.device) for _ in values]
    return [values, grads, [value.float() for value in exp_avgs], exp_avg_sqs, steps]


def _lamb_apply(draw: _Draw) -> tuple[Any, ...]:
    params, _, *state = _state(draw)
    return params, *state, draw.statistic(3, 2), _RATES, _DECAYS, _BETAS_AND_EPS, False, None, [], []


def _siglip_backward(draw: _Draw) -> tuple[Any, ...]:
    """Behind the forward pass, which computes the gradients."""
    inputs = next(calls.calls("siglip_forward", {"depth": 64}, draw))
    return draw.statistic(), *inputs[:4], *reference.siglip_forward(*inputs)[1:]


_RATES, _DECAYS = [1e-2, 1e-2, 1e-2], [0.0, 0.1, 0.1]
_CALLS: dict[str, Callable[[_Draw], tuple[Any, ...]]] = {
    "siglip_backward": _siglip_backward,
    "gelu_forward": lambda draw: (draw(40, 96), draw(96), 0),
    "gelu_backward": lambda draw: (draw(40, 96), draw(40, 96), draw(96), 0, (True,)),
    "adamw_update": lambda draw: (*_state(draw), _RATES, _DECAYS, _BETAS_AND_EPS, None, None, [], []),
    "lamb_update": lambda draw: (*_state(draw), _DECAYS, _BETAS_AND_EPS, False, None, None),
    "lamb_apply": _lamb_apply,
    "lamb_step": lambda draw: (*_state(draw), _RATES, _DECAYS, _BETAS_AND_EPS, False, None, None, [], []),
}
