"""The launchers on raw buffers are bit-equal to the torch operators, on any kernels."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from evakernels import _native
from evakernels.reference.gelu import FORMS

_C = pytest.importorskip("evakernels._C", reason="the native library is not built")

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6
native = torch.ops.evakernels_native


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def like(tensors: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Output arrays; None for a gradient that the operator leaves empty."""
    return [torch.full_like(tensor, torch.nan) if tensor.numel() else None for tensor in tensors]


def assert_same(written: list[Tensor | None], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(written, expected, strict=True):
        assert theirs.numel() == 0 if ours is None else torch.equal(ours, theirs)


ATTENTION_FLOAT32 = [] if _native.runs_gpu_kernels("cpu") else [torch.float32]
"""The GPU kernels have no float32 attention."""
gpu_kernels = pytest.mark.skipif(not _native.runs_gpu_kernels("cpu"), reason="these have kernels for GPUs only")


def states() -> list[list[Tensor]]:
    """Parameters, gradients, moments and steps of two tensors."""
    params, grads, moments, squares = ([normal(size, seed=seed) for size in (5, 3000)] for seed in range(4))
    return [params, grads, moments, [square.square() for square in squares], [torch.tensor(3.0), torch.tensor(3.0)]]


def same(name: str, inputs: tuple[Any, ...], more: tuple[Any, ...], operator: str = "", **options: Any) -> Any:
    """Asserts that the launcher, with `options`, writes what the operator, with `more`, returns; returns it."""
    result = getattr(native, operator or name)(*inputs, *more)
    expected = (result,) if isinstance(result, Tensor) else result
    outputs = like(expected)
    present = [None if isinstance(t, Tensor) and not t.numel() else t for t in inputs]
    getattr(_C, name)(*present, *outputs, **options)
    assert_same(outputs, expected)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [False, True])
def test_layer_norm(dtype: torch.dtype, rms: bool) -> None:
    x, dy, weight, bias = normal(3, 5, 50, dtype=dtype), normal(3, 5, 50, dtype=dtype, seed=1), normal(50), normal(50)
    _, *moments = same("layer_norm_forward", (x, weight, bias), (EPS, rms), eps=EPS, rms=rms)
    same("layer_norm_backward", (dy, x, weight, *moments), (rms, [True, True]), rms=rms)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_add_layer_norm(dtype: torch.dtype, rms: bool, scaled: bool) -> None:
    residual, branch, dy, dx = (normal(3, 5, 40, dtype=dtype, seed=seed) for seed in range(4))
    affine = (normal(40), normal(40, seed=1))
    scales = (normal(40, seed=2), normal(3)) if scaled else (None, None)
    given = (residual, branch, *affine, *scales)
    _, x, *moments = same("add_layer_norm_forward", given, (EPS, rms), eps=EPS, rms=rms)
    given, wanted = (dy, dx, x, branch, affine[0], *scales, *moments), [scaled, True, True, scaled]
    same("add_layer_norm_backward", given, (rms, wanted), rms=rms)


def test_norms_with_bf16_output() -> None:
    x, dy, weight = normal(3, 5, 40), normal(3, 5, 40, seed=1, dtype=torch.bfloat16), normal(40)
    _, *moments = same("layer_norm_forward", (x, weight, weight), (EPS, False, torch.bfloat16), eps=EPS)
    same("layer_norm_backward", (dy, x, weight, *moments), (False, [True, True]))
    given = (x, dy, weight, None, None, None)
    _, total, *moments = same("add_layer_norm_forward", given, (EPS, True, torch.bfloat16), eps=EPS, rms=True)
    given = (dy, x, total, dy, weight, None, None, *moments)
    same("add_layer_norm_backward", given, (True, [False, True, False, False]), rms=True)


def test_unsupported_dtype_of_y_is_refused() -> None:
    half, rows, none = normal(3, 40).half(), (torch.empty(3), torch.empty(3)), (None, None, None, None)
    with pytest.raises(ValueError, match=r"^y is bfloat16 beside float16"):
        _C.layer_norm_forward(half, None, None, half.bfloat16(), *rows)
    with pytest.raises(ValueError, match=r"^weight must be"):
        _C.layer_norm_forward(half, normal(40).bfloat16(), None, half.float(), *rows)
    x = half.float()
    with pytest.raises(ValueError, match=r"^dy is bfloat16 beside float32"):
        _C.add_layer_norm_backward(half.bfloat16(), x, x, x, *none[:3], *rows, x.clone(), None, None, None, None)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [40, 42])
