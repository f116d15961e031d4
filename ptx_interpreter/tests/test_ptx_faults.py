"""Faults of memory accesses are reported with line, thread and detail; right accesses are not."""

import ctypes

import numpy as np
import pytest
from ptx_programs import faults, kernel, run

from ptx_interpreter import Faults, GlobalMemory, Unsupported, launch

HEAD = "mov.u32 %r1, %tid.x; mul.wide.u32 %d1, %r1, 4; add.s64 %d2, %d1, %d30; shl.b32 %r3, %r1, 2;\n"
WORDS = np.zeros(64, np.uint32)


def fault_kinds(body, block=64, shared=256, count=64):
    return faults(kernel(HEAD + body), [np.zeros(count, np.uint32)], block=block, shared=shared)


# --- global memory ------------------------------------------------------------------------------------------------


def test_out_of_bounds_of_global_memory():
    output = np.arange(60, dtype=np.uint32)
    report = run(kernel(HEAD + "st.global.u32 [%d2], %r1;"), [output], block=64, check=False)
    (fault,) = report.faults
    assert (fault.kind, fault.thread, fault.count) == ("out of bounds", 60, 4)
    assert "store of 4 bytes 0 bytes past the end of p0 (240 bytes)" in fault.detail
    assert "st.global.u32 [%d2], %r1" in str(fault)
    arrays = [np.zeros(64, np.uint32) for _ in range(20)]
    first, last = sorted(arrays, key=lambda array: array.ctypes.data)[9:11]
    report = run(kernel(HEAD + "ld.global.u32 %r2, [%d31+-4];", 2), [first, last], check=False)
    assert "4 bytes before p1 (256 bytes)" in report.faults[0].detail
    assert fault_kinds("ld.global.u32 %r2, [%d2];", count=60) == ["out of bounds"]
    assert fault_kinds("ld.global.u32 %r2, [%d2+-4];") == ["out of bounds"]
    assert fault_kinds("ld.global.u32 %r2, [%d2];") == []


def test_what_is_out_of_bounds_is_not_touched():
    whole = np.arange(64, dtype=np.uint32)
    half = whole[:32]
    run(kernel(HEAD + "mov.u32 %r2, 9; st.global.u32 [%d2], %r2;"), [half], block=64, check=False)
    assert whole.tolist() == [9] * 32 + list(range(32, 64))


def test_faults_are_raised():
    with pytest.raises(Faults, match=r"out of bounds at PTX:\d+, `ld.global.u32 %r2, \[%d2\]`, thread 60 of block 0"):
        run(kernel(HEAD + "ld.global.u32 %r2, [%d2];"), [WORDS[:60]], block=64)


def test_misaligned_accesses():
    assert fault_kinds("ld.global.u64 %d3, [%d2];", block=32) == ["misaligned"]
    assert fault_kinds("add.s64 %d2, %d30, 8; ld.global.v4.u32 {%r4, %r5, %r6, %r7}, [%d2];") == ["misaligned"]
    assert fault_kinds("st.shared.v2.u32 [%r3], {%r1, %r1};", block=32) == ["misaligned"]


def two_blocks(body, **options):
    """Faults of a launch of two blocks of 64 threads, which have their block in %r5."""
    memory, array = GlobalMemory(), np.zeros(64, np.uint32)
    params = memory.add(array, "sums", **options).to_bytes(8, "little")
    report = launch(kernel(HEAD + "mov.u32 %r5, %ctaid.x;" + body), (2,), (64,), params, memory, check=False)
    return report.faults


def test_copies_of_a_value_are_no_race():
    """Two warps read the same words, and the first one writes them: compilers let one holder of a value write it."""
    body = "and.b32 %r4, %r1, 31; mul.wide.u32 %d1, %r4, 4; add.s64 %d2, %d1, %d30; ld.global.u32 %r2, [%d2];"
    assert fault_kinds(body + "setp.lt.u32 %p1, %r1, 32; @%p1 st.global.u32 [%d2], %r2;") == []
    assert fault_kinds(body + "setp.ge.u32 %p1, %r1, 32; @%p1 st.global.u32 [%d2], %r2;") == ["race"]


