import pytest
import torch
from op_checks import DTYPES
from optimizer_checks import SIZES, lists

import evakernels


def gradients(dtype: torch.dtype = torch.float32, sizes=SIZES) -> list[torch.Tensor]:
    return lists((torch.float32, dtype, torch.float32, torch.float32), sizes)[1]


def exact(grads: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([g.double().flatten() for g in grads]).square().sum().sqrt()


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_as_accurate_as_torch(dtype):
    grads = gradients(dtype)
    truth, norm = exact(grads), evakernels.gradient_norm(grads)
    torchs = torch.nn.utils.get_total_norm([g.to(norm.dtype) for g in grads])
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norm.shape == ()
    assert abs(norm - truth) <= 2 * abs(torchs - truth) + 4 * torch.finfo(norm.dtype).eps * truth


def mixed_dtypes_and_addresses() -> list[torch.Tensor]:
    grads = [gradients(dtype)[i] for i, dtype in enumerate((*DTYPES, *DTYPES, torch.float32))]
    behind_a_large_value = torch.cat([torch.full((3,), 1e6), gradients()[5]])[3:]
    return [*grads, behind_a_large_value, torch.arange(24.0).view(4, 6).T[::2], torch.tensor(3.0)]


LISTS = {
    "mixed dtypes and addresses": mixed_dtypes_and_addresses(),
    "many elements": gradients(sizes=[3_000_001]),  # torch's own norm on a CPU is wrong in the fourth digit here
    "many tensors": gradients(sizes=[i % 3 for i in range(700)]),
    **{f"sizes {sizes}": gradients(sizes=sizes) for sizes in ([0], [0, 0], [1])},
    # The squares are too large or too small for float16; the other tensor has another dtype.
    **{f"float16 {x}": [torch.full((1000,), x, dtype=torch.float16), torch.zeros(3)] for x in (6e4, 6e-8)},
}


@pytest.mark.parametrize("name", LISTS)
def test_norm_equals_the_formula(name):
    grads = LISTS[name]
    torch.testing.assert_close(evakernels.gradient_norm(grads).double(), exact(grads), rtol=1e-6, atol=0)


def test_two_runs_are_bit_equal():
    assert torch.equal(*(evakernels.gradient_norm(gradients(torch.bfloat16)) for _ in range(2)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_lost(value):
    grads = gradients()
    grads[5][1060] = value
    assert not evakernels.gradient_norm(grads).isfinite()


def test_gradient_norm_is_differentiable():
    grads = [t.double().requires_grad_() for t in gradients(sizes=[3, 5])]
    assert torch.autograd.gradcheck(lambda *t: evakernels.gradient_norm(t), grads)


CALLS = {"gradient_norm": {"grads": [torch.ones(2, 3), torch.ones(4)]}}
WRONG = {"gradient_norm": [(TypeError, r"grads\[1\]", {"grads": [torch.ones(4), torch.ones(4).long()]})]}
