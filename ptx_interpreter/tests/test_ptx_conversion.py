"""Conversions between formats, against numpy in higher precision and against tables of neighbours."""

from fractions import Fraction

import numpy as np
import pytest
from ptx_programs import apply

random = np.random.default_rng(2)


def floats(count=4000):
    """float32 of all exponents, with those around the ranges of the 16-bit formats more often."""
    everywhere = random.integers(0, 1 << 32, count, np.uint32).view(np.float32)
    near = (random.standard_normal(count) * 2.0 ** random.integers(-30, 20, count)).astype(np.float32)
    special = np.array(
        [0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.9, 65520, 1e-8, 2.0**-25, 3.4e38, 1e-45], np.float32
    )
    return np.concatenate([everywhere, near, special])


def table(name):
    """All finite numbers of a 16-bit format as float64, in order, and their bits."""
    bits = np.arange(1 << 16, dtype=np.uint32)
    values = (bits << 16).view(np.float32) if name == "bf16" else bits.astype(np.uint16).view(np.float16)
    with np.errstate(all="ignore"):
        values = values.astype(np.float64)
    keep = np.isfinite(values) & ~((values == 0) & (bits > 0x7FFF))
    order = np.argsort(values[keep])
    return values[keep][order], bits[keep][order]


def nearest(x, name):
    """The bits of the neighbour that is nearest, of two the even one."""
    values, bits = table(name)
    top = values[-1] + (values[-1] - values[-2]) / 2  # from here on infinite
    infinite = {"bf16": 0x7F80, "f16": 0x7C00}[name]
    output = []
    for number in map(float, x):
        sign = 0x8000 if np.signbit(number) else 0
        if np.isnan(number):
            output.append(0x7FFF)
        elif abs(number) >= top:
            output.append(infinite | sign)
        else:
            at = int(np.clip(np.searchsorted(values, abs(number)), 1, len(values) - 1))
            below, above = abs(number) - values[at - 1], values[at] - abs(number)
            even = at - 1 if bits[at - 1] % 2 == 0 else at
            choice = even if below == above else at - 1 if below < above else at
            output.append(int(bits[choice]) | sign)
    return np.array(output, np.uint16)


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_to_16_bits_is_to_the_nearest_even(name):
    x = floats(1500)
    values, _ = table(name)
    middles = ((values[:-1] + values[1:]) / 2)[:: len(values) // 500].astype(np.float32)
    x = np.concatenate([x, middles, np.nextafter(middles, np.float32(9)), np.nextafter(middles, np.float32(-9))])
    expected = nearest(x, name)
    assert (apply(f"cvt.rn.{name}.f32 %o, %a0;", x, out=np.uint16) == expected).all()
    both = apply(f"cvt.rn.{name}x2.f32 %o, %a0, %a1;", x, x[::-1].copy(), out=np.uint32)
    assert (both >> 16 == expected).all(), "the first operand is the upper half"
    assert (both & 0xFFFF == expected[::-1]).all()


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_from_16_bits_is_exact(name):
    bits = np.arange(1 << 16, dtype=np.uint32)
    exact = (
        (bits << 16).view(np.float32) if name == "bf16" else bits.astype(np.uint16).view(np.float16).astype(np.float32)
    )
    output = apply(f"cvt.f32.{name} %o, %a0;", bits.astype(np.uint16), out=np.float32)
    assert ((output == exact) & (np.signbit(output) == np.signbit(exact)) | np.isnan(output) & np.isnan(exact)).all()


@pytest.mark.parametrize("mode", ["rn", "rz", "rm", "rp"])
def test_roundings_of_float64_to_float32(mode):
    scale = 2.0 ** random.integers(-155, 128, 3000)
    x = np.concatenate(
        [random.standard_normal(3000) * scale, [0, -0.0, 1e300, -1e300, 1e-300, -1e-300, 1.0, np.inf, np.nan]]
    )
    output = apply(f"cvt.{mode}.f32.f64 %o, %a0;", x, out=np.float32)
    with np.errstate(all="ignore"):
        near = x.astype(np.float32)
    finite = ~np.isnan(x)
    with np.errstate(all="ignore"):
        up, down = np.nextafter(output, np.float32(np.inf)), np.nextafter(output, np.float32(-np.inf))
    wide, above, below = (v.astype(np.float64) for v in (output, up, down))
    tests = {
        "rn": output == near,
        "rm": (wide <= x) & ((above > x) | (wide == x)),
        "rp": (wide >= x) & ((below < x) | (wide == x)),
        "rz": (np.abs(wide) <= np.abs(x)) & (np.where(x > 0, above > x, below < x) | (wide == x)),
    }
    assert tests[mode][finite].all()
    assert (np.signbit(output) == np.signbit(x))[finite].all()
    assert np.isnan(output[~finite]).all()


def test_float32_to_float64_is_exact():
    x = floats(300)
    output = apply("cvt.f64.f32 %o, %a0;", x, out=np.float64)
    numbers = ~np.isnan(x)
    assert (output[numbers] == x[numbers]).all()
    assert np.isnan(output[~numbers]).all()


@pytest.mark.parametrize(
    ("mode", "function"), [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)]
)
@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_floats_to_integers_saturate(kind, mode, function):
    """NaN becomes 0, or for 64 bits the integer with the highest bit alone."""
    bits, signed = int(kind[1:]), kind[0] == "s"
    x = np.array([0, -0.5, 0.5, 1.5, 2.5, -2.5, 1e9, 3e9, -3e9, 1e19, -1e19, 1e30, np.inf, -np.inf, np.nan], np.float32)
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    expected = []
    for number in x:
        if np.isnan(number):
            expected.append(1 << 63 if bits == 64 else 0)
        elif np.isinf(number):
            expected.append(low if number < 0 else high)
        else:
            expected.append(min(max(int(function(number)), low), high))
    output = apply(f"cvt.{mode}.{kind}.f32 %o, %a0;", x, out=f"u{bits // 8}")
    assert output.tolist() == [value % (1 << bits) for value in expected]


