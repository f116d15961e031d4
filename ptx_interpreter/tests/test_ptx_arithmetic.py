"""Arithmetic of PTX against exact fractions, Python's integers and numpy in higher precision."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from ptx_programs import apply

from ptx_interpreter import Unsupported

TINY = np.float32(1e-45)
SPECIAL = np.array([0, -0.0, 1, -1, 1.5, -2.75, 1e-40, -1e-40, TINY, 3e38, -3e38, np.inf, -np.inf, np.nan], np.float32)
random = np.random.default_rng(0)


def pairs(values):
    return (np.array(side) for side in zip(*itertools.product(values, values), strict=True))


def wide_floats(count, dtype=np.float32):
    """Floats of all exponents and signs."""
    size = np.dtype(dtype).itemsize
    return random.integers(0, 1 << 8 * size, count, f"u{size}").view(dtype)


def same(a, b):
    """Bits, but for those of NaN."""
    assert a.dtype == b.dtype
    nan = np.isnan(a) & np.isnan(b)
    bits = f"u{a.itemsize}"
    return bool((nan | (a.view(bits) == b.view(bits))).all())


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize(
    ("op", "function"), [("add", np.add), ("sub", np.subtract), ("mul", np.multiply), ("div.rn", np.divide)]
)
def test_floats_are_rounded_to_nearest(kind, op, function):
    a, b = pairs(SPECIAL.astype(f"f{kind[1:]}"[0] + str(int(kind[1:]) // 8)))
    with np.errstate(all="ignore"):
        expected = function(a, b)
    assert same(apply(f"{op}.{kind} %o, %a0, %a1;", a, b, out=a.dtype), expected)


@pytest.mark.parametrize(
    ("op", "function"),
    [
        ("neg.f32", np.negative),
        ("abs.f32", np.abs),
        ("rcp.rn.f32", lambda x: (1 / x.astype(np.float64)).astype(np.float32)),
        ("sqrt.rn.f32", lambda x: np.sqrt(x.astype(np.float64)).astype(np.float32)),
    ],
)
def test_functions_of_one_float(op, function):
    x = np.concatenate([SPECIAL, wide_floats(500)])
    with np.errstate(all="ignore"):
        expected = function(x)
    assert same(apply(f"{op} %o, %a0;", x, out=np.float32), expected)


def exact_fma(a, b, c, dtype, mode="rn"):
    """a * b + c of finite numbers, by fractions."""
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    if exact == 0:
        with np.errstate(all="ignore"):
            return dtype(a) * dtype(b) + dtype(c)  # the sign of a zero
    info = np.finfo(dtype)
    exponent = max(math.floor(math.log2(abs(exact.numerator)) - math.log2(exact.denominator)) - 1, info.minexp)
    while Fraction(2) ** (exponent + 1) <= abs(exact):
        exponent += 1
    unit = Fraction(2) ** (max(exponent, info.minexp) - info.nmant)
    scaled = exact / unit
    whole = math.floor(scaled) if mode == "rm" else round(scaled)  # round() ties to even
    output = whole * unit
    if abs(output) > Fraction(float(info.max)):
        return dtype(info.max if mode == "rm" and exact > 0 else np.copysign(np.inf, float(np.sign(exact.numerator))))
    return dtype(np.copysign(float(output), 1 if exact > 0 else -1))


def fma_inputs():
    """Random numbers; sums in the middle of two float32, with and without a rest; subnormal and great results."""
    wide = [x[np.isfinite(x)] for x in (wide_floats(400), wide_floats(400), wide_floats(400))]
    count = min(map(len, wide))
    near = random.standard_normal((3, 500)).astype(np.float32)
    # (1 + 2^-12) (1 + 2^-12) = 1 + 2^-11 + 2^-24: with small c the float64 sum is the middle and has lost the rest.
    middle = np.float32(1 + 2.0**-12)
    rests = np.array([0, 2.0**-60, -(2.0**-60), 2.0**-30, 1e-45, -1e-45, 2.0**-100], np.float32)
    small = np.float32(2.0**-75)  # small * small = 2^-150, half of the least number
    # A little less, which vanishes in a float64 sum with these: the middle of two subnormal numbers.
    above, below = small * np.float32(1 + 2.0**-23), small * np.float32(1 - 2.0**-23)
    subnormal = np.array([2.0**-127 + 2.0**-149, 2.0**-127, -(2.0**-127), -(2.0**-127) - 2.0**-149], np.float32)
    parts = (
        [x[:count] for x in wide],
        (near[0], near[1], near[2]),
        (np.full(7, middle), np.full(7, middle), rests),
        (np.full(7, middle), np.full(7, -middle), rests),
        (np.full(7, small), np.full(7, small), rests),
        (np.full(7, small * np.float32(1 + 2.0**-20)), np.full(7, small), rests),
        (near[0] * np.float32(2.0**-70), near[1] * np.float32(2.0**-70), near[2] * np.float32(2.0**-140)),
        (np.full(4, above), np.full(4, below), subnormal),
        (np.full(4, above), np.full(4, -below), subnormal),
        (np.full(2, np.float32(3e38)), np.array([1, 2], np.float32), np.full(2, np.float32(3e38))),
        (near[0], np.ones(500, np.float32), -near[0]),
    )
    return [np.concatenate(each).astype(np.float32) for each in zip(*parts, strict=True)]


@pytest.mark.parametrize("mode", ["rn", "rm"])
def test_fma_is_rounded_once(mode):
    a, b, c = fma_inputs()
    output = apply(f"fma.{mode}.f32 %o, %a0, %a1, %a2;", a, b, c, out=np.float32)
    expected = np.array([exact_fma(*each, np.float32, mode) for each in zip(a, b, c, strict=True)])
    if mode == "rm":  # an exact zero is negative then
        output, expected = output + np.float32(0), expected + np.float32(0)
    assert same(output, expected)
    with np.errstate(all="ignore"):
        twice = (a.astype(np.float64) * b + c).astype(np.float32)
    assert not same(output, twice), "these inputs don't tell one rounding from two"


def test_fma_may_write_what_it_reads():
    a, b, c = fma_inputs()
    expected = apply("fma.rn.f32 %o, %a0, %a1, %a2;", a, b, c, out=np.float32)
    for name in ("%a0", "%a1", "%a2"):
        output = apply(f"fma.rn.f32 {name}, %a0, %a1, %a2; mov.b32 %o, {name};", a, b, c, out=np.float32)
        assert same(output, expected)


def test_fma_of_what_is_not_finite():
    a, b = pairs(SPECIAL)
    c = np.resize(SPECIAL[::-1], len(a))
    with np.errstate(all="ignore"):
        expected = (a.astype(np.float64) * b + c).astype(np.float32)
    unusual = ~np.isfinite(a) | ~np.isfinite(b) | ~np.isfinite(c)
    output = apply("fma.rn.f32 %o, %a0, %a1, %a2;", a, b, c, out=np.float32)
    assert same(output[unusual], expected[unusual])


def test_fma_of_float64_is_rounded_once():
    a, b, c = (np.concatenate([wide_floats(300, np.float64), random.standard_normal(300)]) for _ in range(3))
    c[300:400] = -a[300:400] * b[300:400]  # leaves the rounding error of the product
    c[400:450] = 0
    a[450:460] = 0
    # A little less than half a unit of the sum, which rounds to half a unit in float64.
    a[460:464], b[460:464] = 2.0**-27 * (1 + 2.0**-30), 2.0**-26 * (1 - 2.0**-30) * np.array([1, 1, -1, -1])
    c[460:464] = np.array([1, 1 + 2.0**-52, 1, 1 + 2.0**-52])
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    a, b, c = a[finite], b[finite], c[finite]
    output = apply("fma.rn.f64 %o, %a0, %a1, %a2;", a, b, c, out=np.float64)
    assert same(output, np.array([exact_fma(*each, np.float64) for each in zip(a, b, c, strict=True)]))


def test_subnormal_numbers_are_flushed_by_ftz():
    a, b, c = (np.array(x, np.float32) for x in ([1e-40, 1e-20, -1e-40], [1e30, 1e-20, 1], [-0.0, 1e-42, -0.0]))
    output = apply("fma.rn.ftz.f32 %o, %a0, %a1, %a2;", a, b, c, out=np.float32)
    assert same(output, np.array([0, 0, -0.0], np.float32))
    assert apply("ex2.approx.ftz.f32 %o, %a0;", np.array([-130], np.float32), out=np.float32) == 0
    assert apply("ex2.approx.f32 %o, %a0;", np.array([-130], np.float32), out=np.float32) == 2.0**-130


APPROXIMATIONS = {
    "ex2.approx.f32 %o, %a0": lambda x, y: np.exp2(x),
    "div.full.f32 %o, %a1, %a0": lambda x, y: y / x,
    "div.approx.ftz.f32 %o, %a1, %a0": lambda x, y: y / x,
    "rsqrt.approx.ftz.f32 %o, %a0": lambda x, y: x**-0.5,
    "lg2.approx.f32 %o, %a0": lambda x, y: np.log2(x),
    "sin.approx.f32 %o, %a0": lambda x, y: np.sin(x),
    "cos.approx.f32 %o, %a0": lambda x, y: np.cos(x),
    "tanh.approx.f32 %o, %a0": lambda x, y: np.tanh(x),
}


@pytest.mark.parametrize("op", APPROXIMATIONS)
def test_approximations_are_as_good_as_ptx_promises(op):
    x, y = np.abs(random.standard_normal((2, 1000)).astype(np.float32))
    exact = APPROXIMATIONS[op](x.astype(np.float64), y)
    output = apply(f"{op};", x, y, out=np.float32)
    assert (np.abs(output - exact) <= 2.0**-22 * np.abs(exact)).all()


@pytest.mark.parametrize("op", ["min", "max"])
def test_min_and_max_prefer_numbers_and_order_zeros(op):
    def chosen(a, b):
        if np.isnan(a) or np.isnan(b):
            return b if np.isnan(a) else a
        first = (a, not np.signbit(a)) <= (b, not np.signbit(b))
        return a if first == (op == "min") else b

    a, b = pairs(SPECIAL)
    expected = np.array([chosen(x, y) for x, y in zip(a, b, strict=True)], np.float32)
    assert same(apply(f"{op}.f32 %o, %a0, %a1;", a, b, out=np.float32), expected)
    expected[np.isnan(a) | np.isnan(b)] = np.nan
    assert same(apply(f"{op}.NaN.f32 %o, %a0, %a1;", a, b, out=np.float32), expected)


def test_copysign_takes_the_sign_of_its_first_operand():
    a, b = pairs(SPECIAL)
    output = apply("copysign.f32 %o, %a0, %a1;", a, b, out=np.float32)
    assert (np.signbit(output) == np.signbit(a)).all()
    assert same(np.abs(output), np.abs(b))


COMPARISONS = {"eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b}
COMPARISONS |= {"le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b}


def compared(name, kind, a, b):
    code = f"setp.{name}.{kind} %p1, %a0, %a1; selp.b32 %o, 1, 0, %p1;"
    return apply(code, a, b, out=np.uint32).astype(bool)


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparisons_with_nan(name):
    a, b = pairs(SPECIAL)
    nan = np.isnan(a) | np.isnan(b)
    expected = COMPARISONS[name](a, b)
    assert (compared(name, "f32", a, b) == (expected & ~nan)).all()
    assert (compared(f"{name}u", "f32", a, b) == (expected | nan)).all()
    assert (compared("nan", "f32", a, b) == nan).all()
    assert (compared("num", "f32", a, b) == ~nan).all()


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_comparisons_of_integers(kind):
    size = int(kind[1:])
    a, b = pairs(np.array([0, 1, 2, (1 << size - 1) - 1, 1 << size - 1, (1 << size) - 1], f"u{size // 8}"))
    signs = [v.view(f"{'i' if kind[0] == 's' else 'u'}{size // 8}") for v in (a, b)]
    for name, function in COMPARISONS.items():
        assert (compared(name, kind, a, b) == function(*signs)).all()


def wrapped(values, kind):
    """Integers as the type has them, two's complement."""
    bits = int(kind[1:])
    return np.array([v % (1 << bits) for v in values], f"u{bits // 8}")


