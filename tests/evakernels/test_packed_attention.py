import op_checks
import pytest
import torch
import torch.nn.functional as F
from case_tests import *  # noqa: F403
from op_checks import DTYPES, no_triton, randn
from test_rope_attention import attention, tables_of

import evakernels

HEADS, HEAD_DIM = 2, 8


def offsets_of(lengths, dtype=torch.int64):
    return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(dtype)


def pair(lengths, heads=HEADS, kv_heads=HEADS, form="unrotated", head_dim=HEAD_DIM, dtype=torch.int64, **options):
    """Our function and torch's on each sequence, over one tensor `[T, H + 2 * Hkv, D]`, with tables of one form."""
    cu_seqlens = offsets_of(lengths, dtype)
    cos, sin, positions, rows = FORMS[form](lengths, head_dim)
    tables = {"cos": cos, "sin": sin, "positions": positions}

    def ours(x):
        given = x.split((heads, kv_heads, kv_heads), 1)
        return evakernels.packed_attention(*given, cu_seqlens, max_seqlen=max(lengths), **tables, **options)

    def theirs(x):
        found = [
            attention(*(t[None] for t in s.split((heads, kv_heads, kv_heads), 1)), cos, sin, index[None], 0, **options)[
                0
            ]
            for s, index in zip(x.split(lengths), rows.split(lengths), strict=True)
            if len(s)
        ]
        return torch.cat(found)

    return ours, theirs


def _angles(*shape):
    angles = randn(*shape, seed=1) * 3
    return angles.cos().float(), angles.sin().float()


def _in_order(lengths, head_dim, *more):
    rows = torch.cat([torch.arange(n) for n in lengths])
    return *_angles(*more, max(lengths) + 1, head_dim // 2), None, rows


def _by_row(lengths, head_dim):
    rows = torch.randint(-1, 5, (sum(lengths),), generator=torch.Generator().manual_seed(0))
    return *_angles(5, head_dim // 2), rows, rows


FORMS = {
    "unrotated": lambda lengths, _: (None, None, None, torch.zeros(sum(lengths), dtype=torch.int64)),
    "in order": _in_order,
    "in order, a table a head": lambda lengths, head_dim: _in_order(lengths, head_dim, HEADS),
    "rows": _by_row,
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
            ("rows-one-key-head", (3, 1), "rows", False, True),
            ("rows-causal", (2, 1), "rows", True, True),
        ]
    ),
]
QUICK = dict.fromkeys(("test_gradcheck", "test_compiles_without_graph_break"), ("causal", "rows-one-key-head"))
TRANSFORMED = ["causal", "rows"]
THREADED = [
    (pair(lengths, *heads, form, causal=True)[0], [shared(lengths, *heads).to(dtype)])
    for lengths in ([40, 3, 0, 90, 17, 60],)
    for heads, form in (((5, 5), "unrotated"), ((6, 2), "rows"))
    for dtype in DTYPES
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("lengths", "heads", "head_dim", "form", "causal"),
    [
        pytest.param([77, 1, 30, 64], (1, 1), 64, "unrotated", True, id="size_of_a_tower", marks=no_triton),
        pytest.param([64, 17, 49], (2, 1), 64, "rows", False, id="mixed_image_sizes"),
        *(
            ([1, 4, 7, 8, 9, 48, 49, 97], (1, 1), head_dim, "unrotated", causal)
            for head_dim, causal in ((20, True), (64, False))
        ),
    ],
)
@pytest.mark.kernels
def test_as_accurate_as_torch_around_tile_sizes(lengths, heads, head_dim, form, causal, dtype):
    given = [shared(lengths, *heads, head_dim)]
    op_checks.assert_as_accurate_as_torch(*pair(lengths, *heads, form, head_dim, causal=causal), given, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.kernels
def test_split_heads_as_accurate_as_torch(dtype, monkeypatch):
    """CUDA kernels: two blocks per head, of which short sequences need one."""
    monkeypatch.setenv("EVAKERNELS_ATTENTION_PLAN", "1x2")
    ours, theirs = pair([60, 3, 0, 40], form="in order", causal=True)
    x = shared([60, 3, 0, 40])
    op_checks.assert_as_accurate_as_torch(ours, theirs, [x], dtype)


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
IN_ORDER = {"positions": None}
CALLS = {
    "packed_attention": dict.fromkeys("qkv", TOKENS)
    | {"cu_seqlens": torch.tensor([0, 5]), "max_seqlen": 5, "positions": ROWS}
    | tables_of(5, 4)
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
        (ValueError, "sin", {"sin": None}),
        (ValueError, "positions", {"positions": ROWS.view(5, 1)}),
        (TypeError, "positions", {"positions": ROWS.int()}),
        (IndexError, "positions", {"positions": ROWS + 5}),
        (IndexError, "positions", {"positions": ROWS - 2}),
        (ValueError, "cos", tables_of(4, 4) | IN_ORDER),
        (ValueError, "cos", dict.fromkeys("kv", TOKENS[:, :1]) | tables_of(3, 5, 4) | IN_ORDER),
    ]
}


