"""Flash attention (Dao et al. 2022) for short sequences, with the rotary embedding inside, for both families.

There are three passes, each a kernel. A program has a tile of one head and loops over tiles of the other side: forward
and dq over keys, dkdv over queries. So each result is written once, with a fixed order of additions. dq runs before
dkdv and writes `delta = sum(dout * out)` for it.

Loops load rotated tiles: the pass "rotate" rotates keys before forward and dq, and dq rotates the queries for dkdv. So
loads go straight to shared memory, and no program rotates a tile again.

One class token before 256 patches would cost a row and a column of tiles. So the tokens of the prefix may be separate
(`PREFIX`): a tile of 16 rows with its own program, and a tile of `PREFIX` rows before every loop. A single row uses no
tensor cores: its products are sums.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ._head import accumulate, dot_transposed, load, load_rotated, masked, store, store_unrotated, zeros
from ._rows import product

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SIZES = ("stride_qz", "stride_qm", "stride_qh", "stride_kz", "stride_kn", "stride_kh")
SIZES += ("stride_vz", "stride_vn", "stride_vh", "table_rows", "tiles", "heads", "group")
SIZES += ("seqlen_q", "seqlen_k", "num_prefix")
"""Arguments that Triton doesn't specialise on."""
PREFIX_ROWS = tl.constexpr(16)
"""Maximum number of prefix tokens, and minimum rows of tensor cores."""


class Form(NamedTuple):
    """Compile-time parameters of an attention kernel besides its tiles.

    Attributes:
        D: channels of a head.
        PAIRS: how the rotary embedding pairs them, "interleaved" or "halves"; None without one.
        CAUSAL: whether a query sees only the keys up to its own.
        PREFIX: rows of a separate prefix; 0 without one.
        VECTOR: how many elements the strides of q, k and v count.
        PRECISION: of float32 products, Triton's `input_precision`.
        PEELED: whether steps that need no mask have a loop of their own.
        UNSEEN: whether a query may see no key.
    """

    D: int
    PAIRS: str | None
    CAUSAL: bool
    PREFIX: int
    VECTOR: int
    PRECISION: str
    PEELED: bool
    UNSEEN: bool


# --- the head of a program ------------------------------------------------------------------------------------------


@triton.jit
def _place(tiles, heads, seqlen_q, cu_seqlens):
    """Tile, head and sample of a program, first row of the sample in a packed batch, and number of its rows."""
    program = tl.program_id(0)
    sample = program // tiles // heads
    if cu_seqlens is None:
        first = 0
    else:
        first = tl.load(cu_seqlens + sample).to(tl.int64)
        seqlen_q = (tl.load(cu_seqlens + sample + 1) - first).to(tl.int32)
    return program % tiles, program // tiles % heads, sample.to(tl.int64), first, seqlen_q


@triton.jit
def _strided(tensor, place, head, stride_z, stride_m, stride_h, VECTOR: tl.constexpr):
    """Pointer to a head of q, k or v, and its 32-bit row stride; given strides count VECTOR elements."""
    _, _, sample, first, _ = place
    return tensor + (sample * stride_z + first * stride_m + head * stride_h) * VECTOR, stride_m.to(tl.int32) * VECTOR


@triton.jit
def _dense(tensors, place, heads, seqlen_q, seqlen_k, cu_seqlens, PASS: tl.constexpr, D: tl.constexpr):
    """Pointers and row strides of contiguous tensors; dk and dv have a row for each key."""
    _, head, sample, first, _ = place
    pointers = ()
    for i in tl.static_range(len(tensors)):
        sample_row = sample * (seqlen_k if PASS == "dkdv" and i > 0 else seqlen_q)
        row = sample_row if cu_seqlens is None else first
        pointers += ((tensors[i] + (row * heads + head) * D, heads * D),)
    return pointers


@triton.jit
def _row_statistics(tensors, place, heads, seqlen_q, cu_seqlens):
    """Pointers to a head's lse and delta in `[B, H, N]` or, packed, `[H, T]`."""
    _, head, sample, first, _ = place
    at = (sample * heads + head) * seqlen_q if cu_seqlens is None else head.to(tl.int64) * seqlen_q + first
    pointers = ()
    for i in tl.static_range(len(tensors)):
        pointers += (tensors[i] + at,)
    return pointers


