"""A step that says how far it moved each parameter is the step that it would have been, to the bit."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from optimizer_checks import SIZES, parameters
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from evakernels.compat.apex import FusedLAMB
from evakernels.optim import AdamW, Lamb
from evakernels.optim._device_optimizer import Batch

KINDS = {
    "adamw": AdamW,
    "deepspeed": lambda params, **options: Lamb(params, variant="deepspeed", **options),
    "nvlamb": Lamb,
}


def build(kind: str, dtype: torch.dtype = torch.float32, sizes: list[int] = SIZES) -> Any:
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(size, generator=generator).to(dtype).requires_grad_() for size in sizes]
    groups = [{"params": params[:3], "lr": 0.1}, {"params": params[3:], "weight_decay": 0.0}]
    return KINDS[kind](groups, lr=0.01, weight_decay=0.1)


def set_gradients(optimizer: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for param in parameters(optimizer):
        param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_measured_step_is_bit_equal(kind: str, dtype: torch.dtype) -> None:
    plain, measured = build(kind, dtype), build(kind, dtype)
    for seed in range(3):
        before = [param.detach().double() for param in parameters(measured)]
        for optimizer in (plain, measured):
            set_gradients(optimizer, seed)
        plain.step()
        found = measured.measured_step()
        for param, expected, old in zip(parameters(measured), parameters(plain), before, strict=True):
            assert torch.equal(param, expected)
            for name, value in measured.state[param].items():
                assert torch.equal(value, plain.state[expected][name]), name
            change = param.detach().double() - old
            squares = torch.stack([old.square().sum(), change.square().sum()])
            assert found[param].dtype == torch.float32
            # A difference of two numbers is rounded to their type.
            tolerance = 1e-4 if dtype == torch.float32 else 1e-2
            torch.testing.assert_close(found[param].double(), squares, rtol=tolerance, atol=1e-12)


def test_measured_step_skipped() -> None:
    optimizer = build("adamw")
    set_gradients(optimizer, 0)
    optimizer.found_inf = torch.ones(())
    assert all(squares[1] == 0 for squares in optimizer.measured_step().values())


def test_measured_step_without_gradient() -> None:
    optimizer = build("adamw")
    set_gradients(optimizer, 0)
    first, *others = parameters(optimizer)
    first.grad = None
    assert set(optimizer.measured_step()) == set(others)


def test_apex_has_no_measured_step() -> None:
    with pytest.raises(NotImplementedError, match="FusedLAMB has no measured_step"):
        FusedLAMB([torch.zeros(1, requires_grad=True)]).measured_step()


def test_measured_step_copies_parts() -> None:
    batch = Batch()
    for size in (3, 3, 5, 1, 4, 5, 5):
        batch.owners.append(torch.empty(size))
    for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "steps", "lrs", "weight_decays"):
        setattr(batch, name, list(range(7)))
    parts = list(batch.parts())
    assert [[owner.numel() for owner in part.owners] for part in parts] == [[3], [3], [5], [1, 4], [5], [5]]
    assert [number for part in parts for number in part.lrs] == list(range(7))


@pytest.fixture
def alone() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method="tcp://127.0.0.1:0", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", KINDS)
def test_measured_step_of_shards(alone: None, kind: str) -> None:
    mesh = init_device_mesh("cpu", (1,))
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(6, 4, generator=generator).requires_grad_() for _ in range(2)]
    cut = [distribute_tensor(w.detach().clone(), mesh, [Shard(0)]).requires_grad_() for w in whole]
    results = []
    for params in (whole, cut):
        optimizer = KINDS[kind](params, lr=0.1)  # type: ignore[operator]
        for param in params:
            param.grad = torch.ones_like(param)
        results.append(list(optimizer.measured_step().values()))
    torch.testing.assert_close(results[1], results[0])