def test_layer_scale_gradient_without_dbranch(dtype: torch.dtype, width: int) -> None:
    dy, dx, x, branch = (normal(3, 5, width, dtype=dtype, seed=seed) for seed in range(4))
    weight, layer_scale, row_scale = normal(width), normal(width, seed=2), normal(3)
    mean, rstd = normal(3, 5), normal(3, 5, seed=1).abs()
    arguments = (dy, dx, x, branch, weight, layer_scale, row_scale, mean, rstd)
    expected = native.add_layer_norm_backward(*arguments, False, [True] * 4)
    gradients = like(expected)
    without = [None if i == 1 else gradient for i, gradient in enumerate(gradients)]
    _C.add_layer_norm_backward(*arguments, *without)
    for i, gradient in enumerate(without):
        assert gradient is None or torch.equal(gradient, expected[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_layer_norm_add(dtype: torch.dtype, scaled: bool) -> None:
    residual, branch, dx = (normal(3, 5, 40, dtype=dtype, seed=seed) for seed in range(3))
    parameters = (normal(40), normal(40, seed=1), *((normal(40, seed=2), normal(3)) if scaled else (None, None)))
    _, *moments = same("layer_norm_add_forward", (residual, branch, *parameters), (EPS, False), eps=EPS)
    same("layer_norm_add_backward", (dx, branch, *parameters, *moments), (False, [True, True, scaled]))


@gpu_kernels
def test_gpu_refuses_branch_of_other_half_type() -> None:
    residual, branch = normal(3, 40, dtype=torch.float16), normal(3, 40, dtype=torch.bfloat16)
    none, rows = (None, None, None, None), (torch.empty(3), torch.empty(3))
    for call in (
        lambda: _C.add_layer_norm_forward(residual, branch, *none, residual.clone(), residual.clone(), *rows),
        lambda: _C.layer_norm_add_backward(residual, branch, *none, *rows, branch.clone(), None, None, None),
        lambda: native.add_layer_norm_forward(residual, branch, *none, EPS, False),
    ):
        with pytest.raises(ValueError, match="branch is bfloat16 beside float16"):
            call()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_swiglu_packed_projection(dtype: torch.dtype, normed: bool) -> None:
    gate, up = normal(2, 7, 48, dtype=dtype).chunk(2, -1)
    dout = normal(2, 7, 24, dtype=dtype)
    weight, bias = (normal(24), normal(24, seed=1)) if normed else (None, None)
    _, *moments = same("swiglu_forward", (gate, up, weight, bias), (EPS,), eps=EPS)
    same("swiglu_backward", (dout, gate, up, weight, *moments), ([normed, normed],))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_channel", [False, True])
def test_token_dropout(dtype: torch.dtype, by_channel: bool) -> None:
    patches, prefix, pos_embed = normal(2, 6, 10, dtype=dtype), normal(1, 10, dtype=dtype), normal(7, 10, dtype=dtype)
    if by_channel:
        patches = patches.transpose(1, 2).contiguous().transpose(1, 2)
    token_index = torch.tensor([[4, 0, 5], [1, 2, 3]])
    expected = native.token_dropout_forward(patches, token_index, prefix, pos_embed)
    (out,) = like((expected,))
    _C.token_dropout_forward(patches, token_index.numpy(), prefix, pos_embed, out)
    assert_same([out], (expected,))
    same("token_dropout_backward", (normal(2, 4, 10, dtype=dtype), token_index, 1, 6), ([True] * 3,))


@pytest.mark.parametrize("nvlamb", [False, True])
def test_lamb(nvlamb: bool) -> None:
    decays, lrs, betas = [0.05, 0.0], [0.1, 0.2], (0.9, 0.98)
    scale, found_inf = torch.tensor(4.0), torch.tensor(0.0)
    (params, grads, *state), theirs = states(), states()
    norms = torch.empty(2, 2)
    options = {"beta1": betas[0], "beta2": betas[1], "eps": EPS, "nvlamb": nvlamb, "found_inf": found_inf}
    _C.lamb_update(params, grads, *state, decays, norms, grad_scale=scale, **options)
    expected = native.lamb_update(*theirs, decays, (*betas, EPS), nvlamb, scale, found_inf)
    assert torch.equal(norms, expected)
    _C.lamb_apply(params, *state, norms, lrs, decays, **options)
    params_of_theirs, _, *state_of_theirs = theirs
    numbers = lrs, decays, (*betas, EPS)
    native.lamb_apply(params_of_theirs, *state_of_theirs, expected, *numbers, nvlamb, found_inf, [], [])
    for ours, other in zip([params, *state], [params_of_theirs, *state_of_theirs], strict=True):
        assert_same(ours, tuple(other))


RATES = [0.1, 0.2], [0.05, 0.0]


def stepped(dtype: torch.dtype, flags: Any = (None, None), seeds: Any = (), firsts: Any = ()) -> list[Tensor]:
    """The parameters after a step, asserted to equal the operator's."""
    ours, theirs = states(), states()
    for state in (ours, theirs):
        state[0] = [param.to(dtype) for param in state[0]]
    numbers = {"seeds": list(seeds), "first_elements": list(firsts)}
    options = {"beta1": 0.9, "beta2": 0.98, "eps": EPS, "grad_scale": flags[0], "found_inf": flags[1]}
    _C.lamb_step(*ours, *RATES, **options, **numbers)
    native.lamb_step(*theirs, *RATES, (0.9, 0.98, EPS), False, *flags, *numbers.values())
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, tuple(b))
    return ours[0]


def test_lamb_step():
    """Rounded stochastically only where seeds are given: in bfloat16, by the same numbers."""
    for flags in ((None, None), (torch.tensor(4.0), torch.tensor(0.0))):
        stepped(torch.float32, flags)
    nearest, stochastic = stepped(torch.bfloat16), stepped(torch.bfloat16, seeds=(3, 4), firsts=(0, 1000))
    assert not all(map(torch.equal, stochastic, nearest))
    with pytest.raises(ValueError, match="params must be bfloat16 where there are seeds"):
        stepped(torch.float32, seeds=(3, 4), firsts=(0, 1000))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gelu(dtype: torch.dtype, form: str) -> None:
    x, dout, bias = normal(3, 5, 40, dtype=dtype), normal(3, 5, 40, dtype=dtype, seed=1), normal(40)
    number = FORMS.index(form)
    same("gelu_forward", (x, bias), (number,), approximate=form)
    same("gelu_backward", (dout, x, bias), (number, [True]), approximate=form)


@gpu_kernels
def test_gpu_refuses_float32_attention() -> None:
    q, offsets = normal(9, 2, 16), torch.tensor([0, 9])
    for call in (
        lambda: _C.rope_attention_forward(
            q, q, q, q.clone(), q.new_empty(2, 9), cu_seqlens=offsets, max_seqlen=9, scale=1.0
        ),
        lambda: native.packed_attention_forward(q, q, q, offsets, None, None, None, 9, True, True, 1.0),
        lambda: native.rope_attention_forward(q[None], q[None], q[None], None, None, None, 0, True, True, 1.0),
    ):
        with pytest.raises(ValueError, match=r"attention of float32 has no CUDA kernels; .* Triton's"):
            call()


@pytest.mark.parametrize("dtype", [*ATTENTION_FLOAT32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("compact", [False, True])
def test_rope_attention(dtype: torch.dtype, compact: bool) -> None:
    q, k, v = normal(2, 5, 3, 2, 16, dtype=dtype).unbind(2)
    angles = normal(2, 3, 4) if compact else normal(9, 8)
    cos, sin, index = angles.cos(), angles.sin(), torch.tensor([[8, 0, 3, 4], [1, 2, 0, 7]])
    more = (cos, sin, index, 1, True, True, 0.3)
    options = {"cos": cos, "sin": sin, "token_index": index, "num_prefix": 1, "causal": True, "scale": 0.3}
    results = same("rope_attention_forward", (q, k, v), more, **options)
    same("rope_attention_backward", (normal(2, 5, 2, 16, dtype=dtype, seed=1), q, k, v, *results), more, **options)


@pytest.mark.parametrize("dtype", [*ATTENTION_FLOAT32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_attention(dtype: torch.dtype, causal: bool) -> None:
    q, k, v = normal(9, 3, 2, 16, dtype=dtype).unbind(1)
    offsets = torch.tensor([0, 2, 2, 9])
    more = (offsets, None, None, None, 7, causal, True, 0.3)
    options = {"cu_seqlens": offsets, "max_seqlen": 7, "causal": causal, "scale": 0.3}
    results = same("rope_attention_forward", (q, k, v), more, "packed_attention_forward", **options)
    same("rope_attention_backward", (q, q, k, v, *results), more, "packed_attention_backward", **options)


@pytest.mark.parametrize("dtype", [*ATTENTION_FLOAT32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["in order", "rows", "grid"])
def test_packed_attention_rotated_grouped_heads(dtype: torch.dtype, form: str) -> None:
    q, k, v = normal(9, 8, 16, dtype=dtype).split((4, 2, 2), 1)
    cu_seqlens = torch.tensor([0, 2, 2, 9])
    angles = normal(2, 3, 4) if form == "grid" else normal(9, 8)
    index = None if form == "in order" else torch.tensor([-1, 0, 8, 3, 3, -1, 7, 1, 2])
    cos, sin = angles.cos(), angles.sin()
    more = (cu_seqlens, cos, sin, index, 7, True, False, 0.3)
    options = {"cu_seqlens": cu_seqlens, "cos": cos, "sin": sin, "token_index": index, "max_seqlen": 7}
    options |= {"causal": True, "interleaved": False, "scale": 0.3}
    results = same("rope_attention_forward", (q, k, v), more, "packed_attention_forward", **options)
    same("rope_attention_backward", (q, q, k, v, *results), more, "packed_attention_backward", **options)


@pytest.mark.parametrize("dtype", [*ATTENTION_FLOAT32, torch.bfloat16, torch.float16], ids=str)
def test_rope_attention_grouped_heads_fewer_keys(dtype: torch.dtype) -> None:
    q, k, v = normal(2, 5, 4, 16, dtype=dtype), *normal(2, 3, 2, 2, 16, dtype=dtype, seed=1).unbind(2)
    more = (None, None, None, 0, True, True, 0.3)
    results = same("rope_attention_forward", (q, k, v), more, causal=True, scale=0.3)
    same("rope_attention_backward", (normal(2, 5, 4, 16, dtype=dtype), q, k, v, *results), more, causal=True, scale=0.3)


@pytest.mark.skipif(_native.runs_gpu_kernels("cpu"), reason="the kernels for GPUs serve the CPU here")
@pytest.mark.parametrize("offsets", [[1, 9], [0, 5, 3, 9], [0, 4, 8], [0, 2, 9]])
def test_wrong_cu_seqlens_are_refused(offsets: list[int]) -> None:
    q = normal(9, 2, 16)
    with pytest.raises(ValueError, match=r"cu_seqlens|max_seqlen"):
        _C.rope_attention_forward(
            q, q, q, q.clone(), q.new_empty(2, 9), cu_seqlens=torch.tensor(offsets), max_seqlen=6, scale=1.0
        )


X, ROWS = torch.zeros(2, 4), torch.zeros(2)
INDEX = torch.zeros(1, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("argument", "error", "call"),
    [
        ("gate", ValueError, lambda: _C.swiglu_forward(X.T, X.T, None, None, torch.zeros(4, 2), None, None)),
        ("norm_weight", ValueError, lambda: _C.swiglu_forward(X, X, ROWS, None, X, ROWS, ROWS)),
        ("mean and rstd", ValueError, lambda: _C.swiglu_forward(X, X, X[0], None, X, None, None)),
        ("token_index", TypeError, lambda: _C.token_dropout_forward(X[None], INDEX.int(), None, None, X[None])),
        ("token_index", TypeError, lambda: _C.token_dropout_forward(X[None], INDEX.int().numpy(), None, None, X[None])),
        ("pos_embed", ValueError, lambda: _C.token_dropout_forward(X[None], INDEX, None, X[:1], X[None])),
        ("row_scale", ValueError, lambda: _C.layer_norm_add_forward(X, X, None, None, None, X[0], X, ROWS, ROWS)),
        ("lists", ValueError, lambda: _C.lamb_update([X], [X], [X], [], [], [], X, beta1=0.9, beta2=0.98, eps=EPS)),
        # torch's own error
        ("meta", Exception, lambda: _C.layer_norm_forward(X.to("meta"), None, None, X, ROWS, ROWS)),
    ],
)
def test_wrong_argument_is_named(argument: str, error: type[Exception], call: Callable[[], None]) -> None:
    with pytest.raises(error, match=argument):
        call()