@pytest.mark.parametrize("kind", ["s32", "u32", "s64"])
def test_integers_to_float32_are_rounded_once(kind):
    bits = int(kind[1:])
    x = random.integers(0, 1 << bits, 2000, np.uint64) >> random.integers(0, bits, 2000).astype(np.uint64)
    middles = [(1 << 24) + 1, (1 << 24) + 3, (1 << 31) + 128, (1 << 30) + 63, (1 << 62) + (1 << 38) + 1, 0]
    x = np.concatenate([x, np.array(middles, np.uint64)]).astype(f"u{bits // 8}")
    numbers = x.view(f"{'i' if kind[0] == 's' else 'u'}{bits // 8}").tolist()
    expected = []
    for number in numbers:  # by rounding the integer itself to 24 bits
        drop = max(abs(number).bit_length() - 24, 0)
        expected.append(float(round(number / (1 << drop)) << drop) if bits == 32 else float(rounded(number, drop)))
    output = apply(f"cvt.rn.f32.{kind} %o, %a0;", x, out=np.float32)
    assert (output == np.array(expected)).all()


def rounded(number, drop):
    size, unit = abs(number), 1 << drop
    low = size // unit
    rest = 2 * (size - low * unit)
    low += rest > unit or (rest == unit and low % 2 == 1)
    return low * unit * (-1 if number < 0 else 1)


def test_integers_are_cut_or_extended():
    x = np.array([0, 1, 0x7FFF, 0x8000, 0xFFFF, 0x12345678, 0x80000000, 0xFFFFFFFF], np.uint32)
    assert apply("cvt.u16.u32 %o, %a0;", x, out=np.uint16).tolist() == [v & 0xFFFF for v in x.tolist()]
    assert apply("cvt.u64.u32 %o, %a0;", x, out=np.uint64).tolist() == x.tolist()
    assert apply("cvt.s64.s32 %o, %a0;", x, out=np.int64).tolist() == x.view(np.int32).tolist()
    assert apply("cvt.u32.u64 %o, %a0;", x.astype(np.uint64) + (5 << 32), out=np.uint32).tolist() == x.tolist()
    small = x.astype(np.uint16)
    assert apply("cvt.u32.u16 %o, %a0;", small, out=np.uint32).tolist() == small.tolist()


def test_saturation_to_the_unit_interval():
    x = np.array([-1, -0.0, 0.25, 1, 7, np.inf, -np.inf, np.nan], np.float32)
    output = apply("cvt.sat.f32.f32 %o, %a0;", x, out=np.float32)
    assert output.tolist() == [0, 0, 0.25, 1, 1, 1, 0, 0]
    assert not np.signbit(output).any()