def integers(kind):
    """[n] pairs as Python's integers, and the arrays of their bits."""
    bits = int(kind[1:])
    half, whole = 1 << bits - 1, 1 << bits
    some = [0, 1, 2, 3, 7, half - 1, half, whole - 1, whole - 5, 0x1234567 % whole]
    values = [v - whole if kind[0] == "s" and v >= half else v for v in some]
    both = list(itertools.product(values, values))
    return both, [wrapped(side, kind) for side in zip(*both, strict=True)]


SUMS = [(kind, op) for kind in ("s16", "s32", "s64") for op in ("add", "sub", "mul.lo")]
ORDERS = [(kind, op) for kind in ("s32", "u32", "s64", "u64") for op in ("mul.lo", "min", "max")]


@pytest.mark.parametrize(("kind", "op"), [*SUMS, *ORDERS])
def test_integers_wrap(kind, op):
    function = {"add": int.__add__, "sub": int.__sub__, "mul.lo": int.__mul__, "min": min, "max": max}[op]
    both, (a, b) = integers(kind)
    output = apply(f"{op}.{kind} %o, %a0, %a1;", a, b, out=a.dtype)
    assert (output == wrapped([function(x, y) for x, y in both], kind)).all()


@pytest.mark.parametrize("op", ["min", "max"])
def test_relu_leaves_no_negative_integer(op):
    both, (a, b) = integers("s32")
    expected = [max({"min": min, "max": max}[op](x, y), 0) for x, y in both]
    assert apply(f"{op}.relu.s32 %o, %a0, %a1;", a, b, out=np.int32).tolist() == expected
    with pytest.raises(Unsupported, match=f"{op}.relu of f32"):
        apply(f"{op}.relu.f32 %o, %a0, %a1;", np.float32([1]), np.float32([2]), out=np.float32)


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
def test_division_of_integers_is_towards_zero(kind):
    both, (a, b) = integers(kind)
    usable = [n for n, (x, y) in enumerate(both) if y != 0 and not (y == -1 and x == -(1 << int(kind[1:]) - 1))]
    a, b, both = a[usable], b[usable], [both[n] for n in usable]
    quotients = [abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in both]
    rests = [x - y * q for (x, y), q in zip(both, quotients, strict=True)]
    assert (apply(f"div.{kind} %o, %a0, %a1;", a, b, out=a.dtype) == wrapped(quotients, kind)).all()
    assert (apply(f"rem.{kind} %o, %a0, %a1;", a, b, out=a.dtype) == wrapped(rests, kind)).all()


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32", "s64", "u64"])
def test_products_wide_and_high(kind):
    bits = int(kind[1:])
    both, (a, b) = integers(kind)
    products = [x * y for x, y in both]
    if bits < 64:
        output = apply(f"mul.wide.{kind} %o, %a0, %a1;", a, b, out=f"u{bits // 4}")
        assert (output == wrapped(products, kind[0] + str(2 * bits))).all()
    output = apply(f"mul.hi.{kind} %o, %a0, %a1;", a, b, out=a.dtype)
    assert (output == wrapped([p >> bits for p in products], kind)).all()


