"""Flash attention (Dao et al. 2022) for short sequences, with the rotary embedding inside: what both families launch.

A program owns a tile of one head's rows and walks over the tiles of the other side: forward and dq own queries, dk and
dv own keys. So each result is written once, by one program, in a fixed order of additions. The backward of dq comes
first and leaves the means `delta = sum(dout * out)` that the other needs.

One class token in front of 256 patches would cost a row and a column of tiles. So the tokens of the prefix
may stand apart (`PREFIX`): as a tile of 16 rows, which belongs to a program of its own, and as a tile of `PREFIX` rows
at the start of every walk. One row alone makes no use of a matrix unit: its products are sums.
"""

import triton
import triton.language as tl

from evakernels.triton._head import added, dots, load, load_head, products, scaled, store, store_head, visible, zeros

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
SIZES = ("q_batch", "q_token", "q_head", "k_batch", "k_token", "k_head", "v_batch", "v_token", "v_head")
SIZES += ("lse_batch", "lse_head", "table_head", "grid", "tiles", "heads", "tokens", "num_prefix")
"""What Triton shall not compile again for."""
PREFIX_ROWS = tl.constexpr(16)
"""The most tokens of a prefix, and the fewest rows that a matrix unit takes."""


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
def _given(tensor, place, batch_stride, stride, head_stride, VECTOR: tl.constexpr):
    """A head of an argument: where its first row is, and from one to the next. Strides count VECTOR elements."""
    _, head, sample, first, _ = place
    return tensor + (sample * batch_stride + first * stride + head * head_stride) * VECTOR, stride * VECTOR


@triton.jit
def _dense(tensor, place, heads, tokens, offsets, D: tl.constexpr):
    """The same of a contiguous tensor."""
    _, head, sample, first, _ = place
    row = sample * tokens if offsets is None else first
    return tensor + (row * heads + head) * D, heads * D


@triton.jit
def _vector(tensor, place, batch_stride, head_stride):
    """Where a head's numbers begin of which a row has one."""
    _, head, sample, first, _ = place
    return tensor + sample * batch_stride + head * head_stride + first


@triton.jit
def _table(cos, sin, token_index, num_prefix, grid, place, tokens, head_rows, D: tl.constexpr):
    """What `_angles` needs for a head; () without a rotation. What is absent is (), as Triton 3.6 takes no None."""
    _, head, sample, _, _ = place
    if cos is None:
        return ()
    else:
        index = () if token_index is None else (token_index + sample * (tokens - num_prefix),)
        sides = () if grid is None else (grid,)
        first = head * head_rows * (D // 2)
        return cos + first, sin + first, index, num_prefix, sides


@triton.jit
def _before(tokens, limit, EVEN: tl.constexpr):
    """Which tokens lie in front of `limit`; EVEN: all, and the compiler knows it."""
    return tl.full(tokens.shape, True, tl.int1) if EVEN else tokens < limit


# A `_tile` function does the work of a program, for the tokens from `base` on and in front of `limit`, which `table`
# rotates. It walks over the tokens from `start` to `end`, which `walked` rotates; in front of them may be a prefix that
# stands apart. A `_step` is one step of that walk.

# --- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _forward_step(
    state,
    queries,
    rows,
    keys,
    limit,
    k,
    v,
    table,
    scale,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
):
    highest, total, out = state
    inside = _before(keys, limit, EVEN)
    scores = products(queries, load_head(k, keys, inside, table, D, PAIRS))
    scores = visible(scores, rows[:, None], keys[None, :], limit, CAUSAL, EVEN)
    new = tl.maximum(highest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new[:, None])
    factor = tl.exp2(highest - new)
    out = added(scaled(out, factor[:, None]), weights, load(v, keys, inside, D))
    return new, total * factor + tl.sum(weights, 1), out


