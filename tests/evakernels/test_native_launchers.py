"""The launchers on raw buffers are bit-equal to the torch operators, on any kernels."""

from collections.abc import Callable
from typing import Any

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


def like(tensors: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Output arrays; None for a gradient that the operator leaves empty."""
    return [torch.full_like(tensor, torch.nan) if tensor.numel() else None for tensor in tensors]


def assert_same(written: list[Tensor | None], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(written, expected, strict=True):
        assert theirs.numel() == 0 if ours is None else torch.equal(ours, theirs)


ATTENTION_FLOAT32 = [] if _native.runs_gpu_kernels("cpu") else [torch.float32]
"""The GPU kernels have no float32 attention."""
gpu_kernels = pytest.mark.skipif(not _native.runs_gpu_kernels("cpu"), reason="these have kernels for GPUs only")


def same(name: str, inputs: tuple[Any, ...], more: tuple[Any, ...], operator: str = "", **options: Any) -> Any:
    """Asserts that the launcher, with `options`, writes what the operator, with `more`, returns; returns it."""
    result = getattr(native, operator or name)(*inputs, *more)
    expected = (result,) if isinstance(result, Tensor) else result
    outputs = like(expected)
    present = [None if isinstance(t, Tensor) and not t.numel() else t for t in inputs]
    getattr(_C, name)(*present, *outputs, **options)
    assert_same(outputs, expected)
    return result


def pair(
    op: str,
    forward: tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any]],
    backward: Callable[..., tuple[tuple[Any, ...], tuple[Any, ...], dict[str, Any]]],
) -> None:
    """Both passes of an op; `backward` makes the arguments from the forward pass's results."""
    launcher = op.replace("packed", "rope")
    results = same(f"{launcher}_forward", *forward[:2], f"{op}_forward", **forward[2])
    inputs, more, options = backward(*([results] if isinstance(results, Tensor) else results))
    same(f"{launcher}_backward", inputs, more, f"{op}_backward", **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_norms_match_operators(dtype: torch.dtype, rms: bool, scaled: bool) -> None:
    residual, x, dy, dx = (normal(3, 5, 40, dtype=dtype, seed=seed) for seed in range(4))
    weight, bias, layer_scale = (normal(40, seed=seed) for seed in range(3))
    affine, options = (x, weight, bias), {"eps": EPS, "rms": rms}
    scales = (
        {"layer_scale": layer_scale, "row_scale": normal(3)} if scaled else {"layer_scale": None, "row_scale": None}
    )
    pair(
        "layer_norm",
        (affine, (EPS, rms), options),
        lambda y, _, statistics: ((dy, x, weight, statistics), ([True, True, False, False],), {}),
    )
    joined, factors = {"residual": residual} | scales, tuple(scales.values())
    needs_grad, added = [True, True, scaled, scaled], {"dtotal": dx, "branch": x}
    pair(
        "layer_norm",
        (affine, (EPS, rms, None, residual, *factors, True), options | joined | {"add_first": True}),
        lambda y, total, statistics: (
            (dy, total, weight, statistics),
            (needs_grad, None, *factors, dx, x),
            scales | added,
        ),
    )
    pair(
        "layer_norm",
        (affine, (EPS, rms, None, residual, *factors), options | joined),
        lambda y, _, statistics: (
            (dx, x, weight, statistics),
            ([True, True, scaled, False], bias, *factors),
            {"bias": bias} | scales,
        ),
    )


def test_norms_with_bf16_output() -> None:
    x, dy, weight = normal(3, 5, 40), normal(3, 5, 40, seed=1, dtype=torch.bfloat16), normal(40)
    pair(
        "layer_norm",
        ((x, weight, weight), (EPS, False, torch.bfloat16), {"eps": EPS}),
        lambda y, _, statistics: ((dy, x, weight, statistics), ([True, True, False, False],), {}),
    )
    with pytest.raises(ValueError, match="y must be float16"):
        _C.layer_norm_forward(x, None, None, dy, None, torch.empty(2, 3, 5), residual=x.half())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("normed", [False, True])
def test_swiglu_packed_projection(dtype: torch.dtype, normed: bool) -> None:
    gate, up = normal(2, 7, 48, dtype=dtype).chunk(2, -1)
    weight, bias = (normal(24), normal(24, seed=1)) if normed else (None, None)
    dout = normal(2, 7, 24, dtype=dtype)
    pair(
        "swiglu",
        ((gate, up, weight, bias), (EPS,), {"eps": EPS}),
        lambda out, *moments: ((dout, gate, up, weight, *moments), ([normed, normed],), {}),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gelu(dtype: torch.dtype, form: str) -> None:
    x, dout, bias = normal(3, 5, 40, dtype=dtype), normal(3, 5, 40, dtype=dtype, seed=1), normal(40)
    number, options = FORMS.index(form), {"approximate": form}
    pair("gelu", ((x, bias), (number,), options), lambda out: ((dout, x, bias), (number, [True]), options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("by_channel", [False, True])
def test_token_dropout(dtype: torch.dtype, by_channel: bool) -> None:
    patches, prefix, pos_embed = normal(2, 6, 10, dtype=dtype), normal(1, 10, dtype=dtype), normal(7, 10, dtype=dtype)
    if by_channel:
        patches = patches.mT.contiguous().mT
    token_index = torch.tensor([[4, 0, 5], [1, 2, 3]])
    expected = native.token_dropout_forward(patches, token_index, prefix, pos_embed)
    (out,) = like((expected,))
    _C.token_dropout_forward(patches, token_index.numpy(), prefix, pos_embed, out)
    assert_same([out], (expected,))
    same("token_dropout_backward", (normal(2, 4, 10, dtype=dtype), token_index, 1, 6), ([True] * 3,))


def attention_calls() -> dict[str, Any]:
    """By name: the op, q, k and v in float32, and the options of the launcher."""
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
    options = options | {"scale": 0.3}
    pair(op, (qkv, more, options), lambda *results: ((qkv[0], *qkv, *results), more, options))


@gpu_kernels
@pytest.mark.parametrize("keep", [False, True])
def test_contrastive_statistics(keep: bool) -> None:
    image, text = (normal(rows, 16, dtype=torch.bfloat16) for rows in (30, 260))
    same("contrastive_forward", (image, text, torch.tensor(3.0), 5), (keep,))


@gpu_kernels
@pytest.mark.parametrize("columns", [260, 261])
def test_contrastive_gradients(columns: int) -> None:
    image, text = (normal(rows, 16, dtype=torch.bfloat16) for rows in (30, columns))
    inputs, of_rows, of_columns = (image, text, torch.tensor(3.0)), normal(30), normal(columns)
    same("contrastive_dlogits", (of_rows, of_columns, of_rows, *inputs, of_rows, of_columns, 5), ())
    for needs_gradients in (False, True):
        same("siglip_dlogits", (*inputs, torch.tensor(-1.0), 5), ([needs_gradients],))


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
    ops = "contrastive_forward", "contrastive_backward", "siglip_forward", "siglip_value"
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
        _C.rope_attention_forward(
            q, q, q, q.clone(), q.new_empty(2, 9), cu_seqlens=torch.tensor(offsets), max_seqlen=6, scale=1.0
        )


X, ROWS = torch.zeros(2, 4), torch.zeros(2)
HALVES, ONE, SUMS = X.half(), ROWS[:1], torch.zeros(2, 8)
INDEX = torch.zeros(1, 2, dtype=torch.int64)


def dlogits_of(dlogits: Tensor, row_lse: Tensor = ROWS) -> None:
    _C.contrastive_dlogits(ROWS, ROWS, ROWS, HALVES, HALVES, ONE, row_lse, ROWS, 0, dlogits)


def norm_of(x: Tensor, **options: Any) -> None:
    _C.layer_norm_forward(x, None, None, X, None, torch.zeros(2, 2), **options)


@pytest.mark.parametrize(
    ("argument", "error", "call"),
    [
        ("gate", ValueError, lambda: _C.swiglu_forward(X.T, X.T, None, None, torch.zeros(4, 2), None, None)),
        ("norm_weight", ValueError, lambda: _C.swiglu_forward(X, X, ROWS, None, X, ROWS, ROWS)),
        ("padding", ValueError, lambda: _C.swiglu_forward(X, X, None, None, X, None, None, padding=4)),
        ("mean and rstd", ValueError, lambda: _C.swiglu_forward(X, X, X[0], None, X, None, None)),
        ("token_index", TypeError, lambda: _C.token_dropout_forward(X[None], INDEX.int(), None, None, X[None])),
        ("token_index", TypeError, lambda: _C.token_dropout_forward(X[None], INDEX.int().numpy(), None, None, X[None])),
        ("pos_embed", ValueError, lambda: _C.token_dropout_forward(X[None], INDEX, None, X[:1], X[None])),
        ("row_scale", ValueError, lambda: norm_of(X, residual=X, row_scale=X[0])),
        ("residual", ValueError, lambda: norm_of(X, layer_scale=X[0])),
        ("residual", ValueError, lambda: norm_of(X, add_first=True)),
        ("total", ValueError, lambda: norm_of(X, residual=X, add_first=True)),
        ("offset", ValueError, lambda: _C.contrastive_forward(X, X, ROWS[:1], 1, *(ROWS,) * 5)),
        ("row_lse", ValueError, lambda: dlogits_of(HALVES[:, :2], row_lse=ROWS.bfloat16())),
        ("dlogits", ValueError, lambda: dlogits_of(HALVES[:, :3].contiguous())),
        ("dlogits must be aligned", ValueError, lambda: dlogits_of(torch.zeros(5).half()[1:].view(2, 2))),
        ("logit_bias", ValueError, lambda: _C.siglip_dlogits(HALVES, HALVES, ONE, ROWS, 0, SUMS, None)),
        ("sums", ValueError, lambda: _C.siglip_dlogits(HALVES, HALVES, ONE, ONE, 0, X, None)),
        # torch's own error
        ("meta", Exception, lambda: norm_of(X.to("meta"))),
    ],
)
def test_wrong_argument_is_named(argument: str, error: type[Exception], call: Callable[[], None]) -> None:
    with pytest.raises(error, match=argument):
        call()
