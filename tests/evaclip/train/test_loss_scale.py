"""Loss scaling against torch's own."""

import pytest
import torch

from evaclip.train.loss_scale import LossScale

CPU = torch.device("cpu")


@pytest.mark.parametrize("pattern", ["0000000", "0010000", "1100001000", "11100000000000"])
def test_follows_grad_scaler(pattern: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.0)
    theirs = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    ours = LossScale(CPU, enabled=True, initial=8.0, growth_interval=3)
    for overflow in pattern:
        theirs.scale(torch.zeros(1))
        parameter.grad = torch.full((1,), torch.inf if overflow == "1" else 1.0)
        theirs.step(optimizer)
        theirs.update()
        ours.update(torch.tensor(float(overflow)))
        assert ours.scale.item() == theirs.get_scale()


def test_never_falls_below_one() -> None:
    scale = LossScale(CPU, enabled=True, initial=2.0)
    for _ in range(3):
        scale.update(torch.tensor(1.0))
    assert scale.scale == 1


def test_is_one_for_good_when_disabled() -> None:
    scale = LossScale(CPU, enabled=False)
    scale.update(torch.tensor(1.0))
    assert scale.scale == 1


def test_state_goes_on_where_it_was() -> None:
    first = LossScale(CPU, enabled=True, growth_interval=3)
    for overflow in (1.0, 0.0, 0.0):
        first.update(torch.tensor(overflow))
    second = LossScale(CPU, enabled=True, growth_interval=3)
    second.load_state_dict(first.state_dict())
    second.update(torch.tensor(0.0))
    assert second.scale == 2**16