def test_races_between_blocks():
    private = (
        "mul.wide.u32 %d3, %r5, 128; add.s64 %d3, %d3, %d30; setp.ge.u32 %p1, %r1, 32; @%p1 ret; add.s64 %d4, %d3, %d1;"
    )
    assert not two_blocks(private + "st.global.u32 [%d4], %r1; ld.global.u32 %r2, [%d4];")
    (fault,) = two_blocks("st.global.u32 [%d2], %r1;")
    assert (fault.kind, fault.count) == ("race", 64)
    assert "sums" in fault.detail
    written_then_read = "setp.eq.s32 %p1, %r5, 0; @%p1 st.global.u32 [%d2], %r1; @!%p1 ld.global.u32 %r2, [%d2];"
    assert [fault.kind for fault in two_blocks(written_then_read)] == ["race"]
    read_then_written = "setp.eq.s32 %p1, %r5, 0; @%p1 ld.global.u32 %r2, [%d2]; @!%p1 st.global.u32 [%d2], %r1;"
    assert [fault.kind for fault in two_blocks(read_then_written)] == ["race"]
    assert not two_blocks("ld.global.u32 %r2, [%d2];")


@pytest.mark.parametrize(("barrier", "expected"), [("", ["race"]), ("bar.sync 0;", [])])
@pytest.mark.parametrize("first", ["st.global.u32 [%d2], %r1;", "ld.global.u32 %r4, [%d2];"])
def test_global_memory_race_within_a_block(first, barrier, expected):
    """The second warp writes where the first one has written or read."""
    body = f"setp.lt.u32 %p1, %r1, 32; @%p1 {first} {barrier} @!%p1 st.global.u32 [%d2+-128], %r1;"
    assert fault_kinds(body) == expected
    if first.startswith("st"):
        assert fault_kinds(body.replace("st.global.u32 [%d2+-128], %r1", "ld.global.u32 %r4, [%d2+-128]")) == expected


ADD = "red.global.relaxed.gpu.add.u32 [%d2], %r1;"


def test_atomics_race_with_plain_accesses_alone():
    assert not two_blocks(ADD)
    for plain in ("st.global.u32 [%d2], %r1;", "ld.global.u32 %r2, [%d2];"):
        for first, second in ((ADD, plain), (plain, ADD)):
            output = two_blocks(f"setp.eq.s32 %p1, %r5, 0; @%p1 {first} @!%p1 {second}")
            assert [fault.kind for fault in output] == ["race"]
    assert [fault.kind for fault in two_blocks(ADD, written=False)] == ["uninitialised"]


def test_shared_atomics_race_with_plain_accesses():
    zeroed, add = "st.shared.u32 [%r3], 0; bar.sync 0; mov.u32 %r3, 0;", "atom.shared.add.u32 %r2, [%r3], 1;"
    assert fault_kinds(f"{zeroed} {add} bar.sync 0; ld.shared.u32 %r2, [%r3];") == []
    for plain in ("st.shared.u32 [%r3], 5;", "ld.shared.u32 %r2, [%r3];"):
        for first, second in ((add, plain), (plain, add)):
            output = fault_kinds(f"{zeroed} setp.lt.u32 %p1, %r1, 32; @%p1 {first} @!%p1 {second}")
            assert set(output) == {"race"}, (first, second)
    assert fault_kinds(add) == ["uninitialised"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("mov.u32 %r4, 9;", None),
        ("mov.u32 %r4, %r1;", "something else"),
        ("add.u32 %r4, %r1, 0x3F800000;", "nearly the same"),
        ("shl.b32 %r4, %r1, 17; add.u32 %r4, %r4, 0x3F800000;", "something else"),
        ("and.b32 %r4, %r1, 1; add.u32 %r4, %r4, 0x40003F80;", "nearly the same"),  # two bfloat16
    ],
)
@pytest.mark.parametrize("space", ["global", "shared"])
def test_threads_that_store_to_one_address(space, value, expected):
    address = {"global": "[%d30]", "shared": "[0]"}[space]
    report = run(kernel(HEAD + value + f"st.{space}.u32 {address}, %r4;"), [WORDS], block=64, shared=4, check=False)
    assert [fault.kind for fault in report.faults] == ["race"] * bool(expected)
    assert all(expected in fault.detail for fault in report.faults)


