"""`_C`: operators on the caller's arrays and on a given instruction set."""

import copy
import math
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from op_checks import record_calls
from torch import Tensor

from evakernels import _native, backends

_C = pytest.importorskip("evakernels._C", reason="the native library is not built")

EPS = 1e-6
every_isa = pytest.mark.parametrize("isa", _C.build_info()["isas_available"])
every_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
native = torch.ops.evakernels_native
gpu_kernels = pytest.mark.skipif(not _native.runs_gpu_kernels("cpu"), reason="these have kernels for GPUs only")
cpu_kernels = pytest.mark.skipif(_native.runs_gpu_kernels("cpu"), reason="these have kernels for CPUs only")
CALLS = record_calls(torch.float32, torch.bfloat16)
# The ops whose kernel takes the same arguments as the op.
OPS = [op for op in CALLS if (op, "cpu") not in _native._launchers and _native.implemented(op, "cpu")]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def same(name: str, *arguments: Any) -> None:
    """Asserts that the launcher writes what the operator returns and changes the same arguments."""
    ours, theirs = copy.deepcopy(arguments), copy.deepcopy(arguments)
    result = getattr(native, name)(*theirs)
    expected = () if result is None else (result,) if isinstance(result, Tensor) else result
    written = [None if tensor is None else torch.full_like(tensor, torch.nan) for tensor in expected]
    getattr(_C, name)(*ours, out=written)
    for out, tensor in zip(written, expected, strict=True):
        assert tensor is None if out is None else torch.equal(out, tensor)
    assert all(map(torch.equal, backends.tensors(ours), backends.tensors(theirs)))


@pytest.mark.parametrize("op", OPS)
def test_launcher_writes_what_the_operator_returns(op: str) -> None:
    supported = [call for call in CALLS[op] if not backends.unsupported_reasons(op, "cpu", *call)]
    assert supported
    for arguments in supported:
        same(op, *arguments)


@gpu_kernels
@pytest.mark.parametrize("columns", [260, 261])
def test_contrastive_kernels(columns: int) -> None:
    image, text = (normal(rows, 16, dtype=torch.bfloat16) for rows in (30, columns))
    inputs, of_rows, of_columns = (image, text, torch.tensor(3.0)), normal(30), normal(columns)
    same("contrastive_dlogits", of_rows, of_columns, of_rows, *inputs, of_rows, of_columns, 5)
    for option in (False, True):
        same("contrastive_forward", *inputs, 5, option)
        same("siglip_dlogits", *inputs, torch.tensor(-1.0), 5, [option])


# --- instruction sets -----------------------------------------------------------------------------------------------


def forward(x: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
    return _C.layer_norm_forward(x, None, bias, EPS, False, **options)[0]


def assert_equal_with_nan(actual: Tensor, expected: Tensor) -> None:
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(), expected.nan_to_num())


@cpu_kernels
@every_isa
@every_half
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
    y = forward(torch.zeros(1, bias.numel(), dtype=dtype), bias, isa=isa)
    assert_equal_with_nan(y, bias.to(dtype)[None])


@cpu_kernels
@every_isa
@every_half
def test_reading_is_exact_for_every_value(isa: str, dtype: torch.dtype) -> None:
    # With one row, dbias is dy as floats.
    dy = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)[None]
    statistics, needs_grad = torch.tensor([[0.0], [1.0]]), [True, True, False, False]
    x, weight = torch.zeros_like(dy), torch.ones(dy.shape[-1])
    _, _, _, dbias, _ = _C.layer_norm_backward(dy, x, weight, statistics, needs_grad, isa=isa)
    assert_equal_with_nan(dbias, dy[0].float())


def test_instruction_set_that_cannot_run() -> None:
    lacking = set(_C.build_info()["isas_built"]) - set(_C.build_info()["isas_available"])
    for isa in (*lacking, "avx9"):
        with pytest.raises(ValueError, match=f"instruction set '{isa}'"):
            forward(torch.zeros(2, 4), None, isa=isa)


def _python(code: str, isa: str) -> str:
    environment = os.environ | {"EVAKERNELS_ISA": isa}
    call = [sys.executable, "-c", code]
    return subprocess.run(call, env=environment, capture_output=True, text=True, check=True).stdout


@cpu_kernels
def test_environment_chooses_the_instruction_set() -> None:
    assert _python("from evakernels import _C; print(_C.active_isa())", "baseline") == "baseline\n"


@cpu_kernels
def test_environment_with_a_wrong_name() -> None:
    code = (
        "import torch, evakernels\n"
        "print(evakernels.info()['native']['isa_error'])\n"
        "try: evakernels.layer_norm(torch.ones(1, 4))\n"
        "except (ValueError, RuntimeError) as exc: print(exc)\n"
    )
    lines = _python(code, "sse9").splitlines()
    assert len(lines) == 2
    assert all("EVAKERNELS_ISA: unknown instruction set 'sse9'; available: baseline" in line for line in lines)


# --- arrays and wrong arguments -------------------------------------------------------------------------------------


@cpu_kernels
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_launcher_takes_numpy_arrays(dtype: type) -> None:
    """An input may be read-only."""
    x = np.random.default_rng(0).standard_normal((6, 20)).astype(dtype)
    y, statistics = np.empty_like(x), np.empty((2, 6), np.float32)
    x.flags.writeable = False
    forward(x, None, out=[y, None, statistics])
    assert np.array_equal(y, forward(torch.from_numpy(x.copy()), None).numpy())


