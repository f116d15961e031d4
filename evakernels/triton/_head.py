"""The rows of an attention head as tiles in registers: loads with the rotary embedding, matmuls, stores without it.

Rotated rows have the members of a pair side by side, also for half rotations: queries and keys are permuted alike, so
scores stay the same. A tile is as wide as the next power of two, so heads of 80 to 112 channels take the matmuls of
128, but not its memory traffic. (Two narrower tiles, such as 64 and 16, spilled registers in backward.)
"""

import triton
import triton.language as tl

# --- products -------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def _width(channels):
    """Columns of a tile; tensor cores need 16."""
    return triton.next_power_of_2(max(channels, 16))


@triton.jit
def zeros(ROWS: tl.constexpr, FORM: tl.constexpr):
    return tl.zeros([ROWS, _width(FORM.D)], tl.float32)


@triton.jit
def dot_transposed(a, b, FORM: tl.constexpr):
    """a b^T of two heads' rows: [rows of a, rows of b], float32; `FORM` is `_attention.Form`."""
    if b.shape[0] == 1:
        return tl.sum(a.to(tl.float32) * b.to(tl.float32), 1, keep_dims=True)
    else:
        return tl.dot(a, tl.trans(b), input_precision=FORM.PRECISION)


@triton.jit
def accumulate(acc, p, rows, FORM: tl.constexpr):
    """acc + p rows."""
    if p.shape[1] == 1:
        return acc + p * rows.to(tl.float32)
    else:
        return tl.dot(p.to(rows.dtype), rows, acc, input_precision=FORM.PRECISION)


# --- memory ---------------------------------------------------------------------------------------------------------


@triton.jit
def _at(rows, base, inside, columns):
    """Pointers to a tile's elements, with 64 bits for the tile's start only; `rows`: pointer and row stride."""
    return rows[0] + rows[1].to(tl.int64) * base + (tl.arange(0, inside.shape[0]) * rows[1])[:, None] + columns[None, :]


@triton.jit
def _mask(inside, columns, END: tl.constexpr):
    """Mask of the rows that are `inside` and the columns before END."""
    return inside[:, None] if columns.shape[0] == END else inside[:, None] & (columns < END)[None, :]


@triton.jit
def load(source, base, inside, FORM: tl.constexpr):
    """The rows of a head from `base` on that are `inside`."""
    columns = tl.arange(0, _width(FORM.D))
    return tl.load(_at(source, base, inside, columns), mask=_mask(inside, columns, FORM.D), other=0.0)


@triton.jit
def store(target, base, inside, rows, FORM: tl.constexpr):
    columns = tl.arange(0, _width(FORM.D))
    at = _at(target, base, inside, columns)
    tl.store(at, rows.to(target[0].dtype.element_ty), mask=_mask(inside, columns, FORM.D))


@triton.jit
def load_rotated(source, base, inside, rope, FORM: tl.constexpr):
    """Rows of q or k for scores: pairs side by side, rotated if `rope` has tables."""
    if FORM.PAIRS is None:
        return load(source, base, inside, FORM)
    else:
        WIDTH: tl.constexpr = _width(FORM.D) // 2
        if FORM.PAIRS == "interleaved":
            first, second = tl.split(tl.reshape(load(source, base, inside, FORM), (inside.shape[0], WIDTH, 2)))
        else:
            columns = tl.arange(0, WIDTH)
            mask = _mask(inside, columns, FORM.D // 2)
            first = tl.load(_at(source, base, inside, columns), mask=mask, other=0.0)
            second = tl.load(_at(source, base, inside, columns + FORM.D // 2), mask=mask, other=0.0)
        if len(rope) > 0:
            cos, sin = _angles(rope, base, inside, FORM.D)
            a, b = first.to(tl.float32), second.to(tl.float32)
            first, second = (a * cos - b * sin).to(first.dtype), (a * sin + b * cos).to(first.dtype)
        return tl.reshape(tl.join(first, second), (inside.shape[0], 2 * WIDTH))


@triton.jit
def store_unrotated(target, base, inside, rope, rows, FORM: tl.constexpr):
    """Stores dq or dk from gradients of rotated rows."""
    if FORM.PAIRS is None:
        store(target, base, inside, rows, FORM)
    else:
        WIDTH: tl.constexpr = _width(FORM.D) // 2
        first, second = tl.split(tl.reshape(rows, (inside.shape[0], WIDTH, 2)))
        if len(rope) > 0:
            cos, sin = _angles(rope, base, inside, FORM.D)
            first, second = first * cos + second * sin, second * cos - first * sin
        if FORM.PAIRS == "interleaved":
            store(target, base, inside, tl.reshape(tl.join(first, second), (inside.shape[0], 2 * WIDTH)), FORM)
        else:
            columns = tl.arange(0, WIDTH)
            dtype = target[0].dtype.element_ty
            mask = _mask(inside, columns, FORM.D // 2)
            tl.store(_at(target, base, inside, columns), first.to(dtype), mask=mask)
            tl.store(_at(target, base, inside, columns + FORM.D // 2), second.to(dtype), mask=mask)


@triton.jit
def _angles(rope, base, inside, D: tl.constexpr):
    """cos and sin of the pairs; 1 and 0 for tokens of the prefix and index -1."""
    cos, sin, index, num_prefix = rope
    offs = base + tl.arange(0, inside.shape[0])
    inside &= offs >= num_prefix
    patches = offs - num_prefix
    if len(index) > 0:
        patches = tl.load(index[0] + patches, mask=inside, other=-1).to(tl.int32)
        inside &= patches >= 0
    columns = tl.arange(0, _width(D) // 2)
    at = patches[:, None] * (D // 2) + columns[None, :]
    mask = _mask(inside, columns, D // 2)
    return (
        tl.load(cos + at, mask=mask, other=1.0).to(tl.float32),
        tl.load(sin + at, mask=mask, other=0.0).to(tl.float32),
    )


@triton.jit
def masked(qk, offs_m, offs_n, end, CAUSAL: tl.constexpr, EVEN: tl.constexpr):
    """`qk` with -inf for keys that a query doesn't see; `offs_m` and `offs_n` broadcast to it."""
    if CAUSAL:
        qk = tl.where(offs_n <= offs_m, qk, float("-inf"))
    # Also if causal, as later queries come after the padding of the prefix.
    if not EVEN:
        qk = tl.where(offs_n < end, qk, float("-inf"))
    return qk
