"""The launchers on raw buffers are bit-equal to the torch operators, on any kernels."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evakernels import _native, clip_loss, siglip_loss, use_backend
from evakernels.backends import observed_by
from evakernels.reference.gelu import FORMS

_C = pytest.importorskip("evakernels._C", reason="the native library is not built")

DTYPES = [torch.float32, torch.bfloat16]
EPS = 1e-6
native = torch.ops.evakernels_native


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


def like(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Output arrays; None for a result that the operator doesn't compute."""
    return [None if tensor is None else torch.full_like(tensor, torch.nan) for tensor in tensors]


def assert_same(written: list[Tensor | None], expected: tuple[Tensor | None, ...]) -> None:
    for ours, theirs in zip(written, expected, strict=True):
        assert theirs is None if ours is None else torch.equal(ours, theirs)


ATTENTION_FLOAT32 = [] if _native.runs_gpu_kernels("cpu") else [torch.float32]
"""The GPU kernels have no float32 attention."""
gpu_kernels = pytest.mark.skipif(not _native.runs_gpu_kernels("cpu"), reason="these have kernels for GPUs only")


def states() -> list[list[Tensor]]:
    """Parameters, gradients, moments and steps of two tensors."""
    params, grads, moments, squares = ([normal(size, seed=seed) for size in (5, 3000)] for seed in range(4))
    return [params, grads, moments, [square.square() for square in squares], [torch.tensor(3.0), torch.tensor(3.0)]]


def same(name: str, *arguments: Any) -> Any:
    """Asserts that the launcher writes what the operator returns; returns it."""
    result = getattr(native, name)(*arguments)
    expected = (result,) if isinstance(result, Tensor) else result
    outputs = like(expected)
    getattr(_C, name)(*arguments, out=outputs)
    assert_same(outputs, expected)
    return result