X, ROWS = torch.zeros(2, 4), torch.zeros(2)
HALF, ONE = X.half(), ROWS[:1]
INDEX = torch.zeros(1, 2, dtype=torch.int64)
LISTS = [[X], [X], [ONE], [0.0], [0.9, 0.98, EPS], True, None, None]
WRONG_OFFSETS = (1, 9), (0, 5, 3, 9), (0, 4, 8), (0, 2, 9)
READ_ONLY = np.broadcast_to(np.float32(0), (2, 4))


def norm(x: Any, *out: Any, rms: bool = False, **options: Any) -> None:
    _C.layer_norm_forward(x, None, None, EPS, rms, **options, out=list(out))


def dlogits(out: Tensor, row_lse: Tensor = ROWS) -> None:
    _C.contrastive_dlogits(ROWS, ROWS, ROWS, HALF, HALF, ONE, row_lse, ROWS, 0, out=[out])


def packed(q: Tensor, *offsets: int) -> None:
    _C.packed_attention_forward(q, q, q, torch.tensor(offsets), None, None, None, 6, False, True, 1.0)


@pytest.mark.parametrize(
    ("argument", "error", "call"),
    [
        ("up", ValueError, lambda: _C.swiglu_forward(X, HALF, None, None, EPS)),
        ("norm_weight", ValueError, lambda: _C.swiglu_forward(X, X, ROWS, None, EPS)),
        ("padding", ValueError, lambda: _C.swiglu_forward(X, X, None, None, EPS, padding=4)),
        ("token_index", ValueError, lambda: _C.token_dropout_forward(X[None], INDEX.int(), None, None)),
        ("token_index", ValueError, lambda: _C.token_dropout_forward(X[None], INDEX.int().numpy(), None, None)),
        ("pos_embed", ValueError, lambda: _C.token_dropout_forward(X[None], INDEX, None, X[:1])),
        ("row_scale", ValueError, lambda: norm(X, residual=X, row_scale=X[0])),
        ("residual", ValueError, lambda: norm(X, layer_scale=X[0])),
        ("residual", ValueError, lambda: norm(X, add_first=True)),
        ("x", ValueError, lambda: norm(X.double())),
        ("'x'", RuntimeError, lambda: norm([1.0])),
        ("'bias'", RuntimeError, lambda: _C.gelu_forward(X)),
        ("meta", ValueError, lambda: norm(X.to("meta"))),
        ("out must have 3", ValueError, lambda: norm(X, X)),
        ("y must be Float, got Half", ValueError, lambda: norm(X, HALF, None, X)),
        (r"y must have shape \[2, 4\]", ValueError, lambda: norm(X, ROWS, None, X)),
        (r"statistics must have shape \[1, 2\]", ValueError, lambda: norm(X, X, None, X, rms=True)),
        ("y must be contiguous", ValueError, lambda: norm(X, torch.zeros(4, 2).T, None, X)),
        ("total must be None", ValueError, lambda: norm(X, X, X, X)),
        ("out must be writable", ValueError, lambda: norm(X, X, bytes(8), X)),
    ],
)
def test_wrong_argument_is_named(argument: str, error: type[Exception], call: Callable[[], None]) -> None:
    with pytest.raises(error, match=argument):
        call()


@cpu_kernels
@pytest.mark.parametrize(
    ("argument", "call"),
    [
        *(("cu_seqlens|max_seqlen", partial(packed, normal(9, 2, 16), *offsets)) for offsets in WRONG_OFFSETS),
        ("lists must be equally long", lambda: _C.lamb_update([X], [X, X], *LISTS)),
        ("exp_avgs must be writable", lambda: _C.lamb_update([X], [X], [READ_ONLY], *LISTS[1:])),
    ],
)
def test_wrong_cpu_argument_is_named(argument: str, call: Callable[[], None]) -> None:
    with pytest.raises(ValueError, match=argument):
        call()


@gpu_kernels
@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("offset", lambda: _C.contrastive_forward(HALF, HALF, ONE, 1, False)),
        ("row_lse", lambda: dlogits(HALF, row_lse=ROWS.bfloat16())),
        ("dlogits", lambda: dlogits(HALF[:, :3].contiguous())),
        ("dlogits must be aligned", lambda: dlogits(torch.zeros(5).half()[1:].view(2, 2))),
        ("logit_bias", lambda: _C.siglip_dlogits(HALF, HALF, ONE, ROWS, 0, [True])),
        ("sums", lambda: _C.siglip_dlogits(HALF, HALF, ONE, ONE, 0, [False], out=[X, None])),
        ("isa", lambda: _C.swiglu_forward(X, X, None, None, EPS, isa="baseline")),
        ("attention of float32 has no CUDA kernels", lambda: packed(normal(9, 2, 16), 0, 9)),
        ("image must be bfloat16 or float16", lambda: _C.contrastive_forward(X, X, ONE, 0, False)),
        ("branch must be float16", lambda: norm(X.bfloat16(), residual=HALF)),
    ],
)
def test_wrong_gpu_argument_is_named(argument: str, call: Callable[[], None]) -> None:
    with pytest.raises(ValueError, match=argument):
        call()


def test_launcher_options_end_with_the_call() -> None:
    with pytest.raises(RuntimeError, match="'bias'"):
        _C.gelu_forward(X, out=[X])
    assert native.gelu_forward(X, None, 0).data_ptr() != X.data_ptr()


def test_unknown_operator_is_no_attribute() -> None:
    assert not hasattr(_C, "nothing")