@pytest.mark.parametrize(("order", "expected"), [("acq_rel", []), ("relaxed", ["race"])])
def test_a_lock_orders_blocks(order, expected):
    body = f"""
    LOCK: setp.eq.s32 %p1, %r1, 0; @%p1 atom.global.{order}.gpu.cas.b32 %r2, [%d30+4], 0, 1;
    @%p1 st.shared.u32 [0], %r2;
    bar.sync 0; ld.shared.u32 %r2, [0]; bar.sync 0; setp.ne.s32 %p2, %r2, 0;
    @%p2 bra LOCK;
    @%p1 ld.global.u32 %r4, [%d30]; add.s32 %r4, %r4, 1; @%p1 st.global.u32 [%d30], %r4;
    @%p1 atom.global.{order}.gpu.exch.b32 %r2, [%d30+4], 0;
    """
    array = np.zeros(2, np.uint32)
    output = faults(kernel(HEAD + body), [array], grid=3, block=64, shared=16)
    assert sorted(set(output)) == expected
    assert array.tolist() == [3, 0]


def test_one_launch_is_ordered_after_another():
    memory, array = GlobalMemory(), np.zeros(64, np.uint32)
    params = memory.add(array, "sums", written=False).to_bytes(8, "little")
    launch(kernel(HEAD + "st.global.u32 [%d2], %r1;"), (1,), (64,), params, memory)
    launch(kernel(HEAD + "ld.global.u32 %r2, [%d2];"), (3,), (64,), params, memory)
    assert array.tolist() == list(range(64))


def test_global_memory_that_nobody_has_written():
    kinds = [fault.kind for fault in two_blocks("ld.global.u32 %r2, [%d2];", written=False)]
    assert kinds == ["uninitialised"]


def test_bytes_of_one_word_have_their_own_writers():
    """Blocks that write neighbouring elements of 2 bytes are no race."""
    array = np.zeros(2, np.uint16)
    body = "mov.u32 %r1, %ctaid.x; mul.wide.u32 %d1, %r1, 2; add.s64 %d2, %d1, %d30; st.global.u16 [%d2], %h1;"
    assert faults(kernel(body), [array], grid=2, block=1) == []


def test_addresses_of_parameters_in_registers():
    body = "mov.b64 %d5, p0; ld.param.u64 %d6, [%d5+8]; st.global.u64 [%d30], %d6; ld.param.u32 %r2, [%d5+4];"
    array = np.zeros(1, np.uint64)
    run(kernel(body, 2), [array, WORDS], block=1)
    assert array[0] == WORDS.__array_interface__["data"][0]
    assert faults(kernel(body, 1), [array], block=1) == ["out of bounds"]


# --- shared memory ------------------------------------------------------------------------------------------------


def test_out_of_bounds_of_shared_memory():
    assert fault_kinds("st.shared.u32 [%r3], %r1;", shared=252) == ["out of bounds"]
    assert fault_kinds("st.shared.u32 [%r3+-4], %r1;") == ["out of bounds"]
    assert fault_kinds("st.shared.u32 [%r3], %r1;") == []


def test_shared_memory_that_nobody_has_written():
    """It is NaN in every format, so that wrong numbers come of it too."""
    output = np.zeros(32, np.uint32)
    body = HEAD + "ld.shared.u32 %r2, [%r3+128]; st.global.u32 [%d2], %r2; st.shared.u32 [%r3+128], %r1;"
    for _ in range(2):
        (fault,) = run(kernel(body), [output], block=32, shared=256, check=False).faults
        assert (fault.kind, fault.count) == ("uninitialised", 32)
        assert "byte 128" in fault.detail
        assert (output == 0xFFFFFFFF).all()


