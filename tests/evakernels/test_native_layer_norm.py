"""The compiled layer_norm: every instruction set that this machine can run, against torch's own."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from op_checks import DTYPES, assert_threads_change_no_bit
from torch import Tensor

import evakernels

_C = pytest.importorskip("evakernels._C", reason="the native library is not built")

EPS = 1e-6
ISAS = _C.build_info()["isas_available"]
HALVES = (torch.bfloat16, torch.float16)
native = torch.ops.evakernels_native


def launch_forward(x, weight, bias, *, isa=None):
    y, statistics = torch.full_like(x, math.nan), torch.full((2, *x.shape[:-1]), math.nan)
    _C.layer_norm_forward(x, weight, bias, EPS, False, out=[y, None, statistics], isa=isa)
    return y, statistics


def launch_backward(dy, x, weight, statistics, *, isa=None):
    dx, dweight, dbias = torch.full_like(x, math.nan), *(torch.full_like(weight, math.nan) for _ in range(2))
    needs_grad, out = [True, True, False, False], [dx, None, dweight, dbias, None]
    _C.layer_norm_backward(dy, x, weight, statistics, needs_grad, out=out, isa=isa)
    return dx, dweight, dbias


def norm_inputs(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x with a mean away from zero, weight, bias."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * 2 + 1.5
    return x, torch.randn(shape[-1], generator=generator), torch.randn(shape[-1], generator=generator)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_is_torchs_for_every_value(isa: str, dtype: torch.dtype) -> None:
    # A row of zeros makes y the rounded bias.
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    values = every[every.isfinite()].sort().values.unique()
    middle = (values[:-1].double() + values[1:].double()).div(2).float()
    infinity = torch.tensor(math.inf)
    beyond = torch.tensor([65519.9, 65520.0, 65536.0, 1e30, 3.4e38, math.inf, math.nan, 1e-30, -1e-45])
    # Rounding by adding to the bits would turn the first into minus zero.
    full_nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    neighbours = (torch.nextafter(middle, side) for side in (infinity, -infinity))
    bias = torch.cat([values, middle, *neighbours, beyond, -beyond, full_nan])
    y, _ = launch_forward(torch.zeros(1, bias.numel(), dtype=dtype), None, bias, isa=isa)
    expected = bias.to(dtype)[None]
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_reading_is_exact_for_every_value(isa: str, dtype: torch.dtype) -> None:
    # With one row, dbias is dy as floats.
    dy = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[None]
    x = torch.zeros_like(dy)
    weight = torch.ones(dy.shape[-1])
    _, _, dbias = launch_backward(dy, x, weight, torch.tensor([[0.0], [1.0]]), isa=isa)
    expected = dy[0].float()
    assert torch.equal(dbias.isnan(), expected.isnan())
    assert torch.equal(dbias.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_spread_as_in_torch(isa: str, dtype: torch.dtype, bad: float) -> None:
    x, weight, bias = (t.to(dtype) for t in norm_inputs(5, 67))
    x[1, 3] = bad
    x[3, 66] = bad  # in the part of the row that fills no vector
    leaf = x.clone().requires_grad_()
    parameters = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    expected = F.layer_norm(leaf, (67,), *parameters, EPS)
    expected_gradients = torch.autograd.grad(expected, [leaf, *parameters], torch.ones_like(x))
    y, statistics = launch_forward(x, weight, bias, isa=isa)
    gradients = launch_backward(torch.ones_like(x), x, weight, statistics, isa=isa)
    assert y[1].isnan().all()
    assert y[2].isfinite().all()
    for ours, theirs in zip([y, *gradients], [expected, *expected_gradients], strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan())


def test_threads_do_not_change_the_result() -> None:
    assert_threads_change_no_bit(evakernels.layer_norm, norm_inputs(1500, 133))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_launcher_takes_numpy_arrays(dtype: type) -> None:
    x = np.random.default_rng(0).standard_normal((6, 20)).astype(dtype)
    y, statistics = np.empty_like(x), np.empty((2, 6), np.float32)
    _C.layer_norm_forward(x, None, None, EPS, False, out=[y, None, statistics])
    expected, _ = launch_forward(torch.from_numpy(x), None, None)
    assert np.array_equal(y, expected.numpy())


def test_launcher_read_only_arrays() -> None:
    x, y, statistics = np.ones((2, 4), np.float32), np.empty((2, 4), np.float32), np.empty((2, 2), np.float32)
    x.flags.writeable = False
    _C.layer_norm_forward(x, None, None, EPS, False, out=[y, None, statistics])
    with pytest.raises(ValueError, match="out must be writable"):
        _C.layer_norm_forward(y, None, None, EPS, False, out=[x, None, statistics])


def test_instruction_set_that_cannot_run() -> None:
    lacking = set(_C.build_info()["isas_built"]) - set(ISAS)
    messages = {"avx9": "unknown instruction set 'avx9'"} | {
        isa: f"lacks the instruction set '{isa}'" for isa in lacking
    }
    for isa, message in messages.items():
        with pytest.raises(ValueError, match=message):
            launch_forward(torch.zeros(2, 4), None, None, isa=isa)


def _python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def test_environment_chooses_the_instruction_set() -> None:
    assert _python("from evakernels import _C; print(_C.active_isa())", EVAKERNELS_ISA="baseline") == "baseline"


def test_environment_with_a_wrong_name() -> None:
    code = (
        "import torch, evakernels\n"
        "from evakernels._info import info\n"
        "print(info()['native']['isa_error'])\n"
        "try: evakernels.layer_norm(torch.ones(1, 4))\n"
        "except (ValueError, RuntimeError) as exc: print(exc)\n"
    )
    lines = _python(code, EVAKERNELS_ISA="sse9").splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "EVAKERNELS_ISA: unknown instruction set 'sse9'; available: baseline" in line
