"""Loads and stores of every width, and the traffic they make."""

import numpy as np
import pytest
from ptx_programs import kernel, run

random = np.random.default_rng(4)
HEAD = "mov.u32 %r1, %tid.x;\n"
WIDTHS = [
    ("u8", 1),
    ("u16", 1),
    ("u32", 1),
    ("u64", 1),
    ("v2.u16", 2),
    ("v4.u8", 4),
    ("v2.u32", 2),
    ("v4.u32", 4),
    ("v4.f32", 4),
]


@pytest.mark.parametrize(("kind", "count"), WIDTHS)
@pytest.mark.parametrize("watched", [True, False])
def test_every_width_through_shared_memory(kind, count, watched):
    size = int(kind[-2:].lstrip("u")) // 8
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
    found = np.zeros_like(data)
    run(kernel(body, 2), [data, found], block=64, shared=64 * whole)
    assert (found == data[np.arange(64) ^ 33]).all()


def test_narrow_loads_are_extended():
    data = np.array([0x80, 0xFF, 0x7F, 1], np.uint8)
    for kind, expected in (("u8", [128, 255, 127, 1]), ("s8", [-128, -1, 127, 1])):
        body = f"{HEAD}cvt.u64.u32 %d1, %r1; add.s64 %d2, %d1, %d30; ld.global.{kind} %r2, [%d2];"
        body += "mul.wide.u32 %d1, %r1, 4; add.s64 %d3, %d1, %d31; st.global.u32 [%d3], %r2;"
        found = np.zeros(4, np.int32)
        run(kernel(body, 2), [data, found], block=4)
        assert found.tolist() == expected


def traffic(body, space, block=32, size=1 << 14):
    report = run(kernel(HEAD + body), [np.zeros(size, np.uint8)], block=block, shared=size, check=False)
    total = report.total(space)
    return total.requests, total.sectors, total.bytes


@pytest.mark.parametrize(
    ("stride", "width", "sectors"),
    [(4, 4, 4), (8, 4, 8), (32, 4, 32), (64, 4, 32), (0, 4, 1), (16, 16, 16), (32, 16, 32), (2, 2, 2)],
)
def test_sectors_of_global_memory(stride, width, sectors):
    """Of one warp: 32 bytes each. The array is aligned to a sector at least half of it."""
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
    ("stride", "width", "cycles"),
    [
        (4, 4, 1),
        (8, 4, 2),
        (128, 4, 32),
        (132, 4, 1),
        (0, 4, 1),
        (16, 16, 4),
        (32, 16, 8),
        (8, 8, 2),
        (128, 16, 32),
        (0, 8, 2),
        (0, 16, 4),
        (2, 2, 1),
    ],
)
def test_cycles_of_shared_memory(stride, width, cycles):
    """32 banks of 4 bytes. Accesses of 8 and 16 bytes are served by halves and quarters of a warp."""
    kind = {2: "u16 %h1", 4: "u32 %r5", 8: "v2.u32 {%r5, %r6}", 16: "v4.u32 {%r5, %r6, %r7, %r8}"}[width]
    body = f"mul.lo.s32 %r2, %r1, {stride}; ld.shared.{kind}, [%r2];"
    assert traffic(body, "shared") == (1, cycles, 32 * width)


@pytest.mark.parametrize(("pitch", "cycles"), [(16, 4), (128, 32), (144, 4)])
def test_cycles_of_ldmatrix(pitch, cycles):
    """Each matrix is served at once: 8 rows of 16 bytes."""
    body = f"mul.lo.s32 %r2, %r1, {pitch}; ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r5, %r6, %r7, %r8}}, [%r2];"
    assert traffic(body, "shared") == (1, cycles, 512)


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