@triton.jit
def _forward_tile(
    head,
    base,
    limit,
    table,
    start,
    end,
    walked,
    scale,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
    PREFIX: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    q, k, v, out, lse = head
    rows = base + tl.arange(0, ROWS)
    inside = rows < limit
    queries = load_head(q, rows, inside, table, D, PAIRS)
    state = (tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32), zeros(ROWS, D, None))
    if PREFIX:
        keys = tl.arange(0, PREFIX)
        state = _forward_step(state, queries, rows, keys, start, k, v, (), scale, D, PAIRS, CAUSAL, PREFIX == 1)
    for first in range(start, tl.minimum(end, base + ROWS) if CAUSAL else end, STEP):
        tokens = first + tl.arange(0, STEP)
        state = _forward_step(state, queries, rows, tokens, end, k, v, walked, scale, D, PAIRS, CAUSAL, EVEN)
    highest, total, sums = state
    store(out, rows, inside, scaled(sums, (1.0 / total)[:, None]), D)
    tl.store(lse + rows, (highest + tl.log2(total)) * LN2, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
    cos,
    sin,
    token_index,
    offsets,
    q_batch: tl.int64,
    q_token: tl.int64,
    q_head: tl.int64,
    k_batch: tl.int64,
    k_token: tl.int64,
    k_head: tl.int64,
    v_batch: tl.int64,
    v_token: tl.int64,
    v_head: tl.int64,
    lse_batch: tl.int64,
    lse_head: tl.int64,
    table_head: tl.int64,
    grid,
    tiles,
    heads,
    tokens,
    num_prefix,
    scale: tl.float32,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
    PREFIX: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    place = _place(tiles, heads, tokens, offsets)
    q = _given(q, place, q_batch, q_token, q_head, VECTOR)
    k = _given(k, place, k_batch, k_token, k_head, VECTOR)
    v = _given(v, place, v_batch, v_token, v_head, VECTOR)
    out = _dense(out, place, heads, tokens, offsets, D)
    lse = _vector(lse, place, lse_batch, lse_head)
    head = (q, k, v, out, lse)
    table = _table(cos, sin, token_index, num_prefix, grid, place, tokens, table_head, D)
    tile, count, start = place[0], place[4], num_prefix if PREFIX else 0
    if PREFIX and tile == tiles - 1:
        _forward_tile(
            head, 0, start, (), start, count, table, scale, D, PAIRS, CAUSAL, EVEN, PREFIX, PREFIX_ROWS, STEP // 2
        )
    elif start + tile * ROWS < count:
        _forward_tile(
            head,
            start + tile * ROWS,
            count,
            table,
            start,
            count,
            table,
            scale,
            D,
            PAIRS,
            CAUSAL,
            EVEN,
            PREFIX,
            ROWS,
            STEP,
        )


# --- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _query_step(
    dq,
    own,
    rows,
    keys,
    limit,
    k,
    v,
    table,
    scale,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
):
    queries, douts, lse, delta = own
    inside = _before(keys, limit, EVEN)
    pieces = load_head(k, keys, inside, table, D, PAIRS)
    scores = visible(products(queries, pieces), rows[:, None], keys[None, :], limit, CAUSAL, EVEN)
    weights = tl.exp2(scores * scale - lse[:, None])
    dscores = weights * (products(douts, load(v, keys, inside, D)) - delta[:, None])
    return added(dq, dscores, pieces)


