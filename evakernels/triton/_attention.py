"""Flash attention (Dao et al. 2022) for short sequences, with the rotary embedding inside: what both families launch.

There are three passes, each a kernel. A program has a tile of one head and loops over tiles of the other side: forward
and dq over keys, dkdv over queries. So each result is written once, by one program, in a fixed order of additions. dq
comes first in backward and leaves `delta = sum(dout * out)`, which dkdv needs.

One class token in front of 256 patches would cost a row and a column of tiles. So the tokens of the prefix
may stand apart (`PREFIX`): as a tile of 16 rows, which belongs to a program of its own, and as a tile of `PREFIX` rows
in front of every loop. One row alone makes no use of a matrix unit: its products are sums.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from evakernels.triton._head import (
    accumulate,
    dot_transposed,
    load,
    load_rotated,
    masked,
    row_dots,
    scaled,
    store,
    store_unrotated,
    zeros,
    zeros_in_pairs,
)

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SIZES = ("stride_qz", "stride_qm", "stride_qh", "stride_kz", "stride_kn", "stride_kh")
SIZES += ("stride_vz", "stride_vn", "stride_vh", "table_rows", "grid", "tiles", "heads", "tokens", "num_prefix")
"""What Triton shall not compile again for."""
PREFIX_ROWS = tl.constexpr(16)
"""The most tokens of a prefix, and the fewest rows that a matrix unit takes."""


class Form(NamedTuple):
    """What an attention kernel is compiled for, beside its tiles.

    Attributes:
        D: channels of a head.
        PAIRS: how the rotary embedding pairs them, "interleaved" or "halves"; None without one.
        CAUSAL: whether a query sees only the keys up to its own.
        EVEN: whether the steps of a loop divide the tokens, so that none needs a mask.
        PREFIX: rows of a prefix that stands apart; 0 where none does.
        VECTOR: how many elements the strides of q, k and v count.
        PRECISION: of float32 products, Triton's `input_precision`.
    """

    D: int
    PAIRS: str | None
    CAUSAL: bool
    EVEN: bool
    PREFIX: int
    VECTOR: int
    PRECISION: str


# --- which head a program has ---------------------------------------------------------------------------------------


@triton.jit
def _place(tiles, heads, tokens, offsets):
    """Tile, head and sample of a program; of the sample, the first row in a packed batch, and how many it has."""
    program = tl.program_id(0)
    sample = program // tiles // heads
    if offsets is None:
        first = 0
    else:
        first = tl.load(offsets + sample).to(tl.int64)
        tokens = (tl.load(offsets + sample + 1) - first).to(tl.int32)
    return program % tiles, program // tiles % heads, sample.to(tl.int64), first, tokens


@triton.jit
def _strided(tensor, place, stride_z, stride_m, stride_h, VECTOR: tl.constexpr):
    """A head of q, k or v: where its first row is, and from one to the next. Strides count VECTOR elements."""
    _, head, sample, first, _ = place
    return tensor + (sample * stride_z + first * stride_m + head * stride_h) * VECTOR, stride_m * VECTOR


@triton.jit
def _dense(tensors, place, heads, tokens, offsets, D: tl.constexpr):
    """The same of contiguous tensors."""
    _, head, sample, first, _ = place
    row = sample * tokens if offsets is None else first
    found = ()
    for i in tl.static_range(len(tensors)):
        found += ((tensors[i] + (row * heads + head) * D, heads * D),)
    return found


@triton.jit
def _of_rows(tensors, place, heads, tokens, offsets):
    """Where a head's numbers begin in `[B, H, N]` or, packed, `[H, T]`: lse and delta."""
    _, head, sample, first, _ = place
    at = (sample * heads + head) * tokens if offsets is None else head.to(tl.int64) * tokens + first
    found = ()
    for i in tl.static_range(len(tensors)):
        found += (tensors[i] + at,)
    return found