def test_blocks_do_not_see_what_others_left():
    body = HEAD + "mov.u32 %r5, %ctaid.x; setp.eq.s32 %p1, %r5, 0;"
    body += "@%p1 st.shared.u32 [%r3], %r1; @!%p1 ld.shared.u32 %r2, [%r3];"
    for block in (32, 8192):  # blocks that run together, and one after the other
        output = faults(kernel(body), [WORDS], grid=2, block=block, shared=4 * block)
        assert output == ["uninitialised"]


EXCHANGE = """
st.shared.u32 [%r3], %r1;
{barrier}
xor.b32 %r4, %r1, {distance}; shl.b32 %r4, %r4, 2; ld.shared.u32 %r2, [%r4];
"""


@pytest.mark.parametrize(
    ("barrier", "same_warp", "other_warp"),
    [("", ["race"], ["race"]), ("bar.warp.sync -1;", [], ["race"]), ("bar.sync 0;", [], [])],
)
def test_reads_race_with_writes_and_writes_with_reads(barrier, same_warp, other_warp):
    """Another lane of the warp (1) and another warp (32) race; a thread (0) doesn't with itself."""
    for distance, expected in ((0, []), (1, same_warp), (32, other_warp)):
        assert fault_kinds(EXCHANGE.format(barrier=barrier, distance=distance)) == expected
        body = EXCHANGE.format(barrier="bar.sync 0;", distance=distance) + barrier + "st.shared.u32 [%r3], %r2;"
        assert fault_kinds(body) == expected


def test_a_race_is_told_with_both_threads():
    body = "setp.eq.s32 %p1, %r1, 40; @%p1 st.shared.u32 [0], %r1;\n.loc 1 77 0\n"
    body += "setp.eq.s32 %p2, %r1, 3; @%p2 ld.shared.u32 %r2, [0];"
    program = kernel(HEAD + body, head='.file 1 "a/b.cu"')
    (fault,) = run(program, [WORDS], block=64, shared=16, check=False).faults
    assert (fault.kind, fault.where, fault.thread) == ("race", "b.cu:77", 3)
    assert "thread 40 wrote it" in fault.detail


def test_three_readers_of_different_warps():
    """The writer is of the warp that read last, and comes after its barrier; one of the others is still known."""
    body = """
    setp.eq.s32 %p1, %r1, 0; @%p1 st.shared.u32 [0], %r1;
    bar.sync 0;
    ld.shared.u32 %r2, [0];
    bar.warp.sync -1;
    setp.eq.s32 %p1, %r1, 65; @%p1 st.shared.u32 [0], %r1;
    """
    assert fault_kinds(body, block=96, shared=16, count=96) == ["race"]


@pytest.mark.parametrize(("barrier", "expected"), [("", ["race"]), ("bar.warp.sync -1;", [])])
def test_two_readers_of_a_warp(barrier, expected):
    """The one that writes has read last."""
    body = "mov.u32 %r2, 7; st.shared.u32 [0], %r2; bar.warp.sync -1; setp.eq.s32 %p1, %r1, 9; setp.eq.s32 %p2, %r1, 4;"
    body += "@%p1 ld.shared.u32 %r4, [0]; @%p2 ld.shared.u32 %r4, [0];" + barrier + "@%p2 st.shared.u32 [0], %r2;"
    assert fault_kinds(body, block=32) == expected


def test_several_threads_may_write_the_same():
    assert fault_kinds("st.shared.u32 [0], 5;", block=32, shared=16) == []
    assert fault_kinds("st.shared.u32 [0], %r1;", block=32, shared=16) == ["race"]


def test_ldmatrix_source_overwritten_after_a_barrier():
    """All lanes execute it at once, but its reads are weak: a barrier of the warp orders what another lane writes."""
    body = """
    and.b32 %r5, %r1, 31; shl.b32 %r6, %r5, 4; and.b32 %r7, %r1, 32; {private}
    st.shared.v4.u32 [%r6], {{%r1, %r1, %r1, %r1}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r10, %r11, %r12, %r13}}, [%r6];
    {barrier} xor.b32 %r6, %r6, {distance};
    st.shared.v4.u32 [%r6], {{%r1, %r1, %r1, %r1}};
    """
    private = "shl.b32 %r7, %r7, 4; add.s32 %r6, %r6, %r7;"
    for barrier, distance, expected in [
        ("", 0, []),
        ("", 16, ["race"]),
        ("bar.warp.sync -1;", 16, []),
        ("bar.warp.sync -1;", 512, ["race"]),
        ("bar.sync 0;", 512, []),
    ]:
        assert fault_kinds(body.format(private=private, barrier=barrier, distance=distance), shared=1024) == expected