@triton.jit
def _query_tile(
    head,
    base,
    limit,
    table,
    start,
    end,
    walked,
    scale,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
    PREFIX: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    dout, q, k, v, out, lse, delta, dq = head
    rows = base + tl.arange(0, ROWS)
    inside = rows < limit
    queries = load_head(q, rows, inside, table, D, PAIRS)
    douts = load(dout, rows, inside, D)
    # The mean of the weights' gradients is that of dout * out over the channels.
    means = dots(douts, load(out, rows, inside, D))
    tl.store(delta + rows, means, mask=inside)
    own = (queries, douts, tl.load(lse + rows, mask=inside, other=0.0) * LOG2E, means)
    sums = zeros(ROWS, D, PAIRS)
    if PREFIX:
        keys = tl.arange(0, PREFIX)
        sums = _query_step(sums, own, rows, keys, start, k, v, (), scale, D, PAIRS, CAUSAL, PREFIX == 1)
    for first in range(start, tl.minimum(end, base + ROWS) if CAUSAL else end, STEP):
        tokens = first + tl.arange(0, STEP)
        sums = _query_step(sums, own, rows, tokens, end, k, v, walked, scale, D, PAIRS, CAUSAL, EVEN)
    store_head(dq, rows, inside, table, scaled(sums, scale * LN2), D, PAIRS)


@triton.jit(do_not_specialize=SIZES)
def query_kernel(
    dout,
    q,
    k,
    v,
    out,
    lse,
    delta,
    dq,
    cos,
    sin,
    token_index,
    offsets,
    q_batch: tl.int64,
    q_token: tl.int64,
    q_head: tl.int64,
    k_batch: tl.int64,
    k_token: tl.int64,
    k_head: tl.int64,
    v_batch: tl.int64,
    v_token: tl.int64,
    v_head: tl.int64,
    lse_batch: tl.int64,
    lse_head: tl.int64,
    table_head: tl.int64,
    grid,
    tiles,
    heads,
    tokens,
    num_prefix,
    scale: tl.float32,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
    PREFIX: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    place = _place(tiles, heads, tokens, offsets)
    q = _given(q, place, q_batch, q_token, q_head, VECTOR)
    k = _given(k, place, k_batch, k_token, k_head, VECTOR)
    v = _given(v, place, v_batch, v_token, v_head, VECTOR)
    dout = _dense(dout, place, heads, tokens, offsets, D)
    out = _dense(out, place, heads, tokens, offsets, D)
    dq = _dense(dq, place, heads, tokens, offsets, D)
    lse = _vector(lse, place, lse_batch, lse_head)
    delta = _vector(delta, place, lse_batch, lse_head)
    head = (dout, q, k, v, out, lse, delta, dq)
    table = _table(cos, sin, token_index, num_prefix, grid, place, tokens, table_head, D)
    tile, count, start = place[0], place[4], num_prefix if PREFIX else 0
    if PREFIX and tile == tiles - 1:
        _query_tile(
            head, 0, start, (), start, count, table, scale, D, PAIRS, CAUSAL, EVEN, PREFIX, PREFIX_ROWS, STEP // 2
        )
    elif start + tile * ROWS < count:
        _query_tile(
            head,
            start + tile * ROWS,
            count,
            table,
            start,
            count,
            table,
            scale,
            D,
            PAIRS,
            CAUSAL,
            EVEN,
            PREFIX,
            ROWS,
            STEP,
        )


@triton.jit
def _key_step(
    sums,
    own,
    rows,
    queries,
    limit,
    dout,
    q,
    lse,
    delta,
    table,
    scale,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
):
    dk, dv = sums
    keys, values = own
    inside = _before(queries, limit, EVEN)
    pieces = load_head(q, queries, inside, table, D, PAIRS)
    scores = visible(products(keys, pieces), queries[None, :], rows[:, None], limit, CAUSAL, True)
    # What lies behind the last query weighs nothing.
    logs = tl.load(lse + queries, mask=inside, other=float("inf")) * LOG2E
    weights = tl.exp2(scores * scale - logs[None, :])
    douts = load(dout, queries, inside, D)
    means = tl.load(delta + queries, mask=inside, other=0.0)
    dscores = weights * (products(values, douts) - means[None, :])
    return added(dk, dscores, pieces), added(dv, weights, douts)


@triton.jit
def _key_tile(
    head,
    base,
    limit,
    table,
    start,
    end,
    walked,
    scale,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
    PREFIX: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    dout, q, k, v, lse, delta, dk, dv = head
    rows = base + tl.arange(0, ROWS)
    inside = rows < limit
    own = (load_head(k, rows, inside, table, D, PAIRS), load(v, rows, inside, D))
    sums = (zeros(ROWS, D, PAIRS), zeros(ROWS, D, None))
    if PREFIX:
        queries = tl.arange(0, PREFIX)
        sums = _key_step(sums, own, rows, queries, start, dout, q, lse, delta, (), scale, D, PAIRS, CAUSAL, PREFIX == 1)
    for first in range(tl.maximum(start, base) if CAUSAL else start, end, STEP):
        tokens = first + tl.arange(0, STEP)
        sums = _key_step(sums, own, rows, tokens, end, dout, q, lse, delta, walked, scale, D, PAIRS, CAUSAL, EVEN)
    store_head(dk, rows, inside, table, scaled(sums[0], scale * LN2), D, PAIRS)
    store(dv, rows, inside, sums[1], D)


@triton.jit(do_not_specialize=SIZES)
def key_kernel(
    dout,
    q,
    k,
    v,
    lse,
    delta,
    dk,
    dv,
    cos,
    sin,
    token_index,
    offsets,
    q_batch: tl.int64,
    q_token: tl.int64,
    q_head: tl.int64,
    k_batch: tl.int64,
    k_token: tl.int64,
    k_head: tl.int64,
    v_batch: tl.int64,
    v_token: tl.int64,
    v_head: tl.int64,
    lse_batch: tl.int64,
    lse_head: tl.int64,
    table_head: tl.int64,
    grid,
    tiles,
    heads,
    tokens,
    num_prefix,
    scale: tl.float32,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
    PREFIX: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    place = _place(tiles, heads, tokens, offsets)
    q = _given(q, place, q_batch, q_token, q_head, VECTOR)
    k = _given(k, place, k_batch, k_token, k_head, VECTOR)
    v = _given(v, place, v_batch, v_token, v_head, VECTOR)
    dout = _dense(dout, place, heads, tokens, offsets, D)
    dk = _dense(dk, place, heads, tokens, offsets, D)
    dv = _dense(dv, place, heads, tokens, offsets, D)
    lse = _vector(lse, place, lse_batch, lse_head)
    delta = _vector(delta, place, lse_batch, lse_head)
    head = (dout, q, k, v, lse, delta, dk, dv)
    table = _table(cos, sin, token_index, num_prefix, grid, place, tokens, table_head, D)
    tile, count, start = place[0], place[4], num_prefix if PREFIX else 0
    if PREFIX and tile == tiles - 1:
        _key_tile(
            head, 0, start, (), start, count, table, scale, D, PAIRS, CAUSAL, EVEN, PREFIX, PREFIX_ROWS, STEP // 2
        )
    elif start + tile * ROWS < count:
        _key_tile(
            head,
            start + tile * ROWS,
            count,
            table,
            start,
            count,
            table,
            scale,
            D,
            PAIRS,
            CAUSAL,
            EVEN,
            PREFIX,
            ROWS,
            STEP,
        )
