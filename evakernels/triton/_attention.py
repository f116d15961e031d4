"""Flash attention (Dao et al. 2022) for short sequences, with the rotary embedding inside: what both families launch.

A program owns a tile of one head's rows and walks over the tiles of the other side: forward and dq own queries, dk and
dv own keys. So each result is written once, by one program, in a fixed order of additions. The backward of dq comes
first and leaves the means `delta = sum(dout * out)` that the other needs.

**Pieces.** A head of `D` channels is a tuple of tiles whose widths are powers of two and sum up to `D`, rounded up to
16: 80 = 64 + 16. Rotated queries and keys are pieces of `D / 2` channels, the first and the second members of the
pairs. Both are permuted alike, which scores don't notice, so the members are never brought back in order.

**Prefix.** One class token in front of 256 patches would cost a row and a column of tiles. So the tokens of the prefix
may stand apart (`PREFIX`): as a tile of 16 rows, which belongs to a program of its own, and as a tile of `PREFIX` rows
at the start of every walk. One row alone makes no use of a matrix unit: its products are sums.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
PREFIX_ROWS = tl.constexpr(16)
"""The most tokens of a prefix, and the fewest rows of a matrix product."""


# --- pieces ---------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def _count(width):
    """The number of pieces."""
    return (-(-width // 16)).bit_count()


@triton.constexpr_function
def _width(width, index):
    """That of a piece, the widest first."""
    rest = -(-width // 16) * 16
    for _ in range(index):
        rest -= 1 << (rest.bit_length() - 1)
    return 1 << (rest.bit_length() - 1)


@triton.constexpr_function
def _start(width, index):
    """The first channel of a piece."""
    return sum(_width(width, i) for i in range(index))


@triton.jit
def _zeros(ROWS: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr):
    pieces = ()
    WIDTH: tl.constexpr = D // 2 if PAIRS is not None else D
    for i in tl.static_range(_count(WIDTH)):
        zeros = tl.zeros([ROWS, _width(WIDTH, i)], tl.float32)
        pieces += (zeros, zeros) if PAIRS is not None else (zeros,)
    return pieces


@triton.jit
def _scaled(pieces, factor):
    scaled = ()
    for i in tl.static_range(len(pieces)):
        scaled += (pieces[i] * factor,)
    return scaled


@triton.jit
def _products(a, b):
    """a b^T of two heads' rows: [rows of a, rows of b], float32."""
    if b[0].shape[0] == 1:
        found = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1, keep_dims=True)
        for i in tl.static_range(1, len(a)):
            found += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1, keep_dims=True)
    else:
        found = tl.dot(a[0], tl.trans(b[0]), input_precision="ieee")
        for i in tl.static_range(1, len(a)):
            found = tl.dot(a[i], tl.trans(b[i]), found, input_precision="ieee")
    return found


@triton.jit
def _added(sums, weights, pieces):
    """sums + weights pieces, piece by piece."""
    found = ()
    for i in tl.static_range(len(pieces)):
        if weights.shape[1] == 1:
            found += (sums[i] + weights * pieces[i].to(tl.float32),)
        else:
            found += (tl.dot(weights.to(pieces[i].dtype), pieces[i], sums[i], input_precision="ieee"),)
    return found


# --- memory ---------------------------------------------------------------------------------------------------------


@triton.jit
def _load(source, rows, inside, D: tl.constexpr):
    """The rows of a head. `source`: where its first row is, and from one to the next."""
    pieces = ()
    for i in tl.static_range(_count(D)):
        columns = _start(D, i) + tl.arange(0, _width(D, i))
        at = source[0] + rows[:, None] * source[1] + columns[None, :]
        pieces += (tl.load(at, mask=inside[:, None] & (columns < D)[None, :], other=0.0),)
    return pieces


@triton.jit
def _store(target, rows, inside, pieces, D: tl.constexpr):
    for i in tl.static_range(_count(D)):
        columns = _start(D, i) + tl.arange(0, _width(D, i))
        at = target[0] + rows[:, None] * target[1] + columns[None, :]
        tl.store(at, pieces[i].to(target[0].dtype.element_ty), mask=inside[:, None] & (columns < D)[None, :])


