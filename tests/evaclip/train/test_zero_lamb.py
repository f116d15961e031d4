"""LAMB with the trust ratios of DeepSpeed's ZeRO-1, beside a plain simulation of it."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh

from evaclip.train import zero_lamb
from evaclip.train.zero_lamb import ZeroLamb
from evakernels.ops._shards import first_element_of
from evakernels.optim import Lamb

# Tensors as a tower has them: some longer than a slice, some shorter, a group of one number.
GROUPS = [[(7, 5), (5,), (2, 3, 4)], [()], [(3,), (11, 2)]]
LRS, DECAYS = [0.02, 0.1, 0.05], [0.05, 0.0, 0.2]
BETAS, EPS = (0.9, 0.98), 1e-6


def values(seed: int) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    # Groups and tensors differ in size, so that ratios do.
    return [
        [(3.0**i) * (j + 1) * torch.randn(shape, generator=generator, dtype=torch.float64) for j, shape in enumerate(g)]
        for i, g in enumerate(GROUPS)
    ]


def simulated(steps: int, processes: int) -> list[Tensor]:
    """The groups' flat parameters after some steps: each process holds one flat tensor of each group and steps it."""
    result = []
    for number, tensors in enumerate(values(0)):
        flat = torch.cat([t.flatten() for t in tensors])
        length, lr, decay = flat.numel(), LRS[number], DECAYS[number]
        padding = -length % (2 * processes)
        slices = [s.clone() for s in torch.cat([flat, flat.new_zeros(padding)]).chunk(processes)]
        moments = [(torch.zeros_like(s), torch.zeros_like(s)) for s in slices]
        for t in range(1, steps + 1):
            grads = torch.cat([*(g.flatten() for g in values(t)[number]), flat.new_zeros(padding)]).chunk(processes)
            for w, g, (m, v) in zip(slices, grads, moments, strict=True):
                m.mul_(BETAS[0]).add_((1 - BETAS[0]) * g)
                v.mul_(BETAS[1]).add_((1 - BETAS[1]) * g * g)
                u = m / (v.sqrt() + EPS) + decay * w
                sizes = w.norm().item(), u.norm().item()
                ratio = min(max(sizes[0] / sizes[1], 0.01), 10.0) if all(sizes) else 1.0
                w -= lr * math.sqrt(1 - BETAS[1] ** t) / (1 - BETAS[0] ** t) * ratio * u
        result.append(torch.cat(slices)[:length])
    return result


def optimizer_of(tensors: list[list[Tensor]], processes: int | None, **options) -> Lamb:
    groups = [
        {"params": [nn.Parameter(t) for t in group], "lr": lr, "weight_decay": decay}
        for group, lr, decay in zip(tensors, LRS, DECAYS, strict=True)
    ]
    if processes is None:
        return Lamb(groups, betas=BETAS, eps=EPS, **options)
    return ZeroLamb(groups, betas=BETAS, eps=EPS, zero_processes=processes, **options)


def run(steps: int, processes: int | None) -> Lamb:
    optimizer = optimizer_of(values(0), processes)
    for t in range(1, steps + 1):
        for group, grads in zip(optimizer.param_groups, values(t), strict=True):
            for param, grad in zip(group["params"], grads, strict=True):
                param.grad = grad
        optimizer.step()
    return optimizer


def flat(optimizer: Lamb) -> list[Tensor]:
    return [torch.cat([p.detach().flatten() for p in group["params"]]) for group in optimizer.param_groups]


@pytest.mark.parametrize("processes", [1, 2, 3, 5, 16, 100])
def test_it_repeats_what_zero_does(processes):
    optimizer = run(4, processes)
    for ours, theirs in zip(flat(optimizer), simulated(4, processes), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)
    assert {state["step"].item() for state in optimizer.state.values()} == {4.0}


def test_the_number_of_processes_makes_a_difference():
    results = [flat(run(4, processes))[0] for processes in (None, 1, 2, 3)]
    for i, a in enumerate(results):
        assert all((a - b).abs().max() > 1e-3 * a.abs().max() for b in results[i + 1 :]), i


def test_the_rounding_of_a_tensor_does_not_depend_on_how_it_is_cut():
    """The one slice of a process gives the ratio of a group that is one tensor."""
    options = {"lr": 1e-3, "stochastic_rounding": True}
    given = ([nn.Parameter(torch.ones(100, 3).bfloat16())] for _ in range(3))
    whole = Lamb(next(given), **options)
    cut, pieces = (ZeroLamb(next(given), zero_processes=n, **options) for n in (1, 7))
    for optimizer in (whole, cut, pieces):
        (param,) = optimizer.param_groups[0]["params"]
        param.grad = torch.ones_like(param)
        optimizer.step()
    params = [optimizer.param_groups[0]["params"][0] for optimizer in (whole, cut, pieces)]
    # All elements are alike, and so are all ratios.
    assert torch.equal(params[0], params[1])
    assert torch.equal(params[0], params[2])
    assert params[0].unique().numel() == 2


def test_a_skipped_step_is_not_counted():
    optimizer = run(1, 3)
    before = flat(optimizer)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, flat(optimizer), strict=True))
    assert {state["step"].item() for state in optimizer.state.values()} == {1.0}


