"""`clip_grad_norm_` beside torch's."""

import inspect

import pytest
import torch
from op_checks import Recorder
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import evakernels

OURS, TORCHS = evakernels.clip_grad_norm_, nn.utils.clip_grad_norm_
SHAPES = [(5, 3), (), (7,), (2, 2, 2)]


def parameters(*dtypes: torch.dtype, size: float = 1.0) -> list[nn.Parameter]:
    generator, made = torch.Generator().manual_seed(0), []
    for dtype in dtypes:
        for shape in SHAPES:
            made.append(nn.Parameter(torch.zeros(shape, dtype=dtype)))
            made[-1].grad = (size * torch.randn(shape, generator=generator)).to(dtype)
    return [*made, nn.Parameter(torch.zeros(3))]  # one without a gradient


def test_its_signature_is_that_of_torch():
    names = [(p.name, p.kind, p.default) for p in inspect.signature(OURS).parameters.values()]
    assert names == [(p.name, p.kind, p.default) for p in inspect.signature(TORCHS).parameters.values()]


@pytest.mark.parametrize("max_norm", [0.5, 100.0])
@pytest.mark.parametrize("norm_type", [2, 2.0, 1.0, float("inf"), "inf"])
@pytest.mark.parametrize("dtypes", [[torch.float64], [torch.float32], [torch.float32, torch.float64]], ids=str)
def test_norms_and_gradients_are_those_of_torch(dtypes, norm_type, max_norm):
    ours, theirs = parameters(*dtypes), parameters(*dtypes)
    torch.testing.assert_close(
        OURS(iter(ours), max_norm, norm_type), TORCHS(theirs, max_norm, norm_type), check_dtype=False
    )
    for got, expected in zip(ours[:-1], theirs[:-1], strict=True):
        torch.testing.assert_close(got.grad, expected.grad)
    assert ours[-1].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_16_bits_is_that_of_float32(dtype):
    """Up to norms to which float16 has no factor."""
    for size in (1.0, 2e4):
        ours, before = parameters(dtype, size=size), parameters(dtype, size=size)
        exact = torch.cat([p.grad.double().flatten() for p in before[:-1]]).norm()
        norm = OURS(ours, 0.01)
        assert norm.dtype == torch.float32
        torch.testing.assert_close(norm.double(), exact, rtol=1e-6, atol=0)
        for got, old in zip(ours[:-1], before[:-1], strict=True):
            torch.testing.assert_close(got.grad.double(), old.grad.double() * 0.01 / exact, rtol=1e-2, atol=1e-6)


def test_nothing_waits_unless_it_is_asked_for():
    """By the operators for which the host waits for a GPU."""
    given = parameters(torch.float32, torch.bfloat16)
    waiting = torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default
    for options, waits in (({}, 0), ({"error_if_nonfinite": True}, 1)):
        with Recorder() as recorder:
            OURS(given, torch.tensor(0.1), **options)
        assert sum(op in waiting for op, _ in recorder.calls) == waits


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nonfinite_norm_raises_on_request(value):
    given = parameters(torch.float32)
    given[0].grad[0, 0] = value
    before = given[2].grad.clone()
    with pytest.raises(RuntimeError, match="clip_grad_norm_: the norm of the gradients"):
        OURS(given, 1.0, error_if_nonfinite=True)
    assert torch.equal(given[2].grad, before)
    assert not OURS(given, 1.0).isfinite()


def test_sharded_gradients_are_scaled_where_they_lie(one_process):
    mesh = init_device_mesh("cpu", (1,))
    (whole, *_), sharded = parameters(torch.float32), nn.Parameter(torch.zeros(5, 3))
    sharded = nn.Parameter(distribute_tensor(sharded.detach(), mesh, [Shard(0)]))
    sharded.grad = distribute_tensor(whole.grad.clone(), mesh, [Shard(0)])
    norm = OURS([sharded], 0.1)
    assert type(norm) is torch.Tensor
    torch.testing.assert_close(norm, OURS([whole], 0.1))
    torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad)
