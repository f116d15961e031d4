"""Loads and stores of every width, and the traffic they make."""

import numpy as np
import pytest
from ptx_programs import kernel, run

random = np.random.default_rng(4)
HEAD = "mov.u32 %r1, %tid.x;\n"


@pytest.mark.parametrize("kind", ["u8", "u16", "u32", "u64", "v2.u16", "v4.u8", "v2.u32", "v4.u32", "v4.f32"])
def test_every_width_through_shared_memory(kind):
    size, count = int(kind[-2:].lstrip("u")) // 8, int(kind[1]) if kind[0] == "v" else 1
    whole = size * count
    letter = "d" if size == 8 else "f" if kind.endswith("f32") else "h" if size <= 2 else "r"
    names = ", ".join(f"%{letter}{10 + n}" for n in range(count))
    names = f"{{{names}}}" if count > 1 else names
    body = f"""{HEAD}
    mul.wide.u32 %d1, %r1, {whole}; add.s64 %d2, %d1, %d30; add.s64 %d3, %d1, %d31; mul.lo.s32 %r2, %r1, {whole};
    ld.global.{kind} {names}, [%d2];
    st.shared.{kind} [%r2], {names};
    bar.sync 0;
    xor.b32 %r3, %r1, 33; mul.lo.s32 %r2, %r3, {whole};
    ld.shared.{kind} {names}, [%r2];
    st.global.{kind} [%d3], {names};
    """
    data = random.integers(0, 256, (64, whole), np.uint8)
    output = np.zeros_like(data)
    run(kernel(body, 2), [data, output], block=64, shared=64 * whole)
    assert (output == data[np.arange(64) ^ 33]).all()


def test_narrow_loads_are_extended():
    data = np.array([0x80, 0xFF, 0x7F, 1], np.uint8)
    for kind, expected in (("u8", [128, 255, 127, 1]), ("s8", [-128, -1, 127, 1])):
        body = f"{HEAD}cvt.u64.u32 %d1, %r1; add.s64 %d2, %d1, %d30; ld.global.{kind} %r2, [%d2];"
        body += "mul.wide.u32 %d1, %r1, 4; add.s64 %d3, %d1, %d31; st.global.u32 [%d3], %r2;"
        output = np.zeros(4, np.int32)
        run(kernel(body, 2), [data, output], block=4)
        assert output.tolist() == expected


def traffic(body, space, block=32, size=1 << 14):
    report = run(kernel(HEAD + body), [np.zeros(size, np.uint8)], block=block, shared=size, check=False)
    total = report.total(space)
    return total.requests, total.sectors, total.bytes


@pytest.mark.parametrize(
    ("stride", "width", "sectors"),
    [(4, 4, 4), (8, 4, 8), (32, 4, 32), (64, 4, 32), (0, 4, 1), (16, 16, 16), (32, 16, 32), (2, 2, 2)],
)
def test_sectors_of_global_memory(stride, width, sectors):
    """A warp's sectors of 32 bytes. The array is aligned to at least half a sector."""
    kind = {2: "u16 %h1", 4: "u32 %r5", 16: "v4.u32 {%r5, %r6, %r7, %r8}"}[width]
    body = f"mul.wide.u32 %d1, %r1, {stride}; add.s64 %d2, %d30, 31; and.b64 %d2, %d2, -32; add.s64 %d2, %d2, %d1;"
    body += f"ld.global.{kind}, [%d2];"
    assert traffic(body, "global") == (1, sectors, 32 * width)
    for mixed in ("sub.s32 %r2, 31, %r1;", "mul.lo.s32 %r2, %r1, 13; and.b32 %r2, %r2, 31;"):
        other = body.replace("%r1, ", "%r2, ").replace("mul.wide", f"{mixed} mul.wide", 1)
        assert traffic(other, "global") == (1, sectors, 32 * width)


def test_sectors_of_some_threads():
    body = "setp.lt.u32 %p1, %r1, 40; mul.wide.u32 %d1, %r1, 32; add.s64 %d2, %d30, 31; and.b64 %d2, %d2, -32;"
    body += "add.s64 %d2, %d2, %d1; @%p1 st.global.u32 [%d2], %r1;"
    assert traffic(body, "global store", block=64) == (2, 40, 160)