def pair(op: str, inputs: tuple[Any, ...], backward: Callable[..., tuple[Any, ...]]) -> None:
    """Both passes of an op; `backward` makes the arguments from the forward pass's results."""
    results = same(f"{op}_forward", *inputs)
    same(f"{op}_backward", *backward(*([results] if isinstance(results, Tensor) else results)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_norms_match_operators(dtype: torch.dtype, rms: bool, scaled: bool) -> None:
    residual, x, dy, dx = (normal(3, 5, 40, dtype=dtype, seed=seed) for seed in range(4))
    weight, bias, layer_scale = (normal(40, seed=seed) for seed in range(3))
    norm = x, weight, bias, EPS, rms
    scales = (layer_scale, normal(3)) if scaled else (None, None)
    pair(
        "layer_norm",
        norm,
        lambda y, _, statistics: (dy, x, weight, statistics, [True, True, False, False]),
    )
    needs_grad = [True, True, scaled, scaled]
    pair(
        "layer_norm",
        (*norm, None, residual, *scales, True),
        lambda y, total, statistics: (dy, total, weight, statistics, needs_grad, None, *scales, dx, x),
    )
    pair(
        "layer_norm",
        (*norm, None, residual, *scales),
        lambda y, _, statistics: (dx, x, weight, statistics, [True, True, scaled, False], bias, *scales),
    )


def test_norms_with_bf16_output() -> None:
    x, dy, weight = normal(3, 5, 40), normal(3, 5, 40, seed=1, dtype=torch.bfloat16), normal(40)
    pair(
        "layer_norm",
        (x, weight, weight, EPS, False, torch.bfloat16),
        lambda y, _, statistics: (dy, x, weight, statistics, [True, True, False, False]),
    )
    with pytest.raises(ValueError, match="y must be float16"):
        _C.layer_norm_forward(x, None, None, EPS, False, torch.bfloat16, x.half())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_swiglu_packed_projection(dtype: torch.dtype, normed: bool) -> None:
    gate, up = normal(2, 7, 48, dtype=dtype).chunk(2, -1)
    weight, bias = (normal(24), normal(24, seed=1)) if normed else (None, None)
    dout = normal(2, 7, 24, dtype=dtype)
    pair(
        "swiglu",
        (gate, up, weight, bias, EPS),
        lambda out, *moments: (dout, gate, up, weight, *moments, [normed, normed]),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", range(len(FORMS)))
def test_gelu(dtype: torch.dtype, form: int) -> None:
    x, dout, bias = normal(3, 5, 40, dtype=dtype), normal(3, 5, 40, dtype=dtype, seed=1), normal(40)
    pair("gelu", (x, bias, form), lambda out: (dout, x, bias, form, [True]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_channel", [False, True])
def test_token_dropout(dtype: torch.dtype, by_channel: bool) -> None:
    patches, prefix, pos_embed = normal(2, 6, 10, dtype=dtype), normal(1, 10, dtype=dtype), normal(7, 10, dtype=dtype)
    if by_channel:
        patches = patches.mT.contiguous().mT
    token_index = torch.tensor([[4, 0, 5], [1, 2, 3]])
    expected = native.token_dropout_forward(patches, token_index, prefix, pos_embed)
    (out,) = like((expected,))
    _C.token_dropout_forward(patches, token_index.numpy(), prefix, pos_embed, out=[out])
    assert_same([out], (expected,))
    same("token_dropout_backward", normal(2, 4, 10, dtype=dtype), token_index, 1, 6, [True] * 3)


@pytest.mark.skipif(_native.runs_gpu_kernels("cpu"), reason="lamb has kernels for CPUs only")
@pytest.mark.parametrize("nvlamb", [False, True])
def test_lamb_phases(nvlamb: bool) -> None:
    decays, lrs, numbers = [0.05, 0.0], [0.1, 0.2], [0.9, 0.98, EPS]
    scale, found_inf = torch.tensor(4.0), torch.tensor(0.0)
    (params, grads, *state), theirs = states(), states()
    norms = torch.empty(2, 2)
    _C.lamb_update(params, grads, *state, decays, numbers, nvlamb, scale, found_inf, out=[norms])
    expected = native.lamb_update(*theirs, decays, numbers, nvlamb, scale, found_inf)
    assert torch.equal(norms, expected)
    more = lrs, decays, numbers, nvlamb, found_inf, [], []
    _C.lamb_apply(params, *state, norms, *more)
    native.lamb_apply(theirs[0], *theirs[2:], expected, *more)
    for ours, other in zip([params, *state], [theirs[0], *theirs[2:]], strict=True):
        assert_same(ours, tuple(other))
    with pytest.raises(ValueError, match="lists must be equally long"):
        _C.lamb_update(params, grads[:1], *state, decays, numbers, nvlamb, scale, found_inf)
    state[0][1] = np.broadcast_to(np.float32(0), 3000)
    with pytest.raises(ValueError, match="exp_avgs must be writable"):
        _C.lamb_update(params, grads, *state, decays, numbers, nvlamb, scale, found_inf)


def attention_calls() -> dict[str, Any]:
    """By name: the op, q, k and v in float32, and options."""
    rows = normal(9, 8)
    index, offsets = torch.tensor([[8, 0, 3, 4], [1, 2, 0, 7]]), torch.tensor([0, 2, 2, 9])
    tokens = torch.tensor([-1, 0, 8, 3, 3, -1, 7, 1, 2])

    def rotary(angles: Tensor) -> dict[str, Tensor]:
        return {"cos": angles.cos(), "sin": angles.sin()}

    qkv, packed = normal(2, 5, 3, 2, 16).unbind(2), normal(9, 3, 2, 16).unbind(1)
    fewer_keys = normal(2, 5, 4, 16), *normal(2, 3, 2, 2, 16, seed=1).unbind(2)
    grouped = normal(9, 8, 16).split((4, 2, 2), 1)
    sequences = {"cu_seqlens": offsets, "max_seqlen": 7}
    images, halves = {"token_index": index, "num_prefix": 1, "causal": True}, {"causal": True, "interleaved": False}
    return {
        "rotated": ("rope_attention", qkv, rotary(rows) | images),
        "fewer keys": ("rope_attention", fewer_keys, {"causal": True}),
        "packed": ("packed_attention", packed, sequences),
        "packed, in order": ("packed_attention", grouped, sequences | rotary(rows) | halves),
        "packed, rows": ("packed_attention", grouped, sequences | rotary(rows) | halves | {"token_index": tokens}),
    }


@pytest.mark.parametrize("dtype", [*ATTENTION_FLOAT32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", attention_calls())
def test_attention(name: str, dtype: torch.dtype) -> None:
    op, qkv, options = attention_calls()[name]
    qkv = [x.to(dtype) for x in qkv]
    table = options.get("cos"), options.get("sin"), options.get("token_index")
    sizes = (options["max_seqlen"],) if op == "packed_attention" else (options.get("num_prefix", 0),)
    offsets = (options["cu_seqlens"],) if op == "packed_attention" else ()
    more = (*offsets, *table, *sizes, options.get("causal", False), options.get("interleaved", True), 0.3)
    pair(op, (*qkv, *more), lambda *results: (qkv[0], *qkv, *results, *more))


@gpu_kernels
@pytest.mark.parametrize("keep", [False, True])
def test_contrastive_statistics(keep: bool) -> None:
    image, text = (normal(rows, 16, dtype=torch.bfloat16) for rows in (30, 260))
    same("contrastive_forward", image, text, torch.tensor(3.0), 5, keep)


@gpu_kernels
@pytest.mark.parametrize("columns", [260, 261])
def test_contrastive_gradients(columns: int) -> None:
    image, text = (normal(rows, 16, dtype=torch.bfloat16) for rows in (30, columns))
    inputs, of_rows, of_columns = (image, text, torch.tensor(3.0)), normal(30), normal(columns)
    same("contrastive_dlogits", of_rows, of_columns, of_rows, *inputs, of_rows, of_columns, 5)
    for needs_gradients in (False, True):
        same("siglip_dlogits", *inputs, torch.tensor(-1.0), 5, [needs_gradients])


@gpu_kernels
def test_losses_use_gpu_kernels() -> None:
    found = set()
    image, text = (normal(30, 16, dtype=torch.float16, seed=seed).requires_grad_() for seed in range(2))
    scalars = torch.tensor(3.0), torch.tensor(-1.0)
    with observed_by(lambda op, backend: found.add((op, backend))), use_backend("cpu"):
        clip_loss(image, text, scalars[0], memory_budget=0).backward()
        loss = siglip_loss(image, text, *scalars)
        loss.backward()
        with torch.no_grad():
            value = siglip_loss(image, text, *scalars)
    ops = "contrastive_forward", "contrastive_backward", "siglip_forward"
    assert found >= {(op, "cpu") for op in ops}
    assert torch.equal(loss, value)
    logits = scalars[0] * image.float() @ text.float().T + scalars[1]
    expected = -F.logsigmoid(logits * (2 * torch.eye(30) - 1)).sum() / 30
    torch.testing.assert_close(value, expected)


@gpu_kernels
def test_gpu_refuses_dtypes() -> None:
    q, offsets = normal(9, 2, 16), torch.tensor([0, 9])
    features, scale = normal(9, 16), torch.tensor(3.0)
    residual, branch = normal(3, 40, dtype=torch.float16), normal(3, 40, dtype=torch.bfloat16)
    for message, call in (
        (
            "attention of float32 has no CUDA kernels",
            lambda: native.packed_attention_forward(q, q, q, offsets, None, None, None, 9, True, True, 1.0),
        ),
        ("image must be bfloat16 or float16", lambda: native.contrastive_forward(features, features, scale, 0, False)),
        (
            "branch must be float16",
            lambda: native.layer_norm_forward(branch, None, None, EPS, False, None, residual),
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.skipif(_native.runs_gpu_kernels("cpu"), reason="the kernels for GPUs serve the CPU here")
@pytest.mark.parametrize("offsets", [[1, 9], [0, 5, 3, 9], [0, 4, 8], [0, 2, 9]])
def test_wrong_cu_seqlens_are_refused(offsets: list[int]) -> None:
    q = normal(9, 2, 16)
    with pytest.raises(ValueError, match=r"cu_seqlens|max_seqlen"):
        _C.packed_attention_forward(q, q, q, torch.tensor(offsets), None, None, None, 6, False, True, 1.0)


X, ROWS = torch.zeros(2, 4), torch.zeros(2)
HALVES, ONE, SUMS = X.half(), ROWS[:1], torch.zeros(2, 8)
INDEX = torch.zeros(1, 2, dtype=torch.int64)


def norm_of(x: Any, *out: Any, rms: bool = False, **options: Any) -> None:
    _C.layer_norm_forward(x, None, None, EPS, rms, **options, out=list(out))


def dlogits_of(dlogits: Tensor, row_lse: Tensor = ROWS) -> None:
    _C.contrastive_dlogits(ROWS, ROWS, ROWS, HALVES, HALVES, ONE, row_lse, ROWS, 0, out=[dlogits])


@pytest.mark.parametrize(
    ("argument", "error", "call"),
    [
        ("up", ValueError, lambda: _C.swiglu_forward(X, X.half(), None, None, EPS)),
        ("norm_weight", ValueError, lambda: _C.swiglu_forward(X, X, ROWS, None, EPS)),
        ("padding", ValueError, lambda: _C.swiglu_forward(X, X, None, None, EPS, padding=4)),
        ("token_index", ValueError, lambda: _C.token_dropout_forward(X[None], INDEX.int(), None, None)),
        ("token_index", ValueError, lambda: _C.token_dropout_forward(X[None], INDEX.int().numpy(), None, None)),
        ("pos_embed", ValueError, lambda: _C.token_dropout_forward(X[None], INDEX, None, X[:1])),
        ("row_scale", ValueError, lambda: norm_of(X, residual=X, row_scale=X[0])),
        ("residual", ValueError, lambda: norm_of(X, layer_scale=X[0])),
        ("residual", ValueError, lambda: norm_of(X, add_first=True)),
        ("x", ValueError, lambda: norm_of(X.double())),
        ("'x'", RuntimeError, lambda: norm_of([1.0])),
        ("'bias'", RuntimeError, lambda: _C.gelu_forward(X)),
        ("meta", ValueError, lambda: norm_of(X.to("meta"))),
        ("out must have 3", ValueError, lambda: norm_of(X, X)),
        ("y must be Float, got Half", ValueError, lambda: norm_of(X, HALVES, None, X)),
        (r"y must have shape \[2, 4\]", ValueError, lambda: norm_of(X, ROWS, None, X)),
        (r"statistics must have shape \[1, 2\]", ValueError, lambda: norm_of(X, X, None, X, rms=True)),
        ("y must be contiguous", ValueError, lambda: norm_of(X, torch.zeros(4, 2).T, None, X)),
        ("total must be None", ValueError, lambda: norm_of(X, X, X, X)),
        ("out must be writable", ValueError, lambda: norm_of(X, X, bytes(8), X)),
    ],
)
def test_wrong_argument_is_named(argument: str, error: type[Exception], call: Callable[[], None]) -> None:
    with pytest.raises(error, match=argument):
        call()


@gpu_kernels
@pytest.mark.parametrize(
    ("argument", "call"),
    [
        ("offset", lambda: _C.contrastive_forward(HALVES, HALVES, ONE, 1)),
        ("row_lse", lambda: dlogits_of(HALVES, row_lse=ROWS.bfloat16())),
        ("dlogits", lambda: dlogits_of(HALVES[:, :3].contiguous())),
        ("dlogits must be aligned", lambda: dlogits_of(torch.zeros(5).half()[1:].view(2, 2))),
        ("logit_bias", lambda: _C.siglip_dlogits(HALVES, HALVES, ONE, ROWS, 0, [True])),
        ("sums", lambda: _C.siglip_dlogits(HALVES, HALVES, ONE, ONE, 0, [False], out=[X, None])),
        ("isa", lambda: _C.swiglu_forward(X, X, None, None, EPS, isa="baseline")),
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