@pytest.fixture
def process_groups():
    """Makes this process the one of a rank, among others that aren't there."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    def join(rank: int, size: int) -> None:
        leave()
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)

    def leave() -> None:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    yield join
    leave()


def shard(whole: Tensor, rank: int, size: int) -> DTensor:
    mesh = init_device_mesh("cpu", (size,))
    parts = whole.chunk(size)
    part = parts[rank] if rank < len(parts) else whole[:0]
    return DTensor.from_local(part.clone(), mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def sharded(tensors: list[list[Tensor]], rank: int, size: int) -> list[list[Tensor]]:
    """All but numbers, which can't be cut."""
    return [[shard(t, rank, size) if t.ndim else t for t in group] for group in tensors]


@pytest.mark.parametrize(("size", "processes"), [(2, 3), (3, 2), (4, 5), (8, 1)])
def test_shards_give_the_same(process_groups, monkeypatch, size, processes):
    """Each process is run twice: for its share of the norms, and with the sums of all."""
    expected = run(1, processes)
    shares: list[list[Tensor]] = []

    def one_step(rank: int) -> list[Tensor]:
        process_groups(rank, size)
        optimizer = optimizer_of(sharded(values(0), rank, size), processes)
        for group, grads in zip(optimizer.param_groups, sharded(values(1), rank, size), strict=True):
            for param, grad in zip(group["params"], grads, strict=True):
                param.grad = grad
        optimizer.step()
        assert {state["step"].item() for state in optimizer.state.values()} == {1.0}
        params = [p for group in optimizer.param_groups for p in group["params"]]
        return [p.to_local() if isinstance(p, DTensor) else p.detach() for p in params]

    def keep(sums: Tensor, groups: tuple) -> None:
        if groups:
            shares[-1].append(sums.clone())

    monkeypatch.setattr(zero_lamb, "sum_over", keep)
    for rank in range(size):
        shares.append([])
        one_step(rank)
    totals = [sum(share) for share in zip(*shares, strict=True)]
    assert len(totals) == 1

    def give(sums: Tensor, groups: tuple) -> None:
        if groups:
            sums.copy_(totals[0])

    monkeypatch.setattr(zero_lamb, "sum_over", give)
    results = [one_step(rank) for rank in range(size)]
    params = [p for group in expected.param_groups for p in group["params"]]
    for i, param in enumerate(params):
        whole = torch.cat([r[i] for r in results]) if param.ndim else results[0][i]
        torch.testing.assert_close(whole, param.detach(), rtol=1e-12, atol=1e-14)


def test_first_elements_of_shards(process_groups):
    whole = torch.randn(5, 3)
    for rank, first in enumerate([0, 6, 12, 15]):
        process_groups(rank, 4)
        assert first_element_of(shard(whole, rank, 4)) == first
    process_groups(1, 4)
    mesh = init_device_mesh("cpu", (2, 2))
    for placements in ([Shard(0), Shard(0)], [Replicate(), Shard(1)]):
        with pytest.raises(TypeError, match="accepted: cut once, along the first dimension"):
            first_element_of(DTensor.from_local(torch.zeros(2, 2), mesh, placements, run_check=False))
    assert first_element_of(DTensor.from_local(torch.zeros(2, 2), mesh, [Replicate()] * 2, run_check=False)) == 0
    assert first_element_of(DTensor.from_local(torch.zeros(2, 2), mesh, [Replicate(), Shard(0)], run_check=False)) == 4


def test_shards_are_rounded_as_the_whole_is(process_groups):
    """On any number of processes, to the bit: no sum over elements comes before AdamW's rounding."""
    from evakernels.optim import AdamW

    start, grad = torch.randn(37, 3).bfloat16(), torch.randn(37, 3).bfloat16()

    def stepped(param: Tensor, grad: Tensor) -> Tensor:
        param = nn.Parameter(param)
        optimizer = AdamW([nn.Parameter(torch.ones(2).bfloat16()), param], lr=1e-3, stochastic_rounding=True, seed=3)
        param.grad = grad
        optimizer.step()
        return param.detach()

    whole = stepped(start.clone(), grad)
    for size in (2, 5):
        parts = []
        for rank in range(size):
            process_groups(rank, size)
            parts.append(stepped(shard(start, rank, size), shard(grad, rank, size)).to_local())
        assert torch.equal(torch.cat(parts), whole)


def without_a_gradient() -> None:
    optimizer = optimizer_of(values(0), 2)
    for param in optimizer.param_groups[0]["params"][1:]:
        param.grad = torch.ones_like(param)
    optimizer.step()


def transposed() -> None:
    param = nn.Parameter(torch.ones(3, 2).T)
    param.grad = torch.ones_like(param)
    ZeroLamb([param], zero_processes=2).step()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: optimizer_of(values(0), 0), "ZeroLamb: zero_processes is 0; accepted: 1 or more"),
        (lambda: optimizer_of(values(0), 2, variant="nvlamb"), "ZeroLamb: variant is 'nvlamb'; accepted: 'deepspeed'"),
        (without_a_gradient, "all parameters must have gradients, .*that isn't so of parameter group 0"),
        (transposed, r"must be contiguous, given strides \(1, 2\)"),
    ],
)
def test_wrong_input_says_what_is_accepted(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()


def test_a_measured_step_is_the_same_step():
    plain, measured = run(1, 3), run(1, 3)
    plain.step()
    norms = measured.measured_step()
    assert all(torch.equal(a, b) for a, b in zip(flat(plain), flat(measured), strict=True))
    assert len(norms) == 6