@triton.jit
def _rope(tables, num_prefix, place, seqlen_q, cu_seqlens, table_rows, D: tl.constexpr):
    """The rotation of a head; () without one, and for absent parts, as Triton 3.6 takes no None in tuples."""
    _, head, sample, first, _ = place
    cos, sin, token_index = tables
    if cos is None:
        return ()
    else:
        row = sample * (seqlen_q - num_prefix) if cu_seqlens is None else first
        index = () if token_index is None else (token_index + row,)
        table = head * table_rows * (D // 2)
        return cos + table, sin + table, index, num_prefix


@triton.jit
def _before(offs, end, EVEN: tl.constexpr):
    """Mask of the tokens before `end`; with EVEN a constant."""
    return tl.full(offs.shape, True, tl.int1) if EVEN else offs < end


# A `_tile` function runs a program: the tokens from `base` to `limit` against a separate prefix and the tokens of
# `span`. A `_step` function is one step of its loop. In forward and dq, m are the tile's tokens and n the loop's. A
# span is start, end and `shift`: if causal, query m sees the keys up to m + shift, so that the last query sees the last
# key. With `PEELED`, unmasked steps have their own loop. `head` holds the pointers of a head (qkv, dense, statistics),
# its rope, span and scale.

# --- the rotation of keys -------------------------------------------------------------------------------------------


@triton.jit
def _rotate_tile(head, base, limit, FORM: tl.constexpr, BLOCK: tl.constexpr):
    qkv, dense, _, rope, _, _ = head
    inside = base + tl.arange(0, BLOCK) < limit
    store(dense[0], base, inside, load_rotated(qkv[1], base, inside, rope, FORM), FORM)


# --- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_step(
    state, tile, base, end, STEP: tl.constexpr, FORM: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr
):
    m_i, l_i, acc = state
    q, last_n, k, v, scale = tile
    offs_n = base + tl.arange(0, STEP)
    inside = _before(offs_n, end, EVEN)
    qk = dot_transposed(q, load(k, base, inside, FORM), FORM)
    qk = masked(qk, last_n[:, None], offs_n[None, :], end, CAUSAL, EVEN)
    m_ij = tl.maximum(m_i, tl.max(qk, 1) * scale)
    subtracted = tl.where(m_ij == float("-inf"), 0.0, m_ij) if FORM.UNSEEN else m_ij
    p = tl.exp2(qk * scale - subtracted[:, None])
    alpha = tl.exp2(m_i - subtracted)
    acc = accumulate(acc * alpha[:, None], p, load(v, base, inside, FORM), FORM)
    return m_ij, l_i * alpha + tl.sum(p, 1), acc


@triton.jit
def _loop_bounds(base, span, ROWS: tl.constexpr, STEP: tl.constexpr, FORM: tl.constexpr):
    """Start of the loop, start of the masked steps (the loop's if not `PEELED`), and end of the visible keys."""
    start, end, shift = span
    masks = start
    if FORM.PEELED:
        masks += tl.maximum(tl.minimum(base + shift + 1, end) - start if FORM.CAUSAL else end - start, 0) // STEP * STEP
    return start, masks, tl.minimum(end, base + shift + ROWS) if FORM.CAUSAL else end


@triton.jit
def _forward_tile(head, base, limit, FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    qkv, dense, statistics, rope, span, scale = head
    q, k, v = qkv
    offs_m = base + tl.arange(0, BLOCK_M)
    inside = offs_m < limit
    tile = load_rotated(q, base, inside, rope, FORM), offs_m + span[2], k, v, scale
    end = span[1]
    start, masks, stop = _loop_bounds(base, span, BLOCK_M, BLOCK_N, FORM)
    state = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32), zeros(BLOCK_M, FORM)
    if FORM.PREFIX:
        state = _forward_step(state, tile, 0, start, FORM.PREFIX, FORM, FORM.CAUSAL, FORM.PREFIX == 1)
    for start_n in range(start, masks, BLOCK_N):
        state = _forward_step(state, tile, start_n, end, BLOCK_N, FORM, False, True)
    for start_n in tl.range(masks, stop, BLOCK_N, num_stages=1 if FORM.PEELED else None):
        state = _forward_step(state, tile, start_n, end, BLOCK_N, FORM, FORM.CAUSAL, False)
    m_i, l_i, acc = state
    total = tl.where(l_i == 0.0, 1.0, l_i) if FORM.UNSEEN else l_i
    store(dense[0], base, inside, acc * (1.0 / total)[:, None], FORM)
    tl.store(statistics[0] + offs_m, (m_i + tl.log2(l_i)) * LN2, mask=inside)


# --- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _load_lse(lse, offs, inside, FORM: tl.constexpr):
    """lse * log2(e); infinity, for probabilities of 0, without keys and past the last query."""
    values = tl.load(lse + offs, mask=inside, other=float("inf"))
    if FORM.UNSEEN:
        values = tl.where(values == float("-inf"), float("inf"), values)
    return values * LOG2E


