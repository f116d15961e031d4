import math
from functools import partial

import on_device
import op_checks
import pytest
import torch
import torch.nn.functional as F
from case_tests import *  # noqa: F403
from op_checks import DTYPES, no_triton, randn
from torch._subclasses.fake_tensor import FakeTensorMode

import evakernels
from evakernels import _native, backends, triton

OPS = torch.ops.evakernels
BATCH, HEADS, HEAD_DIM, PATCHES = 2, 3, 4, 6


def tables(kind):
    """cos and sin: none, one table for all heads, or one a head."""
    if kind == "none":
        return None, None
    angles = randn(HEADS, PATCHES, HEAD_DIM // 2, seed=1) * 3
    angles = angles if kind == "heads" else angles[0]
    return angles.cos().float(), angles.sin().float()


def packed(num_prefix=1, patches=PATCHES, dtype=torch.float64):
    return randn(BATCH, num_prefix + patches, 3, HEADS, HEAD_DIM).to(dtype)


def rotate(x, cos, sin, token_index, num_prefix, interleaved):
    """The rotation by its definition, [B, H, N, D], as EVA does it: in the precision of the table, then
    rounded."""
    if cos is None:
        return x
    if token_index is not None:
        unrotated = (token_index < 0).unsqueeze(-1)
        cos = cos[..., token_index, :].masked_fill(unrotated, 1.0)
        sin = sin[..., token_index, :].masked_fill(unrotated, 0.0)
        cos, sin = (t.transpose(0, 1) if t.dim() == 4 else t.unsqueeze(1) for t in (cos, sin))
    cos, sin = (t.to(torch.promote_types(x.dtype, torch.float32)) for t in (cos, sin))
    prefix, patches = x[:, :, :num_prefix], x[:, :, num_prefix:]
    a, b = (patches[..., ::2], patches[..., 1::2]) if interleaved else patches.chunk(2, -1)
    turned = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((prefix, turned.to(x.dtype)), 2)


def attention(q, k, v, cos=None, sin=None, token_index=None, num_prefix=0, causal=False, interleaved=True, scale=None):
    """What the op computes, by torch's own functions."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    q, k = (rotate(t, cos, sin, token_index, num_prefix, interleaved) for t in (q, k))
    mask, fully_masked = None, 0
    if causal and q.shape[2] != k.shape[2]:  # torch's is_causal has the first query see the first key
        fully_masked = max(0, q.shape[2] - k.shape[2])
        mask = torch.ones(q.shape[2] - fully_masked, k.shape[2], dtype=torch.bool).tril(
            k.shape[2] - q.shape[2] + fully_masked
        )
    options = {"attn_mask": mask, "is_causal": causal and mask is None, "enable_gqa": q.shape[1] != k.shape[1]}
    out = F.scaled_dot_product_attention(q[:, :, fully_masked:], k, v, scale=scale, **options)
    return F.pad(out, (0, 0, fully_masked, 0)).transpose(1, 2)


def functions(kind="shared", token_index=None, num_prefix=1, **options):
    """Our function and torch's, over q, k and v with tables of a kind."""
    cos, sin = tables(kind)
    return both(cos=cos, sin=sin, token_index=token_index, num_prefix=num_prefix, **options)


def pair(*args, **options):
    """The same over one packed projection `[B, N, 3, H, D]`."""
    return tuple(map(of_packed, functions(*args, **options)))


def of_first_queries(count, *args, **options):
    """Attention of the first tokens' queries alone, which no kernel rotates: beside that of all queries."""
    ours, theirs = functions(*args, num_prefix=2, **options)
    return of_packed(lambda q, k, v: ours(q[:, :count], k, v)), of_packed(lambda *qkv: theirs(*qkv)[:, :count])


def both(**options):
    """Our function and torch's, over q, k and v."""
    return partial(evakernels.rope_attention, **options), partial(attention, **options)


def of_packed(function):
    """The same over one packed projection `[B, N, 3, H, D]`."""
    return lambda qkv: function(*qkv.unbind(2))


def rotated(shape, num_prefix, **options):
    """Our function and torch's over a packed projection of `[B, N, H, D]`, with a table for each head, and that."""
    batch, tokens, heads, head_dim = shape
    angles = randn(heads, tokens - num_prefix, head_dim // 2, seed=3) * 3
    functions = both(cos=angles.cos().float(), sin=angles.sin().float(), num_prefix=num_prefix, **options)
    return *map(of_packed, functions), [randn(batch, tokens, 3, heads, head_dim)]


def of_parts(function, heads, queries=None, keys=None):
    """The same over one tensor `[B, N or M, H + 2 * Hkv, D]`, of whose tokens the first ones are queries and keys."""

    def call(x):
        kv_heads = (x.shape[2] - heads) // 2
        q, k, v = x.split((heads, kv_heads, kv_heads), 2)
        return function(q[:, :queries], k[:, :keys], v[:, :keys])

    return call


def shared(heads, *sizes, kind="none", **options):
    """Our function and torch's over such a tensor."""
    cos, sin = tables(kind)
    return tuple(of_parts(function, heads, *sizes) for function in both(cos=cos, sin=sin, **options))


UNTURNED = torch.tensor([[-1, 0, -1, 3], [5, 5, 2, -1]])
KEPT = torch.tensor([[5, 0, 3], [1, 4, 2]])
CASES = [
    pytest.param(pair("none", num_prefix=0, causal=True), [packed(0)], id="text"),
    pytest.param(pair(), [packed()], id="shared"),
    pytest.param(pair(num_prefix=0), [packed(0)], id="no-prefix"),
    pytest.param(pair(num_prefix=5, causal=True, scale=0.7), [packed(5)], id="registers-causal-scaled"),
    pytest.param(pair(interleaved=False), [packed()], id="rotate-half"),
    pytest.param(pair("heads"), [packed()], id="table-a-head"),
    pytest.param(pair(token_index=KEPT), [packed(patches=3)], id="dropout"),
    pytest.param(pair("heads", KEPT, interleaved=False), [packed(patches=3)], id="dropout-table-a-head"),
    pytest.param(pair(token_index=UNTURNED, interleaved=False), [packed(patches=4)], id="tokens-not-rotated"),
    pytest.param(of_first_queries(1, "shared"), [packed(2)], id="first-query"),
    pytest.param(of_first_queries(2, "heads", interleaved=False), [packed(2)], id="first-queries-table-a-head"),
    pytest.param(of_first_queries(2, "shared", UNTURNED), [packed(2, 4)], id="first-queries-not-all-rotated"),
    pytest.param(shared(4, kind="shared", num_prefix=1), [randn(BATCH, 7, 8, HEAD_DIM)], id="heads-share-keys"),
    pytest.param(shared(3, causal=True, scale=0.7), [randn(BATCH, 6, 5, HEAD_DIM)], id="all-heads-share-keys"),
    pytest.param(shared(3, 2, 5), [randn(BATCH, 5, 9, HEAD_DIM)], id="more-keys"),
    pytest.param(shared(4, 3, 7, causal=True), [randn(BATCH, 7, 8, HEAD_DIM)], id="more-keys-causal"),
    pytest.param(shared(2, 7, 3, causal=True), [randn(BATCH, 7, 6, HEAD_DIM)], id="fewer-keys-causal"),
]
QUICK = {
    "test_gradcheck": ["registers-causal-scaled", "dropout-table-a-head", "heads-share-keys", "fewer-keys-causal"],
}
QUICK["test_compiles_without_graph_break"] = ["text", "table-a-head", "dropout", "more-keys-causal"]
QUICK["test_compiles_without_graph_break"] += ["first-queries-not-all-rotated"]
TRANSFORMED = ["text", "shared", "dropout", "heads-share-keys", "fewer-keys-causal"]


THREADED = [
    (function, [x.to(dtype)])
    for dtype in (torch.float32, torch.bfloat16)
    for function, x in (
        (rotated((2, 301, 7, 32), 1)[0], randn(2, 301, 3, 7, 32)),
        (shared(6, 301, 150, causal=True)[0], randn(2, 301, 10, 32)),
    )
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("sizes", "heads", "options"),
    [
        pytest.param((70, 70), (4, 2), {"causal": True}, id="grouped-causal"),
        pytest.param((33, 101), (2, 1), {"causal": True}, id="101-keys-causal"),
        pytest.param((100, 37), (2, 2), {"causal": True}, id="37-keys-causal"),
        pytest.param((110, 301), (2, 2), {"causal": True}, id="301-keys-causal"),
        pytest.param((1, 130), (4, 2), {}, id="one-query"),
    ],
)
@pytest.mark.kernels
def test_gqa_and_cross_attention_accuracy(sizes, heads, options, dtype):
    x = randn(2, max(sizes), heads[0] + 2 * heads[1], 64)
    op_checks.assert_as_accurate_as_torch(*shared(heads[0], *sizes, **options), [x], dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize(("tokens", "keys"), [(6, 4), (3, 0)])
def test_a_query_that_sees_no_key_gives_zeros(tokens, keys, dtype):
    q, k, v = (randn(2, n, heads, 16).to(dtype).requires_grad_() for n, heads in ((tokens, 4), (keys, 2), (keys, 2)))
    out, lse = evakernels.rope_attention(q, k, v, causal=True, return_lse=True)
    fully_masked = tokens - keys
    assert torch.equal(out[:, :fully_masked], torch.zeros_like(out[:, :fully_masked]))
    assert torch.equal(lse.isneginf(), (torch.arange(tokens) < fully_masked).expand(2, 4, tokens))
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert not gradients[0][:, :fully_masked].any()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("causal", [True, False])
def test_keys_without_queries_get_gradients_of_zero(causal):
    q, k, v = (randn(2, n, 2, 16).float().requires_grad_() for n in (0, 3, 3))
    evakernels.rope_attention(q, k, v, causal=causal).sum().backward()
    assert torch.equal(k.grad, torch.zeros_like(k))
    assert torch.equal(v.grad, torch.zeros_like(v))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "num_prefix", "options"),
    [
        # A kernel may lay out any of these in another way: vectors, tiles of tokens, parts of what is too long.
        pytest.param((1, 17, 3, 64), 1, {"interleaved": False}, id="halves"),
        pytest.param((2, 49, 1, 88), 1, {"causal": True}, id="causal"),
        pytest.param((1, 20, 2, 88), 4, {"interleaved": False}, id="odd-halves"),
        pytest.param((1, 65, 1, 112), 16, {"scale": -0.1}, id="many-registers-negative-scale", marks=no_triton),
        pytest.param((1, 33, 1, 96), 1, {}, id="head-of-96"),
        pytest.param((1, 20, 1, 112), 4, {}, id="head-of-112"),
        pytest.param((1, 20, 1, 100), 4, {}, id="head-of-100"),
        pytest.param((1, 209, 1, 128), 1, {"causal": True}, id="long-causal"),
        pytest.param((1, 209, 3, 32), 1, {}, id="long"),
        # One token; one more than whole panels of queries, than a block of them, and than a panel's chunk has keys.
        pytest.param((2, 1, 1, 16), 0, {}, id="one-token"),
        pytest.param((1, 49, 2, 80), 1, {"interleaved": False}, id="49-tokens"),
        pytest.param((1, 97, 2, 48), 0, {"causal": True}, id="97-tokens-causal"),
        pytest.param((1, 129, 1, 36), 1, {"causal": True}, id="129-tokens-causal"),
        # A prefix that stands apart from a full tile, of one token and of several; one that doesn't.
        pytest.param((1, 65, 1, 88), 1, {}, id="around-a-tile-65", marks=no_triton),
        pytest.param((1, 68, 1, 88), 4, {"interleaved": False}, id="around-a-tile-68", marks=no_triton),
        pytest.param((1, 71, 1, 88), 1, {"causal": True}, id="around-a-tile-71", marks=no_triton),
        pytest.param((1, 67, 1, 88), 3, {"causal": True}, id="around-a-tile-67", marks=pytest.mark.kernels),
        # Fewer channels than threads; more scores than are computed at a time.
        pytest.param((1, 40, 1, 16), 0, {}, id="head-of-16"),
        pytest.param((2, 301, 7, 88), 1, {}, id="301-tokens"),
    ],
)
@pytest.mark.kernels("cpu", "nvcc", "triton bfloat16")
def test_shapes_of_towers_are_as_accurate_as_torch(shape, num_prefix, options, dtype):
    op_checks.assert_as_accurate_as_torch(*rotated(shape, num_prefix, **options), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "sharpness"),
    [
        pytest.param((2, 64, 3, 64), 8, id="large-scores"),  # the softmax is nearly one-hot
        pytest.param((2, 301, 7, 37), 1, id="odd-chunks"),
        pytest.param((1, 145, 6, 16), 1, id="two-rounds-a-warp", marks=pytest.mark.kernels("nvcc")),
        pytest.param((1, 3001, 1, 16), 1, id="many-keys", marks=[no_triton, pytest.mark.cpu_only("its order of sums")]),
    ],
)
@pytest.mark.kernels
def test_unrotated_heads_are_as_accurate_as_torch(shape, sharpness, dtype):
    """Values with a mean: their products with dout, less the mean of these, cancel."""
    inputs = [randn(*shape, seed=s) + (s == 2) for s in range(3)]
    inputs[0] *= sharpness
    op_checks.assert_as_accurate_as_torch(*both(causal=shape[1] == 301), inputs, dtype)


