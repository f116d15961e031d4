"""The rows of an attention head as tiles in registers: loads with the rotary embedding, products, stores without it.

A head of `D` channels is a tuple of pieces: the first and the second members of the pairs where it is rotated, else all
channels in one. Rotated queries and keys are permuted alike, which scores don't notice, so the pairs are never put
together again. A piece is as wide as the next power of two, so heads of 80, 88, 96 and 112 channels multiply as much as
those of 128. (Two narrower ones, as 64 and 16 for 80, took so many registers that the gradients' kernels spilled; 88
has no such parts, as tensor cores want 16 columns.) What is masked off isn't moved, and memory bounds such heads: by
formula, 128 images of EVA01-g (88 channels, 257 tokens) are 92 us of products on an H100 in place of 63, beside 124 us
of memory traffic (800 TFLOP/s, 3 TB/s).
"""

import triton
import triton.language as tl

# --- pieces ---------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def _width(channels):
    """Of a piece; tensor cores want 16 columns."""
    return triton.next_power_of_2(max(channels, 16))


@triton.jit
def zeros(ROWS: tl.constexpr, FORM: tl.constexpr):
    return (tl.zeros([ROWS, _width(FORM.D)], tl.float32),)


@triton.jit
def zeros_in_pairs(ROWS: tl.constexpr, FORM: tl.constexpr):
    if FORM.PAIRS is None:
        return zeros(ROWS, FORM)
    else:
        members = tl.zeros([ROWS, _width(FORM.D // 2)], tl.float32)
        return members, members


@triton.jit
def scaled(pieces, factor):
    found = ()
    for i in tl.static_range(len(pieces)):
        found += (pieces[i] * factor,)
    return found


@triton.jit
def dot_transposed(a, b, FORM: tl.constexpr):
    """a b^T of two heads' rows: [rows of a, rows of b], float32; `FORM`: as `_attention` says."""
    if b[0].shape[0] == 1:
        found = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1, keep_dims=True)
        for i in tl.static_range(1, len(a)):
            found += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1, keep_dims=True)
    else:
        found = tl.dot(a[0], tl.trans(b[0]), input_precision=FORM.PRECISION)
        for i in tl.static_range(1, len(a)):
            found = tl.dot(a[i], tl.trans(b[i]), found, input_precision=FORM.PRECISION)
    return found


@triton.jit
def accumulate(acc, p, pieces, FORM: tl.constexpr):
    """acc + p pieces, piece by piece."""
    found = ()
    for i in tl.static_range(len(pieces)):
        if p.shape[1] == 1:
            found += (acc[i] + p * pieces[i].to(tl.float32),)
        else:
            found += (tl.dot(p.to(pieces[i].dtype), pieces[i], acc[i], input_precision=FORM.PRECISION),)
    return found


# --- memory ---------------------------------------------------------------------------------------------------------


@triton.jit
def _mask(inside, columns, END: tl.constexpr):
    """Of the elements in rows that are `inside` and columns in front of END."""
    return inside[:, None] if columns.shape[0] == END else inside[:, None] & (columns < END)[None, :]


@triton.jit
def load(source, offs, inside, FORM: tl.constexpr):
    """The rows of a head. `source`: where its first row is, and from one to the next."""
    columns = tl.arange(0, _width(FORM.D))
    at = source[0] + offs[:, None] * source[1] + columns[None, :]
    return (tl.load(at, mask=_mask(inside, columns, FORM.D), other=0.0),)


@triton.jit
def store(target, offs, inside, pieces, FORM: tl.constexpr):
    columns = tl.arange(0, _width(FORM.D))
    at = target[0] + offs[:, None] * target[1] + columns[None, :]
    tl.store(at, pieces[0].to(target[0].dtype.element_ty), mask=_mask(inside, columns, FORM.D))


@triton.jit
def load_rotated(source, offs, inside, rope, FORM: tl.constexpr):
    """Rows of q or k as the scores want them: in pairs, rotated if `rope` has tables."""
    if FORM.PAIRS is None:
        return load(source, offs, inside, FORM)
    else:
        WIDTH: tl.constexpr = _width(FORM.D // 2)
        at = source[0] + offs[:, None] * source[1]
        if FORM.PAIRS == "interleaved":
            columns = tl.arange(0, 2 * WIDTH)
            both = tl.load(at + columns[None, :], mask=_mask(inside, columns, FORM.D), other=0.0)
            first, second = tl.split(tl.reshape(both, (offs.shape[0], WIDTH, 2)))
        else:
            columns = tl.arange(0, WIDTH)
            mask = _mask(inside, columns, FORM.D // 2)
            first = tl.load(at + columns[None, :], mask=mask, other=0.0)
            second = tl.load(at + (columns + FORM.D // 2)[None, :], mask=mask, other=0.0)
        if len(rope) > 0:
            cos, sin = _angles(rope, offs, inside, FORM.D)
            a, b = first.to(tl.float32), second.to(tl.float32)
            first, second = (a * cos - b * sin).to(first.dtype), (a * sin + b * cos).to(first.dtype)
        return first, second


@triton.jit
def store_unrotated(target, offs, inside, rope, pieces, FORM: tl.constexpr):
    """Rows of dq or dk: the inverse, gradients of rotated rows as those of the rows."""
    if FORM.PAIRS is None:
        store(target, offs, inside, pieces, FORM)
    else:
        WIDTH: tl.constexpr = _width(FORM.D // 2)
        at = target[0] + offs[:, None] * target[1]
        dtype = target[0].dtype.element_ty
        first, second = pieces
        if len(rope) > 0:
            cos, sin = _angles(rope, offs, inside, FORM.D)
            first, second = first * cos + second * sin, second * cos - first * sin
        if FORM.PAIRS == "interleaved":
            columns = tl.arange(0, 2 * WIDTH)
            both = tl.reshape(tl.join(first.to(dtype), second.to(dtype)), (offs.shape[0], 2 * WIDTH))
            tl.store(at + columns[None, :], both, mask=_mask(inside, columns, FORM.D))
        else:
            columns = tl.arange(0, WIDTH)
            mask = _mask(inside, columns, FORM.D // 2)
            tl.store(at + columns[None, :], first.to(dtype), mask=mask)
            tl.store(at + (columns + FORM.D // 2)[None, :], second.to(dtype), mask=mask)


@triton.jit
def _angles(rope, offs, inside, D: tl.constexpr):
    """cos and sin of the pairs; 1 and 0 for a token of the prefix."""
    cos, sin, index, num_prefix, sides = rope
    inside &= offs >= num_prefix
    patches = offs - num_prefix
    if len(index) > 0:
        patches = tl.load(index[0] + patches, mask=inside, other=0).to(tl.int32)
    columns = tl.arange(0, _width(D // 2))
    if len(sides) == 0:
        at = patches[:, None] * (D // 2) + columns[None, :]
    else:  # the patch's row turns the first half of the pairs, its column the second
        grid = sides[0]
        by_row = (patches // grid * (D // 4))[:, None] + columns[None, :]
        by_column = ((grid + patches % grid - 1) * (D // 4))[:, None] + columns[None, :]
        at = tl.where((columns < D // 4)[None, :], by_row, by_column)
        if D % 16 == 0:
            at = tl.max_contiguous(tl.multiple_of(at, (1, 4)), (1, 4))
    mask = _mask(inside, columns, D // 2)
    return (
        tl.load(cos + at, mask=mask, other=1.0).to(tl.float32),
        tl.load(sin + at, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def masked(qk, offs_m, offs_n, end, CAUSAL: tl.constexpr, EVEN: tl.constexpr):
    """`qk` with -inf for keys that a query doesn't see. `offs_m` and `offs_n` broadcast to it."""
    if CAUSAL:
        qk = tl.where(offs_n <= offs_m, qk, float("-inf"))
    # Also where causal: later queries are behind the padding of the prefix.
    if not EVEN:
        qk = tl.where(offs_n < end, qk, float("-inf"))
    return qk


@triton.jit
def row_dots(a, b):
    """The dot product of each row of `a` with that of `b`."""
    found = tl.sum(a[0].to(tl.float32) * b[0].to(tl.float32), 1)
    for i in tl.static_range(1, len(a)):
        found += tl.sum(a[i].to(tl.float32) * b[i].to(tl.float32), 1)
    return found
