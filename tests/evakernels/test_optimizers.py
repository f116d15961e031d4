"""What AdamW and Lamb have in common beside their kernels."""

import sys

import pytest
import torch
from on_device import DEVICE
from optimizer_checks import optimizer_of, parameters, step, tensors
from torch import nn

from evakernels.optim import AdamW, Lamb

every_optimizer = pytest.mark.parametrize("kind", [AdamW, Lamb])


@every_optimizer
def test_grad_scaler_drives_it_without_reading_the_flag(kind):
    scaler = torch.amp.GradScaler(DEVICE.type, init_scale=4.0)
    optimizer, plain = (optimizer_of(tensors(0, torch.float32), kind) for _ in range(2))
    before = [p.clone() for p in parameters(optimizer)]
    for factor in (torch.inf, 1.0):
        optimizer.zero_grad()
        loss = sum((p * g).sum() for p, g in zip(parameters(optimizer), tensors(1, torch.float32), strict=True))
        scaler.scale(factor * loss).backward()
        scaler.step(optimizer)
        scaler.update()
        if factor == torch.inf:
            assert all(torch.equal(a, b) for a, b in zip(parameters(optimizer), before, strict=True))
            assert scaler.get_scale() == 2.0
    step(plain, tensors(1))
    for a, b in zip(parameters(optimizer), parameters(plain), strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(optimizer.state[a], plain.state[b], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "op"), [(AdamW, "adamw_update"), (Lamb, "lamb_step")])
def test_one_call_for_all_groups_and_one_more_for_other_betas(kind, op, monkeypatch):
    calls = []
    module = sys.modules[kind.__module__]
    monkeypatch.setattr(module, op, lambda params, *args, **options: calls.append(len(params)))
    optimizer = optimizer_of(tensors(0), kind)
    step(optimizer, tensors(1))
    optimizer.param_groups[0]["betas"] = [0.5, 0.5]
    step(optimizer, tensors(1))
    assert calls == [4, 1, 3]


@every_optimizer
def test_a_step_is_seen_by_a_graph_that_saved_the_parameter(kind):
    weight = nn.Parameter(torch.ones(3))
    loss = weight.square().sum()
    weight.grad = torch.ones(3)
    kind([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
