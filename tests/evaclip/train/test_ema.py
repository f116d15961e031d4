"""The moving average of the weights."""

import copy

import pytest
import torch
from torch import nn

from evaclip.train.ema import Ema


def test_follows_its_formula_and_warms_up() -> None:
    model = nn.Linear(3, 2).double()
    ema = Ema(model, decay=0.5)
    expected = model.weight.detach().clone()
    for step in range(1, 12):
        with torch.no_grad():
            model.weight.add_(step)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.state_dict()["weight"], expected)


def test_16_bit_weights_are_averaged_in_fp32() -> None:
    model = nn.Linear(1, 1).bfloat16()
    nn.init.constant_(model.weight, 256.0)
    ema = Ema(model, decay=0.999)
    nn.init.constant_(model.weight, 258.0)
    ema.update(100_000)
    average = ema.state_dict()["weight"]
    assert average.dtype == torch.float32
    assert 256.0 < average.item() < 256.01


def test_applied_shows_the_average_and_puts_back_even_on_an_error() -> None:
    model = nn.Linear(3, 2)
    ema = Ema(model, decay=0.9)
    average = ema.state_dict()["weight"].clone()
    nn.init.ones_(model.weight)
    own = copy.deepcopy(model.state_dict())

    def use() -> None:
        with ema.applied():
            assert torch.equal(model.weight, average)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        use()
    assert torch.equal(model.weight, own["weight"])


def test_load_replaces_the_average() -> None:
    first, second = Ema(nn.Linear(3, 2), 0.9), Ema(nn.Linear(3, 2), 0.9)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)
