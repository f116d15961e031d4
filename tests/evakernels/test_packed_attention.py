import op_checks
import pytest
import torch
import torch.nn.functional as F
from case_tests import *  # noqa: F403
from op_checks import DTYPES, randn
from test_rope_attention import attention, expanded, tables_of

import evakernels

OPS = torch.ops.evakernels
HEADS, HEAD_DIM = 2, 8


def offsets_of(lengths, dtype=torch.int64):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(dtype)


def pair(lengths, heads=HEADS, kv_heads=HEADS, form="unrotated", dtype=torch.int64, **options):
    """Our function and torch's on each sequence, over one tensor `[T, H + 2 * Hkv, D]`, with tables of one form."""
    cu_seqlens = offsets_of(lengths, dtype)
    cos, sin, positions, rows = FORMS[form](lengths)
    full = (expanded(cos), expanded(sin)) if form.startswith("grid") else (cos, sin)
    tables = {"cos": cos, "sin": sin, "positions": positions}

    def ours(x):
        given = x.split((heads, kv_heads, kv_heads), 1)
        return evakernels.packed_attention(*given, cu_seqlens, max_seqlen=max(lengths), **tables, **options)

    def theirs(x):
        found = [
            attention(*(t[None] for t in s.split((heads, kv_heads, kv_heads), 1)), *full, index[None], 0, **options)[0]
            for s, index in zip(x.split(lengths), rows.split(lengths), strict=True)
            if len(s)
        ]
        return torch.cat(found)

    return ours, theirs


def _angles(*shape):
    angles = randn(*shape, seed=1) * 3
    return angles.cos().float(), angles.sin().float()