def test_packing_unpack_inverts_pack():
    """Packed and padded sequences have the same cells, gradients and attention."""
    lengths = torch.tensor([3, 1, 4])
    packing, padded = evakernels.Packing.from_lengths(lengths, 8, 5), evakernels.Packing.padded(lengths, 5)
    assert packing.positions().tolist() == [0, 1, 2, 0, 0, 1, 2, 3]
    assert packing.samples().tolist() == [0, 0, 0, 1, 2, 2, 2, 2]
    x = torch.randn(3, 5, 2, 8, dtype=torch.float64, requires_grad=True)
    rows = packing.pack(x)
    assert torch.equal(packing.unpack(rows), x * packing.mask()[..., None, None])
    assert torch.equal(packing.last(rows), padded.last(padded.pack(x)))
    query = torch.randn(3, 2, 8, dtype=torch.float64)
    outs = [each.attend_once(query, each.pack(x), each.pack(x)) for each in (packing, padded)]
    torch.testing.assert_close(outs[0], outs[1])
    everything = packing.attend(query[packing.samples()], rows, rows)
    torch.testing.assert_close(packing.last(everything), outs[0])
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in outs]
    torch.testing.assert_close(gradients[0], gradients[1])


def test_packing_packs_ids():
    packing = evakernels.Packing.from_lengths(torch.tensor([3, 1, 4]), 8, 5)
    ids = torch.arange(15).view(3, 5)
    for x in (ids, ids.float(), ids > 5, ids.unsqueeze(2)):
        assert torch.equal(packing.pack(x), x[packing.mask()])


@pytest.mark.parametrize("shape", [(2, 10, 3), (1, 5, 3), (10, 3), (5,)])
def test_packing_refuses_other_shapes(shape):
    lengths = torch.tensor([3, 1])
    for packing in (evakernels.Packing.from_lengths(lengths, 4, 5), evakernels.Packing.padded(lengths, 5)):
        with pytest.raises(ValueError, match=r"x must have shape \[2, 5, \.\.\.\], got"):
            packing.pack(torch.zeros(shape))


def test_positions_of_whole_batch():
    packing = evakernels.Packing.padded(torch.tensor([3, 1]), 3)
    assert packing.positions().tolist() == [0, 1, 2, 0, 1, 2]
    assert packing.samples().tolist() == [0, 0, 0, 1, 1, 1]


def test_packing_unpack_in_transforms():
    packing, x = evakernels.Packing.from_lengths(torch.tensor([2, 1]), 3, 2), torch.randn(3, 4)
    expected = packing.unpack(x)
    assert torch.equal(torch.vmap(packing.unpack)(x.expand(5, -1, -1))[4], expected)
    assert torch.equal(torch.func.jvp(packing.unpack, (x,), (x,))[1], expected)
    assert torch.equal(torch.func.grad(lambda x: packing.unpack(x).square().sum())(x), 2 * x)
