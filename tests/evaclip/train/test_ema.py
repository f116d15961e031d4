"""The moving average of the weights."""

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from evaclip.train import distributed
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_applied_restores_weights_on_errors(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(dtype)
    ema = Ema(model, decay=0.9)
    nn.init.ones_(model.weight)
    ema.update(1)
    average = ema.state_dict()["weight"].clone()
    assert not torch.equal(average, average.to(torch.bfloat16))
    own = copy.deepcopy(model.state_dict())

    def use() -> None:
        with ema.applied():
            assert torch.equal(model.weight, average.to(dtype))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        use()
    assert torch.equal(model.weight, own["weight"])
    assert torch.equal(ema.state_dict()["weight"], average)


class Copies(TorchDispatchMode):
    """Counts the bytes of copies that are there at the same time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        if func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            self.now += result.nbytes
            self.most = max(self.most, self.now)
            weakref.finalize(result.untyped_storage(), self._gone, result.nbytes)
        return result

    def _gone(self, size: int) -> None:
        self.now -= size


def test_applied_copies_one_tensor_at_a_time() -> None:
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(5)))
    ema = Ema(model, decay=0.9)
    with Copies() as copies, ema.applied():
        pass
    assert copies.most == 8 * 8 * 4


def test_update_copies_few_16_bit_weights_at_a_time(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 2 * 8 * 8 * 4, raising=False)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(5))).bfloat16()
    ema = Ema(model, decay=0.9)
    average = {name: value.clone() for name, value in ema.state_dict().items()}
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    with Copies() as copies:
        ema.update(1)
    assert copies.most == 2 * 8 * 8 * 4
    for name, parameter in model.named_parameters():
        assert torch.equal(ema.state_dict()[name], average[name].lerp(parameter.detach().float(), 1 - 2 / 11)), name