@triton.jit
def _rope(tables, num_prefix, grid, place, tokens, table_rows, D: tl.constexpr):
    """What a rotation needs for a head; () without one. What is absent is (), as Triton 3.6 takes no None."""
    _, head, sample, _, _ = place
    cos, sin, token_index = tables
    if cos is None:
        return ()
    else:
        index = () if token_index is None else (token_index + sample * (tokens - num_prefix),)
        sides = () if grid is None else (grid,)
        first = head * table_rows * (D // 2)
        return cos + first, sin + first, index, num_prefix, sides


@triton.jit
def _before(offs, end, EVEN: tl.constexpr):
    """Which tokens lie in front of `end`; EVEN: all, and the compiler knows it."""
    return tl.full(offs.shape, True, tl.int1) if EVEN else offs < end


# A `_tile` function does the work of a program: of the tokens from `base` on and in front of `limit`, rotated by
# `rope_of_tile`, against those from `start` to `end`, rotated by `rope`, and the prefix in front of them if that stands
# apart. A `_step` is one step of its loop. In forward and dq, m are the tile's tokens and n those of the loop.

# --- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_step(state, q, offs_m, offs_n, end, k, v, rope, scale, FORM: tl.constexpr, EVEN: tl.constexpr):
    m_i, l_i, acc = state
    inside = _before(offs_n, end, EVEN)
    qk = dot_transposed(q, load_rotated(k, offs_n, inside, rope, FORM), FORM)
    qk = masked(qk, offs_m[:, None], offs_n[None, :], end, FORM.CAUSAL, EVEN)
    m_ij = tl.maximum(m_i, tl.max(qk, 1) * scale)
    p = tl.exp2(qk * scale - m_ij[:, None])
    alpha = tl.exp2(m_i - m_ij)
    acc = accumulate(scaled(acc, alpha[:, None]), p, load(v, offs_n, inside, FORM), FORM)
    return m_ij, l_i * alpha + tl.sum(p, 1), acc


@triton.jit
def _forward_tile(
    qkv,
    dense,
    of_rows,
    base,
    limit,
    rope_of_tile,
    start,
    end,
    rope,
    scale,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    q, k, v = qkv
    offs_m = base + tl.arange(0, BLOCK_M)
    inside = offs_m < limit
    q = load_rotated(q, offs_m, inside, rope_of_tile, FORM)
    state = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32), zeros(BLOCK_M, FORM)
    if FORM.PREFIX:
        offs_prefix = tl.arange(0, FORM.PREFIX)
        state = _forward_step(state, q, offs_m, offs_prefix, start, k, v, (), scale, FORM, FORM.PREFIX == 1)
    for start_n in range(start, tl.minimum(end, base + BLOCK_M) if FORM.CAUSAL else end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        state = _forward_step(state, q, offs_m, offs_n, end, k, v, rope, scale, FORM, FORM.EVEN)
    m_i, l_i, acc = state
    store(dense[0], offs_m, inside, scaled(acc, (1.0 / l_i)[:, None]), FORM)
    tl.store(of_rows[0] + offs_m, (m_i + tl.log2(l_i)) * LN2, mask=inside)


# --- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _dq_step(dq, tile, offs_m, offs_n, end, k, v, rope, scale, FORM: tl.constexpr, EVEN: tl.constexpr):
    q, dout, lse, delta = tile
    inside = _before(offs_n, end, EVEN)
    k = load_rotated(k, offs_n, inside, rope, FORM)
    qk = masked(dot_transposed(q, k, FORM), offs_m[:, None], offs_n[None, :], end, FORM.CAUSAL, EVEN)
    p = tl.exp2(qk * scale - lse[:, None])
    ds = p * (dot_transposed(dout, load(v, offs_n, inside, FORM), FORM) - delta[:, None])
    return accumulate(dq, ds, k, FORM)


@triton.jit
def _dq_tile(
    qkv,
    dense,
    of_rows,
    base,
    limit,
    rope_of_tile,
    start,
    end,
    rope,
    scale,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    q, k, v = qkv
    offs_m = base + tl.arange(0, BLOCK_M)
    inside = offs_m < limit
    q = load_rotated(q, offs_m, inside, rope_of_tile, FORM)
    dout = load(dense[0], offs_m, inside, FORM)
    delta = row_dots(dout, load(dense[1], offs_m, inside, FORM))
    tl.store(of_rows[1] + offs_m, delta, mask=inside)
    tile = q, dout, tl.load(of_rows[0] + offs_m, mask=inside, other=0.0) * LOG2E, delta
    dq = zeros_in_pairs(BLOCK_M, FORM)
    if FORM.PREFIX:
        offs_prefix = tl.arange(0, FORM.PREFIX)
        dq = _dq_step(dq, tile, offs_m, offs_prefix, start, k, v, (), scale, FORM, FORM.PREFIX == 1)
    for start_n in range(start, tl.minimum(end, base + BLOCK_M) if FORM.CAUSAL else end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        dq = _dq_step(dq, tile, offs_m, offs_n, end, k, v, rope, scale, FORM, FORM.EVEN)
    store_unrotated(dense[2], offs_m, inside, rope_of_tile, scaled(dq, scale * LN2), FORM)


@triton.jit
def _dkdv_step(dkdv, tile, offs_n, offs_m, end, q, dout, of_rows, rope, scale, FORM: tl.constexpr, EVEN: tl.constexpr):
    dk, dv = dkdv
    k, v = tile
    inside = _before(offs_m, end, EVEN)
    q = load_rotated(q, offs_m, inside, rope, FORM)
    # [keys, queries]
    qk = masked(dot_transposed(k, q, FORM), offs_m[None, :], offs_n[:, None], end, FORM.CAUSAL, True)
    # What lies behind the last query has no probability.
    lse = tl.load(of_rows[0] + offs_m, mask=inside, other=float("inf")) * LOG2E
    p = tl.exp2(qk * scale - lse[None, :])
    dout = load(dout, offs_m, inside, FORM)
    delta = tl.load(of_rows[1] + offs_m, mask=inside, other=0.0)
    ds = p * (dot_transposed(v, dout, FORM) - delta[None, :])
    return accumulate(dk, ds, q, FORM), accumulate(dv, p, dout, FORM)


@triton.jit
def _dkdv_tile(
    qkv,
    dense,
    of_rows,
    base,
    limit,
    rope_of_tile,
    start,
    end,
    rope,
    scale,
    FORM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    q, k, v = qkv
    dout = dense[0]
    offs_n = base + tl.arange(0, BLOCK_N)
    inside = offs_n < limit
    tile = load_rotated(k, offs_n, inside, rope_of_tile, FORM), load(v, offs_n, inside, FORM)
    dkdv = zeros_in_pairs(BLOCK_N, FORM), zeros(BLOCK_N, FORM)
    if FORM.PREFIX:
        offs_prefix = tl.arange(0, FORM.PREFIX)
        dkdv = _dkdv_step(dkdv, tile, offs_n, offs_prefix, start, q, dout, of_rows, (), scale, FORM, FORM.PREFIX == 1)
    for start_m in range(tl.maximum(start, base) if FORM.CAUSAL else start, end, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        dkdv = _dkdv_step(dkdv, tile, offs_n, offs_m, end, q, dout, of_rows, rope, scale, FORM, FORM.EVEN)
    store_unrotated(dense[1], offs_n, inside, rope_of_tile, scaled(dkdv[0], scale * LN2), FORM)
    store(dense[2], offs_n, inside, dkdv[1], FORM)


# --- all passes -----------------------------------------------------------------------------------------------------


@triton.jit
def _tile(
    qkv,
    dense,
    of_rows,
    base,
    limit,
    rope_of_tile,
    start,
    end,
    rope,
    scale,
    PASS: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    if PASS == "forward":
        _forward_tile(qkv, dense, of_rows, base, limit, rope_of_tile, start, end, rope, scale, FORM, BLOCK, STEP)
    elif PASS == "dq":
        _dq_tile(qkv, dense, of_rows, base, limit, rope_of_tile, start, end, rope, scale, FORM, BLOCK, STEP)
    else:
        _dkdv_tile(qkv, dense, of_rows, base, limit, rope_of_tile, start, end, rope, scale, FORM, BLOCK, STEP)


@triton.jit(do_not_specialize=SIZES, repr=lambda compiled: f"{compiled.constants['PASS']}_kernel")
def attention_kernel(
    qkv,
    dense,
    of_rows,
    tables,
    offsets,
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
    grid,
    tiles,
    heads,
    tokens,
    num_prefix,
    scale: tl.float32,
    PASS: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One of the passes "forward", "dq" and "dkdv", named after it.

    Args:
        qkv: q, k and v, `[B, N, H, D]` or packed `[T, H, D]`, with strides z, m or n, and h.
        dense: contiguous tensors of that shape: out; dout, out and dq; dout, dk and dv.
        of_rows: lse, and in backward delta.
        tables: cos, sin and token_index, each of which may be None.
        offsets: of a packed batch, else None.
        table_rows: from the table of one head to that of the next; 0 where all have one.
        grid: the side of a compact table's grid, else None.
        tokens: N, or T.
        scale: of the scores, times log2(e).
        BLOCK_M, BLOCK_N: how many queries and keys are multiplied at a time.
    """
    BLOCK: tl.constexpr = BLOCK_N if PASS == "dkdv" else BLOCK_M
    STEP: tl.constexpr = BLOCK_M if PASS == "dkdv" else BLOCK_N
    place = _place(tiles, heads, tokens, offsets)
    qkv = (
        _strided(qkv[0], place, stride_qz, stride_qm, stride_qh, FORM.VECTOR),
        _strided(qkv[1], place, stride_kz, stride_kn, stride_kh, FORM.VECTOR),
        _strided(qkv[2], place, stride_vz, stride_vn, stride_vh, FORM.VECTOR),
    )
    dense = _dense(dense, place, heads, tokens, offsets, FORM.D)
    of_rows = _of_rows(of_rows, place, heads, tokens, offsets)
    rope = _rope(tables, num_prefix, grid, place, tokens, table_rows, FORM.D)
    tile, end, start = place[0], place[4], num_prefix if FORM.PREFIX else 0
    if FORM.PREFIX and tile == tiles - 1:
        _tile(qkv, dense, of_rows, 0, start, (), start, end, rope, scale, PASS, FORM, PREFIX_ROWS, STEP // 2)
    elif start + tile * BLOCK < end:
        base = start + tile * BLOCK
        _tile(qkv, dense, of_rows, base, end, rope, start, end, rope, scale, PASS, FORM, BLOCK, STEP)