@pytest.mark.parametrize(
    ("stride", "width", "ways"),
    [
        *[(2, 2, 1), (4, 4, 1), (0, 4, 1), (8, 4, 2), (128, 4, 32), (132, 4, 1)],
        *[(8, 8, 1), (0, 8, 1), (16, 8, 2), (128, 8, 16)],
        *[(16, 16, 1), (0, 16, 1), (32, 16, 2), (128, 16, 8), (144, 16, 1)],
    ],
)
@pytest.mark.parametrize("op", ["ld", "st"])
def test_cycles_and_conflicts_of_shared_memory(op, stride, width, ways):
    """32 banks of 4 bytes; accesses of 8 and 16 bytes are served by halves and quarters of a warp. Cycles over those
    without conflicts, and the worst of the parts of a warp that are served at once."""
    kind, names = {
        2: ("u16", "%h1"),
        4: ("u32", "%r5"),
        8: ("v2.u32", "{%r5, %r6}"),
        16: ("v4.u32", "{%r5, %r6, %r7, %r8}"),
    }[width]
    access = f"ld.shared.{kind} {names}, [%r2];" if op == "ld" else f"st.shared.{kind} [%r2], {names};"
    body = f"{HEAD} mov.u16 %h1, 0; mov.u32 %r5, 0; mov.u32 %r6, 0; mov.u32 %r7, 0; mov.u32 %r8, 0;"
    program = kernel(f"{body} mul.lo.s32 %r2, %r1, {stride}; {access}")
    report = run(program, [np.zeros(1)], shared=1 << 13, check=False)
    total, least = report.total("shared" if op == "ld" else "shared store"), max(width // 4, 1)
    assert (total.requests, total.bytes) == (1, 32 * width)
    assert (total.least, total.sectors, total.worst) == (least, least * ways, ways)


@pytest.mark.parametrize(("pitch", "cycles"), [(16, 4), (128, 32), (144, 4)])
def test_cycles_of_ldmatrix(pitch, cycles):
    """Each matrix is served at once: 8 rows of 16 bytes."""
    body = f"mul.lo.s32 %r2, %r1, {pitch}; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r5, %r6, %r7, %r8}}, [%r2];"
    assert traffic(body, "shared") == (1, cycles, 512)


@pytest.mark.parametrize(("stride", "words", "ways"), [(144, 8, 1), (208, 12, 2), (192, 12, 1)])
def test_bank_conflicts_at_the_end_of_a_row(stride, words, ways):
    body = f"mul.lo.s32 %r2, %r1, {-(-1024 // words)}; shr.u32 %r2, %r2, 10; mul.lo.s32 %r3, %r2, {words};"
    body += f"sub.s32 %r3, %r1, %r3; mul.lo.s32 %r2, %r2, {stride}; mul.lo.s32 %r3, %r3, 16; add.s32 %r2, %r2, %r3;"
    report = run(kernel(HEAD + body + "st.shared.v4.u32 [%r2], {%r1, %r1, %r1, %r1};"), [np.zeros(1)], shared=1 << 12)
    assert report.total("shared store").worst == ways


def test_lanes_that_skip_an_iteration_do_not_meet():
    """Each lane leaves out one round of four, in which the others share a line of 128 bytes."""
    body = "and.b32 %r2, %r1, 3; mul.wide.u32 %d1, %r1, 4; add.s64 %d1, %d1, %d30;"
    for n in range(4):
        body += (
            f"setp.ne.s32 %p1, %r2, {n}; @%p1 st.global.u32 [%d1+{128 * n}], %r1; @%p1 st.shared.u32 [{128 * n}], %r1;"
        )
    report = run(kernel(HEAD + body), [aligned(512)], shared=512, check=False)
    total, shared = report.total("global store"), report.total("shared store")
    assert (total.requests, total.bytes, total.sectors) == (4, 4 * 24 * 4, 4 * 4)
    assert (shared.requests, shared.worst) == (4, 1)


def test_sectors_are_told_by_address():
    """Three warps read 128 bytes each, the last two the same; of a fourth all lanes read one word."""
    body = "shr.u32 %r2, %r1, 5; and.b32 %r3, %r1, 31; min.u32 %r4, %r2, 1; mul.wide.u32 %d1, %r3, 4;"
    body += "mul.wide.u32 %d2, %r4, 128; add.s64 %d1, %d1, %d2; setp.eq.s32 %p1, %r2, 3; @%p1 mov.b64 %d1, 512;"
    body += "add.s64 %d1, %d1, %d30; ld.global.u32 %r5, [%d1]; st.global.u32 [%d1+1024], %r5;"
    data = aligned(2048)
    report = run(kernel(HEAD + body), [data], block=128, check=False)
    start = data.ctypes.data
    assert report.loads.within(start, start + 128) == (1, 128, 4, 4)
    assert report.loads.within(start, start + 256) == (3, 384, 12, 8)
    assert report.loads.within(start, start + 1024) == (4, 388, 13, 9)
    assert report.loads.within(start + 1024, start + 2048) == (0, 0, 0, 0)
    assert report.stores.within(0, 1 << 62) == (4, 388, 13, 9)
    assert report.loads.within(start + 512, start + 544) == (1, 4, 1, 1)
    assert sum(report.warps.values()) == 4


def aligned(size):
    """Bytes that begin at a sector."""
    raw = np.zeros(size + 32, np.uint8)
    return raw[-raw.ctypes.data % 32 :][:size]


def test_traffic_is_told_by_instruction():
    body = (
        HEAD + "mul.wide.u32 %d1, %r1, 4; add.s64 %d2, %d1, %d30; ld.global.u32 %r2, [%d2]; st.global.u32 [%d2], %r2;"
    )
    report = run(kernel(body), [np.zeros(64, np.uint32)], block=64)
    assert {(space, text.split()[0]) for space, _, text in report.traffic} == {
        ("global", "ld.global.u32"),
        ("global store", "st.global.u32"),
    }
    assert report.total("global").requests == 4
    assert report.total("global store").requests == 2


ATOMICS = {
    "add.u32": lambda old, new: old + new,
    "min.s32": min,
    "max.u32": max,
    "and.b32": int.__and__,
    "or.b32": int.__or__,
    "xor.b32": int.__xor__,
    "exch.b32": lambda old, new: new,
}


@pytest.mark.parametrize("op", ATOMICS)
@pytest.mark.parametrize("space", ["global", "shared"])
def test_atomics_take_turns(op, space):
    """Four threads have a word each; the first eight threads have none."""
    results, words = np.zeros(64, np.uint32), np.full(16, 5, np.uint32)
    address = "%d3" if space == "global" else "%r4"
    body = f"""{HEAD}
    shr.u32 %r3, %r1, 2; shl.b32 %r4, %r3, 2; mul.wide.u32 %d3, %r3, 4; add.s64 %d3, %d3, %d31;
    mul.wide.u32 %d1, %r1, 4; add.s64 %d2, %d1, %d30; mov.u32 %r5, 5; st.shared.u32 [%r4], %r5; bar.sync 0;
    setp.ge.u32 %p1, %r1, 8;
    @%p1 atom.{space}.acq_rel.gpu.{op} %r2, [{address}], %r1;
    bar.sync 0;
    ld.{space}.u32 %r6, [{address}]; bar.sync 0; st.global.u32 [%d2], %r2; st.global.u32 [%d3], %r6;
    """
    run(kernel(body, 2), [results, words], block=64, shared=64)
    old = 5
    for thread in range(8, 64):
        old = 5 if thread % 4 == 0 else old
        assert results[thread] == old
        old = ATOMICS[op](old, thread)
        assert thread % 4 < 3 or words[thread // 4] == old
    assert words[:2].tolist() == [5, 5]


def test_compare_and_swap_replaces_what_is_equal():
    results, words = np.zeros(32, np.uint32), np.zeros(1, np.uint32)
    body = f"{HEAD} mul.wide.u32 %d1, %r1, 4; add.s64 %d2, %d1, %d30; add.s32 %r3, %r1, 1;"
    body += "atom.global.cas.b32 %r2, [%d31], %r1, %r3; st.global.u32 [%d2], %r2;"
    run(kernel(body, 2), [results, words], block=32)
    assert results.tolist() == list(range(32))
    assert words[0] == 32


@pytest.mark.parametrize(
    ("instruction", "dtype", "sums"),
    [
        ("add.noftz.f16 [%d30], %h1", np.float16, [32, 0]),
        ("add.noftz.f16x2 [%d30], %r2", np.float16, [32, 64]),
        ("add.f32 [%d30], %f1", np.float32, [48, 0]),
        ("add.v2.f32 [%d30], {%f1, %f2}", np.float32, [48, -64]),
    ],
)
def test_atomic_sums_of_floats(instruction, dtype, sums):
    output = np.zeros(2, dtype)
    numbers = "mov.b16 %h1, 0x3C00; mov.b32 %r2, 0x40003C00; mov.f32 %f1, 0f3FC00000; mov.f32 %f2, 0fC0000000;"
    run(kernel(f"{numbers} red.global.{instruction};"), [output], block=32)
    assert output.tolist() == sums