WGMMA = """
mov.u32 %r2, 0; shl.b32 %r3, %r1, 4; setp.ne.s32 %p2, %r2, 0; mov.b64 %d5, {descriptor};
{store}
{barrier}
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%f1, %f2, %f3, %f4}}, %d5, %d5, %p2, 1, 1, 0, 0;
"""
FILL = "st.shared.v4.u32 [%r3], {%r2, %r2, %r2, %r2};"
ROWS = 128 >> 4 << 16 | 256 >> 4 << 32  # 8 rows of 16 bytes after the other


@pytest.mark.parametrize(
    ("store", "barrier", "descriptor", "expected"),
    [
        (FILL, "bar.sync 0;", ROWS, []),
        (FILL, "bar.warp.sync -1;", ROWS, ["race"]),
        ("", "bar.sync 0;", ROWS, ["uninitialised"]),
        (FILL, "bar.sync 0;", ROWS + (16 >> 4), ["out of bounds"]),
    ],
)
def test_wgmma_reads_what_its_descriptor_tells(store, barrier, descriptor, expected):
    body = WGMMA.format(store=store, barrier=barrier, descriptor=descriptor)
    assert fault_kinds(body, block=128, shared=2048, count=128) == expected


def test_descriptors_with_a_base_offset_are_refused():
    body = WGMMA.format(store=FILL, barrier="bar.sync 0;", descriptor=ROWS | 1 << 49)
    with pytest.raises(Unsupported, match=r"a base offset in `wgmma.*` at PTX:\d+"):
        fault_kinds(body, block=128, shared=2048, count=128)


COPY = """
shl.b32 %r3, %r1, 4; mul.wide.u32 %d1, %r1, 16; add.s64 %d2, %d1, %d30;
cp.async.cg.shared.global [%r3], [%d2], 16{amount};
cp.async.commit_group;
add.s32 %r4, %r3, 1024; cp.async.cg.shared.global [%r4], [%d2], 16;
cp.async.commit_group;
{wait}
ld.shared.v4.u32 {{%r10, %r11, %r12, %r13}}, [%r3+{offset}];
st.global.v4.u32 [%d2], {{%r13, %r12, %r11, %r10}};
"""


@pytest.mark.parametrize(
    ("wait", "offset", "expected"),
    [
        ("", 0, ["not waited for"]),
        ("cp.async.wait_group 2;", 0, ["not waited for"]),
        ("cp.async.wait_group 1;", 0, []),
        ("cp.async.wait_group 1;", 1024, ["not waited for"]),
        ("cp.async.wait_group 0;", 1024, []),
        ("cp.async.wait_all;", 1024, []),
    ],
)
def test_copies_that_are_not_waited_for(wait, offset, expected):
    array = np.arange(256, dtype=np.uint32)
    program = kernel(HEAD + COPY.format(wait=wait, offset=offset, amount=""))
    assert faults(program, [array], block=64, shared=2048) == expected
    if not expected:
        assert (array.reshape(-1, 4) == np.arange(256).reshape(-1, 4)[:, ::-1]).all()


def test_copies_of_nothing_are_zeros():
    """They read nothing either: the addresses of the upper half of the threads are out of bounds."""
    array, output = np.arange(128, dtype=np.uint32), np.full((64, 4), 7, np.uint32)
    body = """
    setp.lt.u32 %p1, %r1, 32; selp.b32 %r9, 16, 0, %p1;
    shl.b32 %r3, %r1, 4; mul.wide.u32 %d1, %r1, 16; add.s64 %d2, %d1, %d30; add.s64 %d3, %d1, %d31;
    cp.async.cg.shared.global [%r3], [%d2], 16, %r9;
    cp.async.wait_all;
    ld.shared.v4.u32 {%r10, %r11, %r12, %r13}, [%r3];
    st.global.v4.u32 [%d3], {%r10, %r11, %r12, %r13};
    """
    run(kernel(HEAD + body, 2), [array, output], block=64, shared=1024)
    assert (output[:32] == array.reshape(-1, 4)).all()
    assert (output[32:] == 0).all()