def test_registers_are_joined_and_divided():
    low, high = random.integers(0, 1 << 16, (2, 50), np.uint16)
    assert (apply("mov.b32 %o, {%a0, %a1};", low, high, out=np.uint32) == low | high.astype(np.uint32) << 16).all()
    whole = random.integers(0, 1 << 64, 50, np.uint64)
    for part, shift in (("%o, %r9", 0), ("_, %o", 32), ("%o, _", 0)):
        output = apply(f"mov.b64 {{{part}}}, %a0;", whole, out=np.uint32)
        assert (output == (whole >> np.uint64(shift)).astype(np.uint32)).all()
    quarters = apply("mov.b64 {%h1, %h2, %h3, %h4}, %a0; mov.b64 %o, {%h4, %h3, %h2, %h1};", whole, out=np.uint64)
    parts = whole.view(np.uint16).reshape(-1, 4)[:, ::-1]
    assert (quarters == np.ascontiguousarray(parts).view(np.uint64)[:, 0]).all()


@pytest.mark.parametrize("name", ["bf16", "f16"])
@pytest.mark.parametrize(("op", "function"), [("add", np.add), ("sub", np.subtract)])
def test_sums_of_16_bits_are_rounded_once(name, op, function):
    values, bits = table(name)
    a, b = (random.integers(0, len(bits), 1500) for _ in range(2))
    close = np.clip(len(bits) - 1 - a + random.integers(-3000, 3000, len(a)), 0, len(bits) - 1)
    x, y = np.concatenate([a, a]), np.concatenate([b, close])
    x_bits, y_bits = (bits[n].astype(np.uint16) for n in (x, y))
    # float64 holds the sum of two such numbers, or one far from the middle of two of them.
    expected = nearest(function(values[x], values[y]), name)
    output = apply(f"{op}.{name} %o, %a0, %a1;", x_bits, y_bits, out=np.uint16)
    assert (output == expected).all()
    pairs = (n.astype(np.uint32) | n[::-1].astype(np.uint32) << 16 for n in (x_bits, y_bits))
    both = apply(f"{op}.{name}x2 %o, %a0, %a1;", *pairs, out=np.uint32)
    assert (both == expected.astype(np.uint32) | expected[::-1].astype(np.uint32) << 16).all()


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_fused_sums_of_16_bits_are_rounded_once(name):
    """Also where the product is in the middle of two numbers and the rest decides, however small it is."""
    values, bits = table(name)
    ones = np.flatnonzero((values >= 1) & (values < 2))
    tiny = np.argsort(abs(values))[1:20]
    a, b = (random.choice(ones, 2000) for _ in range(2))
    b[:1000] = np.searchsorted(values, 1.5)  # every other product is in the middle
    c = np.concatenate([random.choice(tiny, 1000), random.integers(0, len(bits), 1000)])
    exact = [Fraction(x) * Fraction(y) + Fraction(z) for x, y, z in zip(values[a], values[b], values[c], strict=True)]
    words = [bits[n].astype(np.uint16) for n in (a, b, c)]
    output = apply(f"fma.rn.{name} %o, %a0, %a1, %a2;", *words, out=np.uint16)
    neighbours = np.clip(np.searchsorted(values, [float(x) for x in exact]), 1, len(values) - 2)
    for n, (x, at) in enumerate(zip(exact, neighbours, strict=True)):
        around = [(abs(Fraction(values[k]) - x), bits[k] % 2, int(bits[k])) for k in (at - 1, at, at + 1)]
        assert output[n] == min(around)[2], (n, float(x))
    pairs = [word.astype(np.uint32) | word[::-1].astype(np.uint32) << 16 for word in words]
    both = apply(f"fma.rn.{name}x2 %o, %a0, %a1, %a2;", *pairs, out=np.uint32)
    assert (both == output.astype(np.uint32) | output[::-1].astype(np.uint32) << 16).all()


def test_tf32_rounds_halves_away_from_zero():
    x = floats(3000)
    x = x[np.isfinite(x) & (np.abs(x) >= 2.0**-126) & (np.abs(x) < 2.0**127)]
    x[::3] = (x[::3].view(np.uint32) & np.uint32(0xFFFFE000) | np.uint32(0x1000)).view(np.float32)  # halves
    mantissa, exponent = np.frexp(x.astype(np.float64))
    expected = np.copysign(np.ldexp(np.floor(np.abs(mantissa) * 2**11 + 0.5), exponent - 11), x)
    output = apply("cvt.rna.tf32.f32 %o, %a0;", x, out=np.float32)
    assert (output == expected).all()
    assert (output[::3] != x[::3]).all()
    special = np.array([np.inf, -np.inf, np.nan], np.float32)
    np.testing.assert_array_equal(apply("cvt.rna.tf32.f32 %o, %a0;", special, out=np.float32), special)