@pytest.mark.parametrize("head_dim", [32, 40, 64, 88, 112, 128])
@pytest.mark.parametrize("tokens", [32, 50, 197, 257, 300])
@pytest.mark.kernels("cpu")
def test_bfloat16_sizes_as_accurate_as_torch(tokens, head_dim):
    """Whole tiles of keys, of queries, of channels and of pairs of any of these, and parts of one."""
    causal = (tokens + head_dim // 8) % 2 == 0
    shape = 1, tokens, 2, head_dim
    op_checks.assert_as_accurate_as_torch(*rotated(shape, 1, causal=causal), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "num_prefix", "options"),
    [
        pytest.param((2, 65, 2, 64), 1, {}, id="prefix"),
        pytest.param((1, 90, 1, 16), 0, {"causal": True}, id="causal"),
        pytest.param((1, 70, 1, 112), 4, {"interleaved": False, "causal": True}, id="wide-causal"),
        pytest.param((1, 70, 1, 90), 0, {}, id="odd"),
    ],
)
@pytest.mark.kernels
def test_split_heads_as_accurate_as_torch(shape, num_prefix, options, dtype, monkeypatch):
    """CUDA kernels: two blocks per head; another kernel adds their dq."""
    monkeypatch.setenv("EVAKERNELS_ATTENTION_PLAN", "1x2")
    ours, theirs, (x,) = rotated(shape, num_prefix, **options)
    op_checks.assert_as_accurate_as_torch(ours, theirs, [x], dtype)
    op_checks.assert_deterministic(ours, [x.to(dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_nan_in_a_query_stays_in_its_row(dtype):
    q, k, v = randn(2, 35, 3, 3, 32).to(dtype).unbind(2)
    q[0, 1, 2, 0] = torch.nan
    out, lse = OPS.rope_attention_forward(q, k, v, None, None, None, 0, False, True, 0.5)
    expected = torch.zeros(out.shape, dtype=torch.bool)
    expected[0, 1, 2] = True
    assert torch.equal(out.isnan(), expected)
    assert torch.equal(lse.isnan(), expected[..., 0].transpose(1, 2))


@pytest.mark.parametrize("value", [1e30, torch.nan])
@pytest.mark.parametrize(("tokens", "head_dim"), [(50, 32), (257, 88)])
def test_a_causal_token_is_not_touched_by_later_ones(tokens, head_dim, value):
    """Nor is another head. Within a head NaN may spread: the weight 0 doesn't hide it."""
    qkv = randn(1, tokens, 3, 2, head_dim).bfloat16()
    touched = qkv.clone()
    touched[0, -1, :, 0] = value
    results = []
    for given in (qkv, touched):
        given.requires_grad_()
        out = evakernels.rope_attention(*given.unbind(2), causal=True)
        (gradient,) = torch.autograd.grad(out[:, :, 1].square().sum(), given)
        results.append((out[:, :, 1], gradient[:, :, :, 1]) + ((out[0, :-1, 0],) if math.isfinite(value) else ()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_batch_may_be_empty():
    q, k, v = (t[:0].detach().requires_grad_() for t in packed(dtype=torch.float32).unbind(2))
    out = evakernels.rope_attention(q, k, v, *tables("shared"), num_prefix=1)
    out.sum().backward()
    assert out.shape == q.grad.shape == q.shape


def with_lse(q, k, v):
    return evakernels.rope_attention(q, k, v, causal=True, return_lse=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_lse_has_no_gradient(compiled):
    """It is saved for backward; a gradient through it would silently be lost."""
    q, k, v = (t.detach().requires_grad_() for t in packed(0).unbind(2))
    function = torch.compile(with_lse, fullgraph=True, backend="aot_eager") if compiled else with_lse
    out, lse = function(q, k, v)
    assert out.requires_grad
    assert not lse.requires_grad
    alone = evakernels.rope_attention(q, k, v, causal=True)
    torch.testing.assert_close(out, alone)
    expected = torch.autograd.grad(alone.square().sum(), (q, k, v))
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), (q, k, v)), expected)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_lse_is_there_without_gradients_too(dtype, expected):
    q, k, v = packed(0, dtype=dtype).unbind(2)
    exact = (HEAD_DIM**-0.5 * torch.einsum("bnhd,bmhd->bhnm", q.to(expected), k.to(expected))).logsumexp(-1)
    with torch.no_grad():
        _, lse = evakernels.rope_attention(q, k, v, return_lse=True)
        with evakernels.as_torch_operators():
            out, same = evakernels.rope_attention(q, k, v, return_lse=True)
    assert lse.dtype == expected
    torch.testing.assert_close(lse, exact)
    torch.testing.assert_close(same, exact)
    assert out.shape == q.shape


def test_the_prefix_has_no_meaning_without_tables():
    q, k, v = packed(0, dtype=torch.float32).unbind(2)
    out = evakernels.rope_attention(q, k, v, num_prefix=2)
    assert torch.equal(out, evakernels.rope_attention(q, k, v))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_for_torch(dtype):
    op_checks.assert_autocast_is_torchs(*pair(), packed(dtype=torch.float32), dtype)


@pytest.mark.parametrize(
    ("q", "reason"),
    [
        (torch.ones(1, 5, 2, 256).half(), "head_dim 256"),
        (torch.ones(1, 4097, 1, 1).half(), "4097 tokens"),
        (torch.ones(1, 4096, 1, 128).half(), None),
        (torch.ones(1, 5, 2, 64), "float32"),
        # Reasons are cached without strides; the kernels' binding copies tokens that are too far apart.
        (torch.empty_strided((1, 2, 1, 8), (0, 1 << 29, 8, 1), dtype=torch.half, device="meta"), None),
        (torch.empty(1, 2, 1 << 26, 8, dtype=torch.half, device="meta"), "tokens of"),
    ],
)
def test_gpu_kernels_explain_what_they_refuse(q, reason, monkeypatch):
    """With the real reasons, whether or not they are built here."""
    pretend_gpu_kernels(monkeypatch)
    for op in ("rope_attention_forward", "rope_attention_backward"):
        _, *found = backends.unsupported_reasons(op, "cuda", q)
        assert len(found) == (reason is not None)
        assert all(text.startswith(reason) for text in found)


@pytest.mark.kernels("nvcc")
def test_strided_tokens_far_apart_are_copied():
    """The address space of the tensor is large, but only its two tokens take memory."""
    far = torch.empty_strided((1, 2, 1, 8), (0, 1 << 29, 8, 1), dtype=torch.half, device=on_device.DEVICE)
    near = far.copy_(randn(1, 2, 1, 8)).contiguous()
    assert torch.equal(evakernels.rope_attention(far, far, far), evakernels.rope_attention(near, near, near))


def pretend_gpu_kernels(monkeypatch):
    monkeypatch.setattr(_native, "LOADED", True)
    monkeypatch.setattr(_native, "implemented", lambda op, device: "attention" in op)


@pytest.mark.parametrize(
    ("table", "count"), [(((1 << 23) - 1, 64), 0), ((1 << 23, 64), 1), ((1 << 25, 64), 2)], ids=str
)
@pytest.mark.parametrize("op", ["rope_attention", "packed_attention"])
def test_large_table_is_a_reason(op, table, count, monkeypatch):
    """Triton's kernels support larger tables than CUDA's."""
    pretend_gpu_kernels(monkeypatch)
    with FakeTensorMode():
        packed = op == "packed_attention"
        q = torch.empty(*([] if packed else [2]), 3, 1, 128, dtype=torch.half, device="cuda")
        given = [q] * 3 + [torch.empty(2, dtype=torch.int64, device="cuda")] * packed
        cos = torch.empty(table, device="cuda")
        monkeypatch.setattr(_native, "gpu_unsupported_reason", lambda index: None)
        monkeypatch.setattr(triton, "_installed", lambda: True)
        monkeypatch.setattr(triton, "_too_old", lambda index: [])
        found = [
            backends.unsupported_reasons(f"{op}_forward", backend, *given, cos, cos) for backend in ("cuda", "triton")
        ]
    assert [len(reasons) for reasons in found] == [min(count, 1), count // 2]
    assert all("table" in reason for reasons in found for reason in reasons)


# --- wrong input, for test_wrong_input ------------------------------------------------------------------------------


def tables_of(*shape):
    return dict.fromkeys(("cos", "sin"), torch.ones(shape))


QKV, TABLE, INDEX = torch.ones(2, 5, 3, 8), torch.ones(4, 4), torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
NO_TABLES, NO_INDEX = dict.fromkeys(("cos", "sin", "token_index")), {"token_index": None}
FIRST, TRAINED = {"q": QKV[:, :1]}, {"cos": TABLE.clone().requires_grad_()}
CALLS = {"rope_attention": dict.fromkeys("qkv", QKV) | tables_of(4, 4) | {"token_index": INDEX, "num_prefix": 1}}
WRONG = {
    "rope_attention": [
        (ValueError, "k", {"k": QKV[..., :4]}),
        (ValueError, "q", {"q": QKV[..., :0]}),
        (TypeError, "v", {"v": QKV.half()}),
        (ValueError, "k", {"k": QKV[:, :, :2]}),
        (ValueError, "k", {"k": QKV[:, :, :0]}),
        (ValueError, "v", {"v": QKV[:, :4]}),
        (ValueError, "cos", dict.fromkeys("kv", QKV[:, [0, 0, 1, 2, 3, 4]]) | NO_INDEX),
        (ValueError, "cos", dict.fromkeys("kv", QKV[:, :, :1]) | tables_of(3, 4, 4)),
        (ValueError, "head_dim", dict.fromkeys("qkv", QKV[..., :7])),
        (TypeError, "num_prefix", {"num_prefix": "1"}),
        (ValueError, "num_prefix", NO_TABLES | {"num_prefix": 17}),
        (ValueError, "num_prefix", NO_INDEX | {"num_prefix": 6}),
        (ValueError, "token_index", NO_TABLES | {"token_index": INDEX}),
        (ValueError, "sin", {"sin": None}),
        (ValueError, "cos", {"cos": None}),
        (ValueError, "cos", NO_INDEX | {"num_prefix": 0}),
        (ValueError, "sin", {"sin": TABLE[:3]}),
        (ValueError, "cos", {"cos": TABLE.expand(2, 4, 4)}),
        (ValueError, "cos", {"cos": torch.ones(4, 8)}),
        (ValueError, "cos", TRAINED),
        (IndexError, "token_index", {"token_index": INDEX + 1}),
        (IndexError, "token_index", {"token_index": INDEX - 2}),
        (ValueError, "cos", tables_of(2, 2, 2)),
        (TypeError, "scale", {"scale": [1.0]}),
        # Queries of the first tokens alone, which no kernel rotates.
        (ValueError, "causal", FIRST | NO_INDEX | {"causal": True}),
        (ValueError, "num_prefix", FIRST | {"num_prefix": 0}),
        (ValueError, "cos", FIRST | TRAINED),
        (IndexError, "token_index", FIRST | {"token_index": INDEX + 1}),
    ]
}