@triton.jit
def _load_pairs(source, rows, inside, table, D: tl.constexpr, PAIRS: tl.constexpr):
    """The rows of a head as first and second members of its pairs, rotated if there is a table."""
    pieces = ()
    for i in tl.static_range(_count(D // 2)):
        WIDTH: tl.constexpr = _width(D // 2, i)
        START: tl.constexpr = _start(D // 2, i)
        at = source[0] + rows[:, None] * source[1]
        if PAIRS == "interleaved":
            columns = 2 * START + tl.arange(0, 2 * WIDTH)
            tile = tl.load(at + columns[None, :], mask=inside[:, None] & (columns < D)[None, :], other=0.0)
            first, second = tl.split(tl.reshape(tile, (rows.shape[0], WIDTH, 2)))
        else:
            columns = START + tl.arange(0, WIDTH)
            mask = inside[:, None] & (columns < D // 2)[None, :]
            first = tl.load(at + columns[None, :], mask=mask, other=0.0)
            second = tl.load(at + (columns + D // 2)[None, :], mask=mask, other=0.0)
        if table is not None:
            dtype = first.dtype
            cos, sin = _angles(table, rows, inside, START, WIDTH, D)
            first, second = first.to(tl.float32), second.to(tl.float32)
            first, second = (first * cos - second * sin).to(dtype), (first * sin + second * cos).to(dtype)
        pieces += (first, second)
    return pieces


@triton.jit
def _store_pairs(target, rows, inside, table, pieces, D: tl.constexpr, PAIRS: tl.constexpr):
    """The inverse: gradients of rotated rows as those of the rows."""
    for i in tl.static_range(_count(D // 2)):
        WIDTH: tl.constexpr = _width(D // 2, i)
        START: tl.constexpr = _start(D // 2, i)
        at = target[0] + rows[:, None] * target[1]
        first, second = pieces[2 * i], pieces[2 * i + 1]
        if table is not None:
            cos, sin = _angles(table, rows, inside, START, WIDTH, D)
            first, second = first * cos + second * sin, second * cos - first * sin
        first, second = first.to(target[0].dtype.element_ty), second.to(target[0].dtype.element_ty)
        if PAIRS == "interleaved":
            columns = 2 * START + tl.arange(0, 2 * WIDTH)
            tile = tl.reshape(tl.join(first, second), (rows.shape[0], 2 * WIDTH))
            tl.store(at + columns[None, :], tile, mask=inside[:, None] & (columns < D)[None, :])
        else:
            columns = START + tl.arange(0, WIDTH)
            mask = inside[:, None] & (columns < D // 2)[None, :]
            tl.store(at + columns[None, :], first, mask=mask)
            tl.store(at + (columns + D // 2)[None, :], second, mask=mask)


@triton.jit
def _angles(table, rows, inside, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """cos and sin of the pairs from START on; 1 and 0 for a token of the prefix."""
    cos, sin, token_index, num_prefix, grid = table
    inside &= rows >= num_prefix
    patches = rows - num_prefix
    if token_index is not None:
        patches = tl.load(token_index + patches, mask=inside, other=0).to(tl.int32)
    columns = START + tl.arange(0, WIDTH)
    if grid is None:
        at = patches[:, None] * (D // 2) + columns[None, :]
    else:  # the patch's row turns the first half of the pairs, its column the second
        by_row = (patches // grid * (D // 4))[:, None] + columns[None, :]
        by_column = ((grid + patches % grid - 1) * (D // 4))[:, None] + columns[None, :]
        at = tl.where((columns < D // 4)[None, :], by_row, by_column)
        if D % 16 == 0:
            at = tl.max_contiguous(tl.multiple_of(at, (1, 4)), (1, 4))
    mask = inside[:, None] & (columns < D // 2)[None, :]
    return (
        tl.load(cos + at, mask=mask, other=1.0).to(tl.float32),
        tl.load(sin + at, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def _load_head(source, rows, inside, table, D: tl.constexpr, PAIRS: tl.constexpr):
    """Rows of q or k as the scores want them."""
    if PAIRS is not None:
        return _load_pairs(source, rows, inside, table, D, PAIRS)
    else:
        return _load(source, rows, inside, D)


@triton.jit
def _store_head(target, rows, inside, table, pieces, D: tl.constexpr, PAIRS: tl.constexpr):
    """Rows of dq or dk."""
    if PAIRS is not None:
        _store_pairs(target, rows, inside, table, pieces, D, PAIRS)
    else:
        _store(target, rows, inside, pieces, D)


@triton.jit
def _visible(scores, queries, keys, limit, CAUSAL: tl.constexpr, EVEN: tl.constexpr):
    """`scores` with -inf for keys that a query doesn't see. `queries` and `keys` broadcast to them."""
    if CAUSAL:
        scores = tl.where(keys <= queries, scores, float("-inf"))
    elif not EVEN:
        scores = tl.where(keys < limit, scores, float("-inf"))
    return scores


@triton.jit
def _dots(a, b):
    """The dot product of each row of `a` with that of `b`."""
    found = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        found += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return found


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
def _given(tensor, sample, first, head, batch_stride, stride, head_stride, VECTOR: tl.constexpr):
    """A head of an argument: where its first row is, and from one to the next. Strides count VECTOR elements."""
    return tensor + (sample * batch_stride + first * stride + head * head_stride) * VECTOR, stride * VECTOR


@triton.jit
def _dense(tensor, sample, first, head, heads, tokens, packed, D: tl.constexpr):
    """The same of a contiguous tensor."""
    row = first if packed is not None else sample * tokens
    return tensor + (row * heads + head) * D, heads * D


@triton.jit
def _table(cos, sin, token_index, num_prefix, grid, sample, head, tokens, head_stride):
    """What `_angles` needs for a head; None without a rotation."""
    if cos is None:
        return None
    if token_index is not None:
        token_index += sample * (tokens - num_prefix)
    return cos + head * head_stride, sin + head * head_stride, token_index, num_prefix, grid


# --- forward --------------------------------------------------------------------------------------------------------


@triton.jit
def _attend(
    state,
    rows,
    queries,
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
    """One step of a walk: `queries`, the tokens `rows`, see the tokens `keys`."""
    highest, total, out = state
    inside = keys < limit
    scores = _products(queries, _load_head(k, keys, inside, table, D, PAIRS))
    scores = _visible(scores, rows[:, None], keys[None, :], limit, CAUSAL, EVEN)
    new = tl.maximum(highest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new[:, None])
    factor = tl.exp2(highest - new)
    out = _added(_scaled(out, factor[:, None]), weights, _load(v, keys, inside, D))
    return new, total * factor + tl.sum(weights, 1), out


@triton.jit
def _forward_tile(
    rows,
    limit,
    q,
    k,
    v,
    out,
    lse,
    table,
    own_table,
    start,
    tokens,
    scale,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
    PREFIX: tl.constexpr,
    STEP: tl.constexpr,
):
    """`own_table` rotates the tokens `rows`, which lie in front of `limit`; `table` the patches, from `start` on."""
    inside = rows < limit
    queries = _load_head(q, rows, inside, own_table, D, PAIRS)
    highest = tl.full([rows.shape[0]], float("-inf"), tl.float32)
    state = (highest, tl.zeros_like(highest), _zeros(rows.shape[0], D, None))
    if PREFIX:
        state = _attend(state, rows, queries, tl.arange(0, PREFIX), start, k, v, None, scale, D, PAIRS, CAUSAL, PREFIX == 1)
    end = tl.minimum(tokens, tl.max(rows, 0) + 1) if CAUSAL else tokens
    for first in range(start, end, STEP):
        state = _attend(state, rows, queries, first + tl.arange(0, STEP), tokens, k, v, table, scale, D, PAIRS, CAUSAL, EVEN)
    highest, total, sums = state
    _store(out, rows, inside, _scaled(sums, (1.0 / total)[:, None]), D)
    tl.store(lse + rows, (highest + tl.log2(total)) * LN2, mask=inside)


@triton.jit
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
    tile, head, sample, first, count = _place(tiles, heads, tokens, offsets)
    q = _given(q, sample, first, head, q_batch, q_token, q_head, VECTOR)
    k = _given(k, sample, first, head, k_batch, k_token, k_head, VECTOR)
    v = _given(v, sample, first, head, v_batch, v_token, v_head, VECTOR)
    out = _dense(out, sample, first, head, heads, tokens, offsets, D)
    lse += sample * lse_batch + head * lse_head + first
    table = _table(cos, sin, token_index, num_prefix, grid, sample, head, tokens, table_head)
    start = num_prefix if PREFIX else 0
    if PREFIX and tile == tiles - 1:
        rows = tl.arange(0, PREFIX_ROWS)
        _forward_tile(rows, start, q, k, v, out, lse, table, None, start, count, scale, D, PAIRS, CAUSAL, EVEN, PREFIX, STEP)
    elif start + tile * ROWS < count:
        rows = start + tile * ROWS + tl.arange(0, ROWS)
        _forward_tile(rows, count, q, k, v, out, lse, table, table, start, count, scale, D, PAIRS, CAUSAL, EVEN, PREFIX, STEP)


# --- backward -------------------------------------------------------------------------------------------------------


@triton.jit
def _query_step(
    dq,
    rows,
    queries,
    douts,
    lse,
    delta,
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
    inside = keys < limit
    pieces = _load_head(k, keys, inside, table, D, PAIRS)
    scores = _visible(_products(queries, pieces), rows[:, None], keys[None, :], limit, CAUSAL, EVEN)
    weights = tl.exp2(scores * scale - lse[:, None])
    dscores = weights * (_products(douts, _load(v, keys, inside, D)) - delta[:, None])
    return _added(dq, dscores, pieces)


@triton.jit
def _query_tile(
    rows,
    limit,
    dout,
    q,
    k,
    v,
    out,
    lse,
    delta,
    dq,
    table,
    own_table,
    start,
    tokens,
    scale,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
    PREFIX: tl.constexpr,
    STEP: tl.constexpr,
):
    inside = rows < limit
    queries = _load_head(q, rows, inside, own_table, D, PAIRS)
    douts = _load(dout, rows, inside, D)
    means = _dots(douts, _load(out, rows, inside, D))
    tl.store(delta + rows, means, mask=inside)
    logs = tl.load(lse + rows, mask=inside, other=0.0) * LOG2E
    sums = _zeros(rows.shape[0], D, PAIRS)
    if PREFIX:
        sums = _query_step(
            sums, rows, queries, douts, logs, means, tl.arange(0, PREFIX), start, k, v, None, scale, D, PAIRS, CAUSAL, PREFIX == 1
        )
    end = tl.minimum(tokens, tl.max(rows, 0) + 1) if CAUSAL else tokens
    for first in range(start, end, STEP):
        sums = _query_step(
            sums, rows, queries, douts, logs, means, first + tl.arange(0, STEP), tokens, k, v, table, scale, D, PAIRS, CAUSAL, EVEN
        )
    _store_head(dq, rows, inside, own_table, _scaled(sums, scale * LN2), D, PAIRS)


@triton.jit
def _key_step(
    sums,
    rows,
    keys,
    values,
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
):
    dk, dv = sums
    inside = queries < limit
    pieces = _load_head(q, queries, inside, table, D, PAIRS)
    scores = _visible(_products(keys, pieces), queries[None, :], rows[:, None], limit, CAUSAL, True)
    # A query behind the last one weighs nothing.
    logs = tl.load(lse + queries, mask=inside, other=float("inf")) * LOG2E
    weights = tl.exp2(scores * scale - logs[None, :])
    douts = _load(dout, queries, inside, D)
    dv = _added(dv, weights, douts)
    means = tl.load(delta + queries, mask=inside, other=0.0)
    dscores = weights * (_products(values, douts) - means[None, :])
    return _added(dk, dscores, pieces), dv


@triton.jit
def _key_tile(
    rows,
    limit,
    dout,
    q,
    k,
    v,
    lse,
    delta,
    dk,
    dv,
    table,
    own_table,
    start,
    tokens,
    scale,
    D: tl.constexpr,
    PAIRS: tl.constexpr,
    CAUSAL: tl.constexpr,
    PREFIX: tl.constexpr,
    STEP: tl.constexpr,
):
    inside = rows < limit
    keys = _load_head(k, rows, inside, own_table, D, PAIRS)
    values = _load(v, rows, inside, D)
    sums = (_zeros(rows.shape[0], D, PAIRS), _zeros(rows.shape[0], D, None))
    if PREFIX:
        sums = _key_step(sums, rows, keys, values, tl.arange(0, PREFIX), start, dout, q, lse, delta, None, scale, D, PAIRS, CAUSAL)
    begin = tl.maximum(start, tl.min(rows, 0)) if CAUSAL else start
    for first in range(begin, tokens, STEP):
        sums = _key_step(sums, rows, keys, values, first + tl.arange(0, STEP), tokens, dout, q, lse, delta, table, scale, D, PAIRS, CAUSAL)
    _store_head(dk, rows, inside, own_table, _scaled(sums[0], scale * LN2), D, PAIRS)
    _store(dv, rows, inside, sums[1], D)


@triton.jit
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
    tile, head, sample, first, count = _place(tiles, heads, tokens, offsets)
    q = _given(q, sample, first, head, q_batch, q_token, q_head, VECTOR)
    k = _given(k, sample, first, head, k_batch, k_token, k_head, VECTOR)
    v = _given(v, sample, first, head, v_batch, v_token, v_head, VECTOR)
    dout = _dense(dout, sample, first, head, heads, tokens, offsets, D)
    out = _dense(out, sample, first, head, heads, tokens, offsets, D)
    dq = _dense(dq, sample, first, head, heads, tokens, offsets, D)
    lse += sample * lse_batch + head * lse_head + first
    delta += sample * lse_batch + head * lse_head + first
    table = _table(cos, sin, token_index, num_prefix, grid, sample, head, tokens, table_head)
    start = num_prefix if PREFIX else 0
    if PREFIX and tile == tiles - 1:
        rows = tl.arange(0, PREFIX_ROWS)
        _query_tile(rows, start, dout, q, k, v, out, lse, delta, dq, table, None, start, count, scale, D, PAIRS, CAUSAL, EVEN, PREFIX, STEP)
    elif start + tile * ROWS < count:
        rows = start + tile * ROWS + tl.arange(0, ROWS)
        _query_tile(rows, count, dout, q, k, v, out, lse, delta, dq, table, table, start, count, scale, D, PAIRS, CAUSAL, EVEN, PREFIX, STEP)


@triton.jit
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
    PREFIX: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    tile, head, sample, first, count = _place(tiles, heads, tokens, offsets)
    q = _given(q, sample, first, head, q_batch, q_token, q_head, VECTOR)
    k = _given(k, sample, first, head, k_batch, k_token, k_head, VECTOR)
    v = _given(v, sample, first, head, v_batch, v_token, v_head, VECTOR)
    dout = _dense(dout, sample, first, head, heads, tokens, offsets, D)
    dk = _dense(dk, sample, first, head, heads, tokens, offsets, D)
    dv = _dense(dv, sample, first, head, heads, tokens, offsets, D)
    lse += sample * lse_batch + head * lse_head + first
    delta += sample * lse_batch + head * lse_head + first
    table = _table(cos, sin, token_index, num_prefix, grid, sample, head, tokens, table_head)
    start = num_prefix if PREFIX else 0
    if PREFIX and tile == tiles - 1:
        rows = tl.arange(0, PREFIX_ROWS)
        _key_tile(rows, start, dout, q, k, v, lse, delta, dk, dv, table, None, start, count, scale, D, PAIRS, CAUSAL, PREFIX, STEP)
    elif start + tile * ROWS < count:
        rows = start + tile * ROWS + tl.arange(0, ROWS)
        _key_tile(rows, count, dout, q, k, v, lse, delta, dk, dv, table, table, start, count, scale, D, PAIRS, CAUSAL, PREFIX, STEP)