def _in_order(lengths, *more):
    rows = torch.cat([torch.arange(n) for n in lengths])
    return *_angles(*more, max(lengths) + 1, HEAD_DIM // 2), None, rows


def _by_row(lengths):
    rows = torch.randint(-1, 5, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    return *_angles(5, HEAD_DIM // 2), rows, rows


def _by_place(lengths, paired=True):
    grid = 5
    places = torch.randint(-1, grid, (sum(lengths), 2), generator=torch.Generator().manual_seed(0))
    rows = torch.where(places.amin(1) < 0, -1, places[:, 0] * grid + places[:, 1])
    return *_angles(2, grid, HEAD_DIM // 4), places if paired else rows, rows


FORMS = {
    "unrotated": lambda lengths: (None, None, None, torch.zeros(sum(lengths), dtype=torch.int64)),
    "in order": _in_order,
    "in order, a table a head": lambda lengths: _in_order(lengths, HEADS),
    "rows": _by_row,
    "grid by place": _by_place,
    "grid by row": lambda lengths: _by_place(lengths, paired=False),
}


def shared(lengths, heads=HEADS, kv_heads=HEADS, head_dim=HEAD_DIM):
    return randn(sum(lengths), heads + 2 * kv_heads, head_dim)


def packed(lengths):
    return randn(sum(lengths), 3, HEADS, HEAD_DIM)


SEVERAL = [3, 1, 0, 17, 3]
CASES = [
    pytest.param(pair(SEVERAL, causal=True), [shared(SEVERAL)], id="causal"),
    pytest.param(pair(SEVERAL, causal=False, scale=0.7), [shared(SEVERAL)], id="both-sides"),
    pytest.param(pair([5], dtype=torch.int32, causal=True), [shared([5])], id="batch-of-one"),
    *(
        pytest.param(pair(SEVERAL, *heads, form, causal=causal, interleaved=pairs), [shared(SEVERAL, *heads)], id=name)
        for name, heads, form, causal, pairs in [
            ("rotated", (2, 2), "in order", True, True),
            ("table-a-head", (2, 2), "in order, a table a head", False, True),
            ("rows", (4, 2), "rows", False, False),
            ("places", (3, 1), "grid by place", False, True),
            ("grid-rows", (2, 1), "grid by row", True, True),
        ]
    ),
]
QUICK = dict.fromkeys(("test_gradcheck", "test_compiles_without_graph_break"), ("causal", "places"))
TRANSFORMED = ["causal", "rows"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "head_dim", "causal"),
    [
        pytest.param([77, 1, 30, 64], 64, True, id="size_of_a_tower"),
        *(([1, 4, 7, 8, 9, 48, 49, 97], head_dim, causal) for head_dim, causal in ((20, True), (64, False))),
    ],
)
def test_as_accurate_as_torch_around_tile_sizes(lengths, head_dim, causal, dtype):
    given = [shared(lengths, 1, 1, head_dim)]
    op_checks.assert_as_accurate_as_torch(*pair(lengths, 1, 1, causal=causal), given, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_split_heads_as_accurate_as_torch(dtype, monkeypatch):
    """CUDA kernels: two blocks per head, of which short sequences need one."""
    monkeypatch.setenv("EVAKERNELS_ATTENTION_PLAN", "1x2")
    ours, theirs = pair([60, 3, 0, 40], form="in order", causal=True)
    x = shared([60, 3, 0, 40])
    op_checks.assert_as_accurate_as_torch(ours, theirs, [x], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_image_sizes_as_accurate_as_torch(dtype):
    """Three aspect ratios in one batch, each with a class token, and two heads of queries to one of keys."""
    sizes, grid, head_dim = [(7, 9), (1, 16), (12, 4)], 16, 64
    patches = [torch.cartesian_prod(torch.arange(h), torch.arange(w)) for h, w in sizes]
    positions = torch.cat([F.pad(places, (0, 0, 1, 0), value=-1) for places in patches])
    lengths = [1 + h * w for h, w in sizes]
    angles = randn(2, grid, head_dim // 4, seed=1)
    cos, sin = angles.cos().float(), angles.sin().float()
    options = {"max_seqlen": max(lengths), "causal": False, "cos": cos, "sin": sin, "positions": positions}

    def ours(x):
        return evakernels.packed_attention(*x.split((2, 1, 1), 1), offsets_of(lengths), **options)

    def theirs(x):
        found = []
        for image, (height, width) in zip(x.split(lengths), sizes, strict=True):
            table = (expanded(t).unflatten(0, (grid, grid))[:height, :width].flatten(0, 1) for t in (cos, sin))
            found.append(attention(*(t[None] for t in image.split((2, 1, 1), 1)), *table, num_prefix=1)[0])
        return torch.cat(found)

    op_checks.assert_as_accurate_as_torch(ours, theirs, [randn(sum(lengths), 4, head_dim)], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_number_of_threads_does_not_change_a_bit(dtype):
    lengths = [40, 3, 0, 90, 17, 60]
    for heads, form in (((5, 5), "unrotated"), ((6, 2), "rows")):
        given = [shared(lengths, *heads).to(dtype)]
        op_checks.assert_threads_change_no_bit(pair(lengths, *heads, form, causal=True)[0], given)


@pytest.mark.parametrize("causal", [True, False])
def test_a_sequence_is_not_touched_by_others(causal):
    lengths = [4, 17, 2]
    qkv = packed(lengths).float()
    offsets = offsets_of(lengths)
    other = qkv.clone()
    other[4:21] = torch.nan
    out, touched = (
        evakernels.packed_attention(*x.unbind(1), offsets, max_seqlen=17, causal=causal) for x in (qkv, other)
    )
    assert torch.equal(out[:4], touched[:4])
    assert torch.equal(out[21:], touched[21:])


@pytest.mark.parametrize("lengths", [[], [0, 0]])
def test_a_batch_may_be_empty(lengths):
    q = torch.ones(0, HEADS, HEAD_DIM, requires_grad=True)
    out = evakernels.packed_attention(q, q, q, offsets_of([0, *lengths])[1:], max_seqlen=0)
    out.sum().backward()
    assert out.shape == q.grad.shape == q.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_for_torch(dtype):
    op_checks.assert_autocast_is_torchs(*pair([5, 2], causal=True), shared([5, 2]).float(), dtype)


# --- wrong input, for test_wrong_input ------------------------------------------------------------------------------

TOKENS, ROWS = torch.ones(5, 3, 8), torch.arange(5)
PLACES = torch.tensor([[0, 0], [0, 1], [0, 2], [1, 0], [2, 2]])
TO_PLACES, IN_ORDER = {"positions": PLACES}, {"positions": None}
CALLS = {
    "packed_attention": dict.fromkeys("qkv", TOKENS)
    | {"cu_seqlens": torch.tensor([0, 5]), "max_seqlen": 5, "positions": ROWS}
    | tables_of(2, 3, 2)
}
WRONG = {
    "packed_attention": [
        (ValueError, "k", {"k": TOKENS[..., :4]}),
        (TypeError, "v", {"v": TOKENS.half()}),
        (ValueError, "k", dict.fromkeys("kv", TOKENS[:, :2])),
        (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([[0, 5]])}),
        (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([0, 4])}),
        (ValueError, "cu_seqlens", {"cu_seqlens": torch.tensor([1, 5])}),
        (ValueError, "max_seqlen", {"cu_seqlens": torch.tensor([0, 6, 5])}),
        (ValueError, "max_seqlen", {"cu_seqlens": torch.tensor([0, 5, 5]), "max_seqlen": 4}),
        (ValueError, "max_seqlen", {"max_seqlen": 4}),
        (ValueError, "max_seqlen", {"max_seqlen": -1}),
        (TypeError, "max_seqlen", {"max_seqlen": None}),
        (TypeError, "max_seqlen", {"max_seqlen": 5.0}),
        (TypeError, "scale", {"scale": "1"}),
        (ValueError, "positions", {"cos": None, "sin": None}),
        (ValueError, "positions", {"cos": None, "sin": None} | TO_PLACES),
        (ValueError, "sin", {"sin": None}),
        (ValueError, "positions", {"positions": PLACES.repeat(1, 2)}),
        (TypeError, "positions", {"positions": PLACES.int()}),
        (IndexError, "positions", {"positions": ROWS + 5}),
        (IndexError, "positions", {"positions": ROWS - 2}),
        (IndexError, "positions", {"positions": PLACES + 1}),
        (IndexError, "positions", {"positions": PLACES - 2}),
        (ValueError, "positions", tables_of(9, 4) | TO_PLACES),
        (ValueError, "positions", dict.fromkeys("qkv", TOKENS[:, :2]) | tables_of(2, 5, 4) | TO_PLACES),
        (ValueError, "cos", tables_of(4, 4) | IN_ORDER),
        (ValueError, "cos", dict.fromkeys("kv", TOKENS[:, :1]) | tables_of(3, 5, 4) | IN_ORDER),
    ]
}
