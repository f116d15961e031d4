"""Fragments of matrices: where PTX ISA's formulae put each element, for every lane and register.

The layouts are written out here one element at a time. Factors are small integers, so that sums are exact, and
different enough that no two elements could be exchanged.
"""

import numpy as np
import pytest
from ptx_programs import kernel, run

random = np.random.default_rng(3)
FILL = "mov.u32 %r1, %tid.x;\n"


def small_numbers(*shape):
    return random.integers(-8, 9, shape).astype(np.float32)


def to_bits(x, kind):
    """The bits of exact numbers in bf16 or f16."""
    if kind == "bf16":
        return (np.ascontiguousarray(x, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return np.ascontiguousarray(x).astype(np.float16).view(np.uint16)


def listed(prefix, count, first=0):
    return ", ".join(f"{prefix}{first + n}" for n in range(count))


# --- ldmatrix and stmatrix: PTX ISA, "matrix load instruction" ----------------------------------------------------


def matrices(count):
    """[count, 8, 8] of different 16-bit numbers."""
    return random.permutation(1 << 16)[: count * 64].astype(np.uint16).reshape(count, 8, 8)


def fragment(matrix, transposed):
    """Row r = lane / 4 of the matrix, elements 2 (lane % 4) and the next, in the lower and the upper half of a word."""
    matrix = matrix.T if transposed else matrix
    words = np.empty(32, np.uint32)
    for lane in range(32):
        row, column = lane // 4, 2 * (lane % 4)
        words[lane] = int(matrix[row, column]) | int(matrix[row, column + 1]) << 16
    return words


def rows_anywhere(number):
    """Rows in shared memory in an order of their own: lane 8 m + r brings the address of row r of matrix m, and the
    addresses of the other lanes aren't looked at."""
    order = random.permutation(number * 8).astype(np.uint32)
    return order, np.concatenate([order * 16, np.full(32 - len(order), 1 << 20)]).astype(np.uint32)


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "trans"])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_ldmatrix(number, transposed):
    output, data = np.zeros((number, 32), np.uint32), matrices(number)
    order, addresses = rows_anywhere(number)
    rows = np.empty((32, 8), np.uint16)
    rows[order] = data.reshape(-1, 8)
    body = f"""{FILL}
    mul.wide.u32 %d1, %r1, 16; add.s64 %d2, %d1, %d30;
    ld.global.v4.u32 {{%r2, %r3, %r4, %r5}}, [%d2];
    shl.b32 %r6, %r1, 4;
    st.shared.v4.u32 [%r6], {{%r2, %r3, %r4, %r5}};
    bar.warp.sync -1;
    mul.wide.u32 %d3, %r1, 4; add.s64 %d4, %d3, %d31; ld.global.u32 %r7, [%d4];
    ldmatrix.sync.aligned.m8n8.x{number}{".trans" * transposed}.shared.b16 {{{listed("%r", number, 10)}}}, [%r7];
    add.s64 %d5, %d3, %d32;
    """
    body += "\n".join(f"st.global.u32 [%d5+{128 * n}], %r{10 + n};" for n in range(number))
    run(kernel(body, 3), [rows, addresses, output], shared=512)
    assert (output == [fragment(matrix, transposed) for matrix in data]).all()


@pytest.mark.parametrize("transposed", [False, True], ids=["plain", "trans"])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_stmatrix(number, transposed):
    output, data = np.zeros((number * 8, 8), np.uint16), matrices(number)
    order, addresses = rows_anywhere(number)
    words = np.array([fragment(matrix, transposed) for matrix in data])
    loads = "\n".join(f"ld.global.u32 %r{10 + n}, [%d5+{128 * n}];" for n in range(number))
    body = f"""{FILL}
    mul.wide.u32 %d3, %r1, 4; add.s64 %d4, %d3, %d31; ld.global.u32 %r7, [%d4];
    add.s64 %d5, %d3, %d30;
    {loads}
    stmatrix.sync.aligned.m8n8.x{number}{".trans" * transposed}.shared.b16 [%r7], {{{listed("%r", number, 10)}}};
    bar.warp.sync -1;
    setp.ge.s32 %p1, %r1, {8 * number};
    @%p1 bra END;
    shl.b32 %r6, %r1, 4;
    ld.shared.v4.u32 {{%r2, %r3, %r4, %r5}}, [%r6];
    mul.wide.u32 %d1, %r1, 16; add.s64 %d2, %d1, %d32;
    st.global.v4.u32 [%d2], {{%r2, %r3, %r4, %r5}};
    END:
    """
    run(kernel(body, 3), [words, addresses, output], shared=128 * number)
    assert (output[order] == data.reshape(-1, 8)).all()