@triton.jit
def _dq_step(dq, tile, base, end, STEP: tl.constexpr, FORM: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr):
    q, dout, lse, delta, last_n, k, v, scale = tile
    offs_n = base + tl.arange(0, STEP)
    inside = _before(offs_n, end, EVEN)
    k = load(k, base, inside, FORM)
    qk = masked(dot_transposed(q, k, FORM), last_n[:, None], offs_n[None, :], end, CAUSAL, EVEN)
    p = tl.exp2(qk * scale - lse[:, None])
    ds = p * (dot_transposed(dout, load(v, base, inside, FORM), FORM) - delta[:, None])
    return accumulate(dq, ds, k, FORM)


@triton.jit
def _dq_tile(head, base, limit, FORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    qkv, dense, statistics, rope, span, scale = head
    q, k, v = qkv
    offs_m = base + tl.arange(0, BLOCK_M)
    inside = offs_m < limit
    q = load_rotated(q, base, inside, rope, FORM)
    if FORM.PAIRS is not None:
        store(dense[3], base, inside, q, FORM)
    dout = load(dense[0], base, inside, FORM)
    out = load(dense[1], base, inside, FORM)
    # Lanes with the same row all store its delta: a fused product would differ in the last bit.
    delta = tl.sum(product(dout.to(tl.float32), out.to(tl.float32)), 1)
    tl.store(statistics[1] + offs_m, delta, mask=inside)
    tile = q, dout, _load_lse(statistics[0], offs_m, inside, FORM), delta, offs_m + span[2], k, v, scale
    end = span[1]
    start, masks, stop = _loop_bounds(base, span, BLOCK_M, BLOCK_N, FORM)
    dq = zeros(BLOCK_M, FORM)
    if FORM.PREFIX:
        dq = _dq_step(dq, tile, 0, start, FORM.PREFIX, FORM, FORM.CAUSAL, FORM.PREFIX == 1)
    for start_n in range(start, masks, BLOCK_N):
        dq = _dq_step(dq, tile, start_n, end, BLOCK_N, FORM, False, True)
    for start_n in tl.range(masks, stop, BLOCK_N, num_stages=1 if FORM.PEELED else None):
        dq = _dq_step(dq, tile, start_n, end, BLOCK_N, FORM, FORM.CAUSAL, False)
    store_unrotated(dense[2], base, inside, rope, dq * (scale * LN2), FORM)


@triton.jit
def _dkdv_step(dkdv, tile, base, end, STEP: tl.constexpr, FORM: tl.constexpr, CAUSAL: tl.constexpr, EVEN: tl.constexpr):
    dk, dv = dkdv
    k, v, first_m, q, dout, statistics, scale = tile
    offs_m = base + tl.arange(0, STEP)
    inside = _before(offs_m, end, EVEN)
    q = load(q, base, inside, FORM)
    # [keys, queries]
    qk = masked(dot_transposed(k, q, FORM), offs_m[None, :], first_m[:, None], end, CAUSAL, True)
    p = tl.exp2(qk * scale - _load_lse(statistics[0], offs_m, inside, FORM)[None, :])
    dout = load(dout, base, inside, FORM)
    delta = tl.load(statistics[1] + offs_m, mask=inside, other=0.0)
    ds = p * (dot_transposed(v, dout, FORM) - delta[None, :])
    return accumulate(dk, ds, q, FORM), accumulate(dv, p, dout, FORM)


@triton.jit
def _dkdv_tile(head, base, limit, FORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    qkv, dense, statistics, rope, span, scale = head
    q, k, v = qkv
    start, end, shift = span
    offs_n = base + tl.arange(0, BLOCK_N)
    inside = offs_n < limit
    k, v = load(k, base, inside, FORM), load(v, base, inside, FORM)
    tile = k, v, offs_n - shift, q, dense[0], statistics, scale
    dkdv = zeros(BLOCK_N, FORM), zeros(BLOCK_N, FORM)
    if FORM.PREFIX:
        dkdv = _dkdv_step(dkdv, tile, 0, start, FORM.PREFIX, FORM, FORM.CAUSAL, FORM.PREFIX == 1)
    if FORM.CAUSAL:
        start = tl.maximum(start, base - shift)
    if FORM.CAUSAL and FORM.PEELED:
        diagonal = tl.minimum(end, start + tl.cdiv(BLOCK_N, BLOCK_M) * BLOCK_M)
        for start_m in tl.range(start, diagonal, BLOCK_M, num_stages=1):
            dkdv = _dkdv_step(dkdv, tile, start_m, end, BLOCK_M, FORM, True, False)
        start = diagonal
    if FORM.PEELED:
        masks = start + (end - start) // BLOCK_M * BLOCK_M
        for start_m in range(start, masks, BLOCK_M):
            dkdv = _dkdv_step(dkdv, tile, start_m, end, BLOCK_M, FORM, False, True)
        if masks < end:
            dkdv = _dkdv_step(dkdv, tile, masks, end, BLOCK_M, FORM, False, False)
    else:
        for start_m in range(start, end, BLOCK_M):
            dkdv = _dkdv_step(dkdv, tile, start_m, end, BLOCK_M, FORM, FORM.CAUSAL, False)
    store_unrotated(dense[1], base, inside, rope, dkdv[0] * (scale * LN2), FORM)
    store(dense[2], base, inside, dkdv[1], FORM)


# --- all passes -----------------------------------------------------------------------------------------------------


@triton.jit
def _tile(head, base, limit, PASS: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    if PASS == "rotate":
        _rotate_tile(head, base, limit, FORM, BLOCK)
    elif PASS == "forward":
        _forward_tile(head, base, limit, FORM, BLOCK, STEP)
    elif PASS == "dq":
        _dq_tile(head, base, limit, FORM, BLOCK, STEP)
    else:
        _dkdv_tile(head, base, limit, FORM, BLOCK, STEP)


@triton.jit(do_not_specialize=SIZES, repr=lambda compiled: f"{compiled.constants['PASS']}_kernel")
def attention_kernel(
    qkv,
    dense,
    statistics,
    tables,
    cu_seqlens,
    stride_qz: tl.int64,
    stride_qm: tl.int64,
    stride_qh: tl.int64,
    stride_kz: tl.int64,
    stride_kn: tl.int64,
    stride_kh: tl.int64,
    stride_vz: tl.int64,
    stride_vn: tl.int64,
    stride_vh: tl.int64,
    table_rows: tl.int64,
    tiles,
    heads,
    group,
    seqlen_q,
    seqlen_k,
    num_prefix,
    scale: tl.float32,
    PASS: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One of the passes "rotate", "forward", "dq" and "dkdv", named after it.

    Args:
        qkv: q `[B, N, H, D]` or packed `[T, H, D]`, k and v `[B, M, H / group, D]` or `[T, H / group, D]`, with strides
            z, m or n, and h.
        dense: contiguous tensors. "rotate": the rotated k. "forward": out. "dq": dout, out, dq and the rotated q.
            "dkdv": dout, and dk and dv of each head of q.
        statistics: lse, and in backward delta.
        tables: cos, sin and token_index, or None.
        cu_seqlens: bounds of a packed batch, or None.
        table_rows: rows between the tables of heads; 0 for a shared table.
        group: number of heads of q that share a head of k and v.
        seqlen_q, seqlen_k: N and M, or T.
        scale: factor of the scores, times log2(e).
        BLOCK_M, BLOCK_N: queries and keys of a matmul.
    """
    BLOCK: tl.constexpr = BLOCK_N if PASS == "rotate" or PASS == "dkdv" else BLOCK_M
    STEP: tl.constexpr = BLOCK_M if PASS == "dkdv" else BLOCK_N
    place = _place(tiles, heads, seqlen_q, cu_seqlens)
    tile, head, _, _, length = place
    qkv = (
        _strided(qkv[0], place, head, stride_qz, stride_qm, stride_qh, FORM.VECTOR),
        _strided(qkv[1], place, head // group, stride_kz, stride_kn, stride_kh, FORM.VECTOR),
        _strided(qkv[2], place, head // group, stride_vz, stride_vn, stride_vh, FORM.VECTOR),
    )
    dense = _dense(dense, place, heads, seqlen_q, seqlen_k, cu_seqlens, PASS, FORM.D)
    statistics = _row_statistics(statistics, place, heads, seqlen_q, cu_seqlens)
    rope = _rope(tables, num_prefix, place, seqlen_q, cu_seqlens, table_rows, FORM.D)
    keys = seqlen_k if cu_seqlens is None else length
    start, limit, end = num_prefix if FORM.PREFIX else 0, length, keys
    if PASS == "dkdv":
        limit, end = end, limit
    span = start, end, keys - length
    if FORM.PREFIX and tile == tiles - 1:
        _tile((qkv, dense, statistics, (), span, scale), 0, start, PASS, FORM, PREFIX_ROWS, STEP // 2)
    elif start + tile * BLOCK < limit:
        base = start + tile * BLOCK
        _tile((qkv, dense, statistics, rope, span, scale), base, limit, PASS, FORM, BLOCK, STEP)
