"""Bits: logic, shifts and fields against Python's integers."""

import itertools

import numpy as np
import pytest
from ptx_programs import apply

random = np.random.default_rng(1)


@pytest.mark.parametrize("bits", [16, 32, 64])
@pytest.mark.parametrize(("op", "function"), [("and", int.__and__), ("or", int.__or__), ("xor", int.__xor__)])
def test_logic(bits, op, function):
    a, b = random.integers(0, 1 << bits, (2, 50), np.uint64).astype(f"u{bits // 8}")
    expected = [function(x, y) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert apply(f"{op}.b{bits} %o, %a0, %a1;", a, b, out=a.dtype).tolist() == expected
    expected = [x ^ (1 << bits) - 1 for x in a.tolist()]
    assert apply(f"not.b{bits} %o, %a0;", a, out=a.dtype).tolist() == expected


def test_logic_of_predicates():
    a, b = np.array([0, 0, 1, 1], np.uint32), np.array([0, 1, 0, 1], np.uint32)
    for op, table in (("and", [0, 0, 0, 1]), ("or", [0, 1, 1, 1]), ("xor", [0, 1, 1, 0])):
        code = f"setp.ne.s32 %p1, %a0, 0; setp.ne.s32 %p2, %a1, 0; {op}.pred %p3, %p1, %p2; selp.b32 %o, 1, 0, %p3;"
        assert apply(code, a, b, out=np.uint32).tolist() == table
    code = "setp.ne.s32 %p1, %a0, 0; not.pred %p2, %p1; mov.pred %p3, %p2; selp.b32 %o, 1, 0, %p3;"
    assert apply(code, a, out=np.uint32).tolist() == [1, 1, 0, 0]


def shifted(op, value, amount, bits, signed):
    """Amounts of at least the width give zeros, or copies of the sign."""
    if op == "shl":
        return (value << amount) % (1 << bits)
    if signed and value >> (bits - 1):
        value -= 1 << bits
    return (value >> amount) % (1 << bits)


@pytest.mark.parametrize(
    "kind", ["shl.b16", "shl.b32", "shl.b64", "shr.s32", "shr.u32", "shr.s64", "shr.u64", "shr.b32"]
)
def test_shifts_beyond_the_width(kind):
    op, bits, signed = kind[:3], int(kind[5:]), kind[4] == "s"
    amounts = np.array([0, 1, 5, bits - 1, bits, bits + 1, 2 * bits, 255, 256, 1 << 31, (1 << 32) - 1], np.uint32)
    values = np.array([0, 1, (1 << bits) - 1, 1 << (bits - 1), 0x9ABCDEF012345678 % (1 << bits)], f"u{bits // 8}")
    a, b = (np.array(side) for side in zip(*itertools.product(values, amounts), strict=True))
    a = a.astype(values.dtype)
    output = apply(f"{kind} %o, %a0, %a1;", a, b, out=values.dtype).tolist()
    pairs = list(zip(a.tolist(), b.tolist(), strict=True))
    assert output == [shifted(op, value, min(amount, 200), bits, signed) for value, amount in pairs]
    for amount in (3, bits, 300):  # as a number in the text
        output = apply(f"{kind} %o, %a0, {amount};", values, out=values.dtype).tolist()
        assert output == [shifted(op, value, amount, bits, signed) for value in values.tolist()]


def extracted(value, start, length, signed):
    """The pseudo code of the PTX ISA, of 32 bits."""
    last = min(start + length - 1, 31)
    sign = 0 if not signed or length == 0 else value >> last & 1
    bits = [value >> start + n & 1 if n < length and start + n <= 31 else sign for n in range(32)]
    return sum(bit << n for n, bit in enumerate(bits))


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_bfe_at_every_position_and_length(kind):
    values = np.array([0x80000001, 0x7FFFFFFF, 0xA5C3F012, 0x0000FF00], np.uint32)
    numbers = [*range(0, 33, 3), 31, 32, 33, 64, 255, 256 + 7]
    triples = list(itertools.product(values.tolist(), numbers, numbers))
    value, start, length = (np.array(side, np.uint32) for side in zip(*triples, strict=True))
    output = apply(f"bfe.{kind} %o, %a0, %a1, %a2;", value, start, length, out=np.uint32)
    expected = [extracted(v, s & 255, n & 255, kind == "s32") for v, s, n in triples]
    assert output.tolist() == expected


def inserted(value, into, start, length, width):
    """The loop of PTX ISA."""
    for n in range(min(length, width - start)):
        into = into & ~(1 << start + n) | (value >> n & 1) << start + n
    return into


@pytest.mark.parametrize("width", [32, 64])
def test_bfi_at_every_position_and_length(width):
    values = np.array([0xA5C3F0125A3C0FED, 0, (1 << 64) - 1], np.uint64).astype(f"u{width // 8}")
    numbers = [*range(0, 65, 5), 1, 31, 32, 63, 64, 255, 256 + 7]
    every = list(itertools.product(values.tolist(), values[::-1].tolist(), numbers, numbers))
    value, into, start, length = zip(*every, strict=True)
    words = [np.array(side, f"u{width // 8}") for side in (value, into)]
    places = [np.array(side, np.uint32) for side in (start, length)]
    output = apply(f"bfi.b{width} %o, %a0, %a1, %a2, %a3;", *words, *places, out=words[0].dtype)
    assert output.tolist() == [inserted(v, to, s & 255, n & 255, width) for v, to, s, n in every]


def permuted(a, b, selector):
    """The table of PTX ISA: byte n of the result is chosen by bits 4 n on."""
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    made = []
    for n in range(4):
        which = selector >> 4 * n & 15
        byte = source[which & 7]
        made.append((0xFF if byte & 0x80 else 0) if which & 8 else byte)
    return int.from_bytes(bytes(made), "little")


@pytest.mark.parametrize("width", [32, 64])
def test_bits_are_counted(width):
    values = [0, 1, 255, 1 << width - 1, (1 << width) - 1, 0x9ABCDEF012345678 % (1 << width)]
    output = apply(f"popc.b{width} %o, %a0;", np.array(values, f"u{width // 8}"), out=np.uint32)
    assert output.tolist() == [f"{value:b}".count("1") for value in values]


def test_prmt_of_every_selection():
    selector = np.arange(0, 1 << 16, 7, dtype=np.uint32)
    a, b = random.integers(0, 1 << 32, (2, len(selector)), np.uint32)
    output = apply("prmt.b32 %o, %a0, %a1, %a2;", a, b, selector, out=np.uint32)
    assert output.tolist() == [permuted(*each) for each in zip(a.tolist(), b.tolist(), selector.tolist(), strict=True)]
    output = apply("prmt.b32 %o, %a0, %a1, 0x5410U;", a, b, out=np.uint32)
    assert (output == (a & 0xFFFF | b << 16)).all()