# --- mma.m16n8k16: PTX ISA, "matrix fragments for mma.m16n8k16" ----------------------------------------------------


def place_in_a(lane, i):
    """Element a_i of 8: row groupID, + 8 unless i is 0, 1, 4 or 5; column 2 threadID + (i & 1), + 8 for i >= 4."""
    group, thread = lane >> 2, lane % 4
    row = group if i < 2 or 4 <= i < 6 else group + 8
    column = thread * 2 + (i & 1) + (8 if i >= 4 else 0)
    return row, column


def place_in_b(lane, i):
    """Element b_i of 4: row 2 threadID + (i & 1), + 8 for i >= 2; column groupID."""
    group, thread = lane >> 2, lane % 4
    return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group


def place_in_c(lane, i):
    """Element c_i of 4: row groupID, + 8 for i >= 2; column 2 threadID + (i & 1)."""
    group, thread = lane >> 2, lane % 4
    return group + (8 if i >= 2 else 0), thread * 2 + (i & 1)


def packed(matrix, place, elements, kind):
    """[32, elements / 2] words of a factor."""
    bits = to_bits(matrix, kind)
    words = np.zeros((32, elements // 2), np.uint32)
    for lane in range(32):
        for i in range(elements):
            words[lane, i // 2] |= int(bits[place(lane, i)]) << 16 * (i % 2)
    return words


def place_in_a_of_tf32(lane, i):
    """Element a_i of 4, of m16n8k8: row groupID, + 8 for i = 1 and 3; column threadID, + 4 for i >= 2."""
    group, thread = lane >> 2, lane % 4
    return group + 8 * (i % 2), thread + 4 * (i // 2)


def place_in_b_of_tf32(lane, i):
    """Element b_i of 2: row threadID, + 4 for i = 1; column groupID."""
    return lane % 4 + 4 * i, lane >> 2


def tf32_words(matrix, place, elements, lanes=32):
    """[lanes, elements] words of TF32, with bits that tensor cores don't look at."""
    bits = np.array([[matrix[place(lane, i)] for i in range(elements)] for lane in range(lanes)], np.float32)
    return bits.view(np.uint32) | random.integers(0, 1 << 13, bits.shape).astype(np.uint32)


def byte_words(rows, starts):
    """[32, registers] words of m16n8k32: 4 bytes of a row of A, or a column of B, from (row, column) of starts on."""
    words = [[rows[row, k : k + 4] for row, k in starts(lane >> 2, 4 * (lane % 4))] for lane in range(32)]
    return np.array(words, np.int8).view(np.uint32)[..., 0]


def factors(kind):
    """The factors of C [16, 8] = A B: k of the instruction, A, B, and the words of both."""
    if kind == "s8":
        a, b = random.integers(-128, 128, (16, 32)), random.integers(-128, 128, (32, 8))
        a_words = byte_words(a, lambda group, k: [(group, k), (group + 8, k), (group, k + 16), (group + 8, k + 16)])
        return "k32", a, b, a_words, byte_words(b.T, lambda group, k: [(group, k), (group, k + 16)])
    if kind == "tf32":
        a, b = small_numbers(16, 8), small_numbers(8, 8)
        return "k8", a, b, tf32_words(a, place_in_a_of_tf32, 4), tf32_words(b, place_in_b_of_tf32, 2)
    a, b = small_numbers(16, 16), small_numbers(16, 8)
    return "k16", a, b, packed(a, place_in_a, 8, kind), packed(b, place_in_b, 4, kind)


@pytest.mark.parametrize(
    ("kind", "sums", "dtype"),
    [
        ("bf16", "f32", np.float32),
        ("f16", "f32", np.float32),
        ("f16", "f16", np.float16),
        ("tf32", "f32", np.float32),
        ("s8", "s32", np.int32),
    ],
)
def test_mma(kind, sums, dtype):
    shape, a, b, *words = factors(kind)
    c, output = small_numbers(16, 8).round(), np.zeros((32, 4), dtype)
    start = np.array([[c[place_in_c(lane, i)] for i in range(4)] for lane in range(32)], dtype)
    count = 4 * output.itemsize // 4  # registers of c and d
    types = f"{'satfinite.' if kind == 's8' else ''}{sums}.{kind}.{kind}.{sums}"
    body = f"""{FILL}
    mul.wide.u32 %d1, %r1, 16; mul.wide.u32 %d2, %r1, 8; mul.wide.u32 %d7, %r1, {4 * count};
    add.s64 %d3, %d1, %d30; ld.global.v4.u32 {{{listed("%r", 4, 10)}}}, [%d3];
    add.s64 %d4, %d2, %d31; ld.global.v2.u32 {{%r20, %r21}}, [%d4];
    add.s64 %d5, %d7, %d32; ld.global.v{count}.f32 {{{listed("%f", count)}}}, [%d5];
    mma.sync.aligned.m16n8{shape}.row.col.{types}
        {{{listed("%f", count)}}}, {{{listed("%r", 4, 10)}}}, {{%r20, %r21}}, {{{listed("%f", count)}}};
    add.s64 %d6, %d7, %d33; st.global.v{count}.f32 [%d6], {{{listed("%f", count)}}};
    """
    run(kernel(body, 4), [*words, start, output])
    exact = (a @ b + c).astype(dtype)
    assert (output == [[exact[place_in_c(lane, i)] for i in range(4)] for lane in range(32)]).all()


# --- wgmma.m64nNk16: PTX ISA, "asynchronous warpgroup level matrix" ------------------------------------------------


def place_in_wgmma_a(thread, i):
    """As in mma, 16 rows for each warp."""
    row, column = place_in_a(thread % 32, i)
    return 16 * (thread // 32) + row, column


def place_in_wgmma_d(thread, i):
    """Element d_i of N / 2: as in mma's c, 8 columns for each four elements."""
    row, column = place_in_c(thread % 32, i % 4)
    return 16 * (thread // 32) + row, 8 * (i // 4) + column


def swizzled(address, width):
    """Bits 4 to 6 of an address (fewer with a narrower swizzle) are exchanged by those from 7 on."""
    return address ^ (address >> 7 & {128: 7, 64: 3, 32: 1, 0: 0}[width]) << 4


def laid_out(matrix, width, major, spacing):
    """A factor [rows, 16] in memory, and the strides (leading, stride) of its descriptor.

    `spacing` is the additional distance of two of its pieces. Without a swizzle the pieces are core
    matrices of 8 rows of 16 bytes; with one, 8 rows of `width` bytes.
    """
    rows, memory = matrix.shape[0], np.zeros(1 << 14, np.uint16)
    unit = (width or 16) * 8 + spacing
    if major == "k":
        leading, stride = (unit, 2 * unit) if width == 0 else (16, unit)
    elif width == 0:
        leading, stride = unit * (rows // 8), unit
    else:
        stride, leading = unit, 2 * unit  # between 8 of k, between `width` bytes of rows
    for row in range(rows):
        for k in range(16):
            if width == 0 and major == "k":
                at = row // 8 * stride + k // 8 * leading + row % 8 * 16 + k % 8 * 2
            elif width == 0:
                at = row // 8 * stride + k // 8 * leading + k % 8 * 16 + row % 8 * 2
            elif major == "k":
                at = row // 8 * stride + row % 8 * width + k * 2
            else:
                across = width // 2
                at = row // across * leading + k // 8 * stride + k % 8 * width + row % across * 2
            memory[swizzled(at, width) // 2] = to_bits(matrix[row : row + 1, k], "bf16")[0]
    return memory[: rows * 256].copy(), leading, stride


def descriptor(start, leading, stride, width):
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[width]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def wgmma(columns, left, right, **options):
    """Multiplies `left`, words [128, 4] in registers or a pair of (memory, descriptor), by `right`, such a pair."""
    keep, signs, major = options.get("keep", 1), options.get("signs", (1, 1)), options.get("major", ("k", "k"))
    count, in_registers = columns // 2, not isinstance(left, tuple)
    memory = np.concatenate([right[0], np.zeros(1 << 14, np.uint16) if in_registers else left[0]])
    words = left if in_registers else np.zeros((128, 4), np.uint32)
    sums = random.integers(-100, 100, (128, count)).astype(np.float32)
    output = sums.copy()
    turned = [str(int(each == "mn")) for each in major]
    first = f"{{{listed('%r', 4, 10)}}}" if in_registers else "%d7"
    rest = turned[1:] if in_registers else turned
    is_tf32 = options.get("tf32", False)  # without a choice of the major axis
    kind, turns = ("k8.f32.tf32.tf32", "") if is_tf32 else ("k16.f32.bf16.bf16", ", " + ", ".join(rest))
    body = f"""{FILL}
    mul.wide.u32 %d1, %r1, 16; add.s64 %d2, %d1, %d30; ld.global.v4.u32 {{{listed("%r", 4, 10)}}}, [%d2];
    mov.u32 %r2, %r1;
    FILL:
    mul.wide.u32 %d1, %r2, 2; add.s64 %d2, %d1, %d31; ld.global.u16 %h1, [%d2];
    shl.b32 %r3, %r2, 1; st.shared.u16 [%r3], %h1;
    add.s32 %r2, %r2, 128; setp.lt.s32 %p1, %r2, {len(memory)};
    @%p1 bra FILL;
    mul.wide.u32 %d1, %r1, {4 * count}; add.s64 %d3, %d1, %d32;
    {" ".join(f"ld.global.f32 %s{n}, [%d3+{4 * n}];" for n in range(count))}
    bar.sync 0;
    mov.u64 %d6, {right[1]}; mov.u64 %d7, {0 if in_registers else left[1]};
    setp.ne.s32 %p2, {keep}, 0;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n{columns}{kind} {{{listed("%s", count)}}}, {first}, %d6,
        %p2, {signs[0]}, {signs[1]}{turns};
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    {" ".join(f"st.global.f32 [%d3+{4 * n}], %s{n};" for n in range(count))}
    """
    program = kernel(body, 3, registers=f".reg .f32 %s<{count}>;")
    run(program, [words, memory, output], block=128, shared=2 * len(memory))
    return sums, output


def gathered(sums, columns):
    return np.array([[sums[place_in_wgmma_d(t, i)] for i in range(columns // 2)] for t in range(128)])


def in_registers(matrix):
    bits, words = to_bits(matrix, "bf16"), np.zeros((128, 4), np.uint32)
    for thread in range(128):
        for i in range(8):
            words[thread, i // 2] |= int(bits[place_in_wgmma_a(thread, i)]) << 16 * (i % 2)
    return words


@pytest.mark.parametrize("columns", [16, 32, 64, 128])
def test_wgmma_with_a_in_registers(columns):
    a, b = small_numbers(64, 16), small_numbers(columns, 16)
    memory, leading, stride = laid_out(b, 128, "k", 0)
    sums, output = wgmma(columns, in_registers(a), (memory, descriptor(0, leading, stride, 128)))
    assert (output == gathered(a @ b.T, columns) + sums).all()


@pytest.mark.parametrize("width", [0, 32, 64, 128])
@pytest.mark.parametrize("major", ["k", "mn"])
def test_wgmma_by_descriptors(width, major):
    """Both factors, with pieces that aren't next to each other; the second one doesn't begin at 0."""
    a, b = small_numbers(64, 16), small_numbers(64, 16)
    right, *strides = laid_out(b, width, major, 1024)
    left, *more = laid_out(a, width, major, 2048)
    pair = (right, descriptor(0, *strides, width)), (left, descriptor(2 * len(right), *more, width))
    _, output = wgmma(64, pair[1], pair[0], keep=0, major=(major, major))
    assert (output == gathered(a @ b.T, 64)).all()


def test_wgmma_scales():
    a, b = small_numbers(64, 16), small_numbers(16, 16)
    memory, leading, stride = laid_out(b, 32, "k", 0)
    right = (memory, descriptor(0, leading, stride, 32))
    sums, output = wgmma(16, in_registers(a), right, signs=(-1, 1))
    assert (output == sums - gathered(a @ b.T, 16)).all()
    _, output = wgmma(16, in_registers(a), right, keep=0, signs=(-1, -1))
    assert (output == gathered(a @ b.T, 16)).all()


@pytest.mark.parametrize("in_registers", [True, False])
def test_wgmma_of_tf32(in_registers):
    """Its 8 elements of 4 bytes lie as 16 of 2 bytes do."""

    def place(thread, i):
        row, column = place_in_a_of_tf32(thread % 32, i)
        return 16 * (thread // 32) + row, column

    def in_memory(matrix, start):
        memory = np.zeros((len(matrix), 32), np.uint32)
        for row in range(len(matrix)):
            for k in range(8):
                at = swizzled(row * 128 + k * 4, 128) // 4
                memory[at // 32, at % 32] = np.float32(matrix[row, k]).view(np.uint32)
        return memory.view(np.uint16).reshape(-1), descriptor(start, 16, 1024, 128)

    a, b = small_numbers(64, 8), small_numbers(32, 8)
    right = in_memory(b, 0)
    left = tf32_words(a, place, 4, 128) if in_registers else in_memory(a, 2 * len(right[0]))
    sums, output = wgmma(32, left, right, tf32=True)
    assert (output == gathered(a @ b.T, 32) + sums).all()