def test_other_threads_need_a_barrier_after_the_wait():
    body = COPY.format(wait="cp.async.wait_all; {barrier} xor.b32 %r3, %r3, 512;", offset=0, amount="")
    body = body.replace("st.global.v4.u32", "// ")
    for barrier, expected in (("", ["race"]), ("bar.sync 0;", [])):
        program = kernel(HEAD + body.replace("{barrier}", barrier))
        assert faults(program, [np.arange(256, dtype=np.uint32)], block=64, shared=2048) == expected


def test_without_the_watch_only_addresses_are_checked():
    memory, array = GlobalMemory(), np.zeros(64, np.uint32)
    params = memory.add(array).to_bytes(8, "little")
    racing = kernel(HEAD + EXCHANGE.format(barrier="", distance=32))
    assert launch(racing, (1,), (64,), params, memory, 256, watch=False).faults == []
    outside = kernel(HEAD + "ld.shared.u32 %r2, [%r3];")
    with pytest.raises(Faults, match="out of bounds"):
        launch(outside, (1,), (64,), params, memory, 128, watch=False)


# --- which memory may be touched ----------------------------------------------------------------------------------


def test_threads_may_access_several_arrays_at_once():
    """Even ones the first array and odd ones the second; both are watched."""
    first, second = np.zeros(64, np.uint32), np.zeros(64, np.uint32)
    body = (
        HEAD
        + """
    and.b32 %r4, %r1, 1; setp.eq.s32 %p1, %r4, 0; selp.b64 %d3, %d30, %d31, %p1; add.s64 %d2, %d3, %d1;
    st.global.u32 [%d2], %r1;
    """
    )
    assert faults(kernel(body, 2), [first, second], block=64) == []
    assert (first + second).tolist() == list(range(64))
    assert not first[1::2].any()
    assert not second[::2].any()
    assert faults(kernel(body, 2), [first, second], block=64, grid=2) == ["race"]
    assert faults(kernel(body, 2), [first, second[:60]], block=64) == ["out of bounds"]


def test_memory_may_be_open_or_forgotten():
    memory, array = GlobalMemory(), np.zeros(64, np.uint32)
    program = kernel(HEAD + "st.global.u32 [%d2], %r1;")
    params = array.__array_interface__["data"][0].to_bytes(8, "little")
    with pytest.raises(Faults, match="where no array is"):
        launch(program, (1,), (64,), params, memory)
    memory.anywhere = True
    launch(program, (1,), (64,), params, memory)
    assert array.tolist() == list(range(64))
    memory.anywhere = False
    memory.remove(memory.add(array))
    with pytest.raises(Faults, match="out of bounds"):
        launch(program, (1,), (64,), params, memory)


def test_allocations_are_those_that_the_library_tells():
    """A refresh forgets what was freed, and leaves alone what was added."""
    memory, added, other = GlobalMemory(), np.zeros(8, np.uint8), np.zeros(64, np.uint32)
    start = other.__array_interface__["data"][0]
    allocated = [(start, start + 256)]

    def allocations(starts, ends, most):
        for n, interval in enumerate(allocated):
            for side, value in zip((starts, ends), interval, strict=True):
                ctypes.cast(side, ctypes.POINTER(ctypes.c_int64))[n] = value
        return len(allocated)

    memory._allocations = allocations
    memory.add(added, "added")
    program = kernel(HEAD + "st.global.u32 [%d2], %r1;")
    launch(program, (1,), (64,), start.to_bytes(8, "little"), memory)
    assert other[63] == 63
    allocated.clear()
    with pytest.raises(Faults, match="out of bounds"):
        launch(program, (1,), (64,), start.to_bytes(8, "little"), memory)
    assert [interval.name for interval in memory.intervals] == ["added"]