def test_mad():
    both, (a, b) = integers("s32")
    c = np.resize(b[::-1], len(a))
    signed = c.view(np.int32).tolist()
    output = apply("mad.lo.s32 %o, %a0, %a1, %a2;", a, b, c, out=np.uint32)
    assert (output == wrapped([x * y + z for (x, y), z in zip(both, signed, strict=True)], "s32")).all()
    output = apply("mad.hi.s32 %o, %a0, %a1, %a2;", a, b, c, out=np.uint32)
    assert (output == wrapped([(x * y >> 32) + z for (x, y), z in zip(both, signed, strict=True)], "s32")).all()
    wide = random.integers(0, 1 << 64, len(a), np.uint64)
    output = apply("mad.wide.s32 %o, %a0, %a1, %a2;", a, b, wide, out=np.uint64)
    assert (output == wrapped([x * y + int(z) for (x, y), z in zip(both, wide, strict=True)], "s64")).all()


def test_neg_of_integers():
    x = np.array([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], np.uint32)
    assert apply("neg.s32 %o, %a0;", x, out=np.uint32).tolist() == [0, 0xFFFFFFFF, 0x80000001, 0x80000000, 1]


@pytest.mark.parametrize("kind", ["b16", "b32", "b64"])
def test_selp(kind):
    size = int(kind[1:]) // 8
    a, b = random.integers(0, 1 << 8 * size, (2, 100), np.uint64).astype(f"u{size}")
    which = random.integers(0, 2, 100, np.uint32)
    output = apply(f"setp.ne.s32 %p1, %a2, 0; selp.{kind} %o, %a0, %a1, %p1;", a, b, which, out=a.dtype)
    assert (output == np.where(which, a, b)).all()


def test_constants_are_numbers_of_their_bits():
    x = np.arange(3, dtype=np.float32)
    output = apply("mov.f32 %f1, 0f3FC00000; add.f32 %o, %a0, %f1;", x, out=np.float32)
    assert output.tolist() == [1.5, 2.5, 3.5]
    output = apply("mov.b32 %r1, 0f3FC00000; add.s32 %o, %a0, %r1;", x.view(np.uint32), out=np.uint32)
    assert output[0] == 0x3FC00000
    output = apply("add.f64 %o, %a0, 0dBFF0000000000000;", x.astype(np.float64), out=np.float64)
    assert output.tolist() == [-1, 0, 1]
