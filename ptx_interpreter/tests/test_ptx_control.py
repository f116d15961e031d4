"""Control flow: who runs what, who meets again where, and what the lanes of a warp tell each other."""

from functools import reduce

import numpy as np
import pytest
from ptx_programs import faults, kernel, run

from ptx_interpreter import Unsupported, machine

HEAD = "mov.u32 %r1, %tid.x; mul.wide.u32 %d1, %r1, 4; add.s64 %d2, %d1, %d30;\n"
STORE = "\nst.global.u32 [%d2], %r2;\n"


def result(body, block=64):
    """%r2 of each thread."""
    output = np.zeros(block, np.uint32)
    run(kernel(HEAD + body + STORE), [output], block=block)
    return output.tolist()


def test_branch_diverges_and_reconverges():
    """After it all are there again: ldmatrix and shuffles need it, and each instruction is counted once for each."""
    body = """
    and.b32 %r3, %r1, 1; setp.eq.s32 %p1, %r3, 0;
    mov.u32 %r2, 5;
    @%p1 bra EVEN;
    add.s32 %r2, %r1, 100;
    bra.uni DONE;
    EVEN: add.s32 %r2, %r1, 200;
    DONE: shfl.sync.bfly.b32 %r4|%p2, %r2, 1, 31, -1;
    mov.u32 %r2, %r4;
    """
    assert result(body) == [n + 1 + 100 if n % 2 == 0 else n - 1 + 200 for n in range(64)]


def test_registers_of_idle_threads_keep_what_they_have():
    """Registers that outlive a block keep their values, whatever the threads of the other branch write."""
    body = """
    mov.u32 %r2, %r1; mov.u32 %r3, 0;
    setp.lt.u32 %p1, %r1, 40;
    @%p1 bra LOW;
    add.s32 %r4, %r1, 1000; mul.lo.s32 %r2, %r4, 2; cvt.rn.f32.s32 %f1, %r4;
    mov.b64 %d3, {%r4, %r2}; mov.b64 {%r2, %r5}, %d3; selp.b32 %r3, %r2, %r4, %p1; cvt.rzi.s32.f32 %r3, %f1;
    LOW: add.s32 %r2, %r2, %r3;
    """
    assert result(body) == [n if n < 40 else 2 * (n + 1000) for n in range(64)]


def test_loops_of_different_lengths():
    """Each thread sums 1 to its own number."""
    body = """
    mov.u32 %r2, 0; mov.u32 %r3, 0;
    LOOP: setp.ge.u32 %p1, %r3, %r1;
    @%p1 bra END;
    add.s32 %r3, %r3, 1; add.s32 %r2, %r2, %r3;
    bra LOOP;
    END:
    """
    assert result(body) == [n * (n + 1) // 2 for n in range(64)]


def test_guards():
    body = """
    setp.lt.u32 %p1, %r1, 20; setp.lt.u32 %p2, %r1, 0;
    mov.u32 %r2, 7;
    @%p1 mov.b32 %r2, 8;
    @!%p1 add.s32 %r2, %r2, %r1;
    @%p2 mov.u32 %r2, 99;
    @%p1 st.global.u32 [%d2], %r1;
    @%p1 ret;
    """
    assert result(body) == [n if n < 20 else 7 + n for n in range(64)]


def test_a_guard_is_for_those_who_are_there():
    body = """
    mov.u32 %r2, 7; setp.lt.u32 %p1, %r1, 20; and.b32 %r3, %r1, 1; setp.eq.s32 %p2, %r3, 0;
    @%p2 bra EVEN;
    @%p1 mov.u32 %r2, 8;
    @!%p1 mov.u32 %r2, 9;
    EVEN: add.s32 %r2, %r2, 0;
    """
    assert result(body) == [7 if n % 2 == 0 else 8 if n < 20 else 9 for n in range(64)]


def test_a_guarded_value_of_another_block_is_kept():
    body = """
    mov.u32 %r2, 3;
    setp.lt.u32 %p1, %r1, 20;
    bra NEXT;
    NEXT: @%p1 mov.u32 %r2, 4;
    bra LAST;
    LAST: add.s32 %r2, %r2, 0;
    """
    assert result(body) == [4 if n < 20 else 3 for n in range(64)]


def test_threads_and_blocks_have_their_numbers():
    """A grid and blocks of three dimensions; more blocks than run together, the last ones by themselves."""
    names = [f"{name}.{axis}" for name in ("tid", "ctaid", "ntid", "nctaid") for axis in "xyz"] + ["laneid"]
    grid, block = (machine.LANES // 96 // 6 + 2, 3, 2), (7, 5, 2)
    body = "".join(f"mov.u32 %r{n}, %{name};" for n, name in enumerate(names[:6])) + "mov.u32 %r10, 0;\n"
    for n, size in zip((5, 4, 3, 2, 1, 0), (*grid[::-1], *block[::-1]), strict=True):
        body += f"mad.lo.s32 %r10, %r10, {size}, %r{n};\n"
    body += f"mul.wide.u32 %d1, %r10, {4 * len(names)}; add.s64 %d2, %d1, %d30;\n"
    for n, name in enumerate(names):
        body += f"mov.u32 %r10, %{name}; st.global.u32 [%d2+{4 * n}], %r10;\n"
    output = np.zeros((*grid[::-1], *block[::-1], len(names)), np.uint32)
    run(kernel(body), [output], grid=grid, block=block)
    numbers = np.meshgrid(*(np.arange(size) for size in output.shape[:-1]), indexing="ij")[::-1]
    x, y, z = numbers[:3]
    sizes = [np.full_like(x, size) for size in (*block, *grid)]
    assert (output == np.stack([*numbers, *sizes, (x + 7 * y + 35 * z) % 32], -1)).all()


@pytest.mark.parametrize("segment", [0, 24, 28])
@pytest.mark.parametrize("mode", ["bfly", "idx", "up", "down"])
def test_shuffles(mode, segment):
    """The pseudo code of PTX ISA; c has the mask of segments in bits 8 to 12, and the clamp."""
    for b in (0, 1, 2, 5, 16, 31):
        for clamp in (31, 20) if mode != "up" else (0, 9):
            c = segment << 8 | clamp
            body = f"""
            add.s32 %r3, %r1, 1000;
            shfl.sync.{mode}.b32 %r2|%p1, %r3, {b}, {c}, -1;
            selp.b32 %r4, 5000, 0, %p1; add.s32 %r2, %r2, %r4;
            """
            expected = []
            for thread in range(64):
                lane = thread % 32
                last, first = lane & segment | clamp & ~segment & 31, lane & segment
                source = {"bfly": lane ^ b, "up": lane - b, "down": lane + b}.get(mode, first | b & ~segment & 31)
                there = source >= last if mode == "up" else source <= last
                expected.append(1000 + thread - lane + (source if there else lane) + 5000 * there)
            assert result(body) == expected


@pytest.mark.parametrize(
    "meeting", ["shfl.sync.bfly.b32 %r2|%p2, %r4, 16, 31, -1;", "bar.warp.sync -1; mov.u32 %r2, %r4;"]
)
def test_warp_reconverges_from_a_later_address(meeting):
    """Compilers put the code of an unlikely branch behind the block where it ends."""
    body = f"""
    add.s32 %r4, %r1, 100; and.b32 %r5, %r1, 16; setp.ne.s32 %p1, %r5, 0;
    @%p1 bra FAR;
    MEET: {meeting}
    bra END;
    FAR: add.s32 %r4, %r4, 1000;
    bra MEET;
    END:
    """
    values = [n + 100 + (1000 if n & 16 else 0) for n in range(64)]
    assert result(body) == ([values[n ^ 16] for n in range(64)] if "shfl" in meeting else values)


def test_warpgroup_reconverges_from_a_later_address():
    body = """
    mov.u32 %r2, 0; mov.b64 %d5, 0; setp.ge.u32 %p1, %r1, 96; setp.ne.s32 %p2, %r2, 0;
    shl.b32 %r3, %r1, 4; st.shared.v4.u32 [%r3], {%r2, %r2, %r2, %r2};
    bar.sync 0;
    @%p1 bra FAR;
    MEET: wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f1, %f2, %f3, %f4}, %d5, %d5, %p2, 1, 1, 0, 0;
    bra END;
    FAR: add.s32 %r2, %r2, 1;
    bra MEET;
    END:
    """
    output = np.zeros(128, np.uint32)
    run(kernel(HEAD + body + STORE), [output], block=128, shared=2048)
    assert output.tolist() == [0] * 96 + [1] * 32


def test_shuffle_by_a_register():
    body = "xor.b32 %r3, %r1, 3; and.b32 %r3, %r3, 31; shfl.sync.idx.b32 %r2|%p1, %r1, %r3, 31, 0xffffffff;"
    assert result(body) == [n ^ 3 for n in range(64)]


@pytest.mark.parametrize(("mode", "agree"), [("any", any), ("all", all)])
@pytest.mark.parametrize(
    ("holds", "lanes"), [("lt", range(32)), ("eq", [32]), ("ne", [n for n in range(64) if n != 32])]
)
def test_votes_are_a_warps_own(mode, agree, holds, lanes):
    body = f"setp.{holds}.s32 %p1, %r1, 32; vote.sync.{mode}.pred %p2, %p1, -1; selp.b32 %r2, 1, 0, %p2;"
    votes = [int(agree(n in lanes for n in range(first, first + 32))) for first in (0, 32)]
    assert result(body) == [vote for vote in votes for _ in range(32)]


@pytest.mark.parametrize("op", ["add.s32", "min.s32", "max.u32", "and.b32", "or.b32", "xor.b32"])
def test_reductions_of_a_warp(op):
    values = [(thread * 2654435761) % (1 << 32) for thread in range(64)]
    if op.endswith("s32"):
        values = [value - (1 << 32) if value >> 31 else value for value in values]
    functions = {"add": int.__add__, "min": min, "max": max, "and": int.__and__, "or": int.__or__, "xor": int.__xor__}
    function = functions[op[:-4]]
    expected = [reduce(function, values[first : first + 32]) % (1 << 32) for first in (0, 32)]
    body = f"mul.lo.s32 %r3, %r1, 0x9E3779B1; redux.sync.{op} %r2, %r3, -1;"
    assert result(body) == [total for total in expected for _ in range(32)]


def test_a_barrier_waits_for_all_warps():
    """Though the first one comes there by another way, and later."""
    body = """
    setp.ge.u32 %p1, %r1, 32;
    mov.u32 %r5, 0;
    @%p1 bra WAIT;
    LOOP: add.s32 %r5, %r5, 1; setp.lt.u32 %p2, %r5, 10;
    @%p2 bra LOOP;
    WAIT: shl.b32 %r3, %r1, 2; st.shared.u32 [%r3], %r5;
    bar.sync 0;
    xor.b32 %r4, %r1, 32; shl.b32 %r4, %r4, 2; ld.shared.u32 %r2, [%r4];
    """
    output = np.zeros(64, np.uint32)
    run(kernel(HEAD + body + STORE), [output], block=64, shared=256)
    assert output.tolist() == [0] * 32 + [10] * 32


@pytest.mark.parametrize("barrier", ["bar.sync 0;", "bar.warp.sync -1;"])
def test_threads_that_have_ended_are_not_waited_for(barrier):
    body = f"""
    setp.ge.u32 %p1, %r1, 48;
    @%p1 ret;
    {barrier}
    mov.u32 %r2, 1;
    """
    assert result(body) == [1] * 48 + [0] * 16


def test_different_barriers_are_uneven():
    body = HEAD + "setp.lt.u32 %p1, %r1, 32; @%p1 bra A; bar.sync 0; bra B;\nA: bar.sync 0;\nB: mov.u32 %r2, 0;"
    assert faults(kernel(body), [np.zeros(64, np.uint32)], block=64) == ["uneven barrier", "uneven barrier"]
    assert faults(kernel(body), [np.zeros(64, np.uint32)], block=32) == []


def test_a_loop_without_end_is_one(monkeypatch):
    """A thread waits for what another one, behind a barrier, would write."""
    monkeypatch.setattr(machine, "MOST_VISITS", 1000)
    body = HEAD + "LOOP: ld.global.u32 %r2, [%d30]; setp.eq.s32 %p1, %r2, 0;\n@%p1 bra LOOP;"
    assert faults(kernel(body), [np.zeros(64, np.uint32)]) == ["endless loop"]


def test_a_trap_is_told():
    body = HEAD + "setp.eq.s32 %p1, %r1, 5; @%p1 trap;"
    (fault,) = run(kernel(body), [np.zeros(64, np.uint32)], check=False).faults
    assert (fault.kind, fault.thread, fault.count) == ("trap", 5, 1)


def test_trap_reports_the_message_of_an_assert():
    head = (
        ".global .align 1 .b8 $str$1[8] = {111, 110, 101, 32, 116, 111, 111};\n"
        ".func fail_launch(.param .b64 a).noreturn ;"
    )
    body = (
        HEAD
        + """setp.ne.s32 %p1, %r1, 5; @%p1 bra END;
    mov.u64 %d1, $str$1; cvta.global.u64 %d2, %d1;
    { .param .b64 param0; st.param.b64 [param0+0], %d2;
    call.uni
    fail_launch,
    (
    param0
    );
    }
    END:"""
    )
    (fault,) = run(kernel(body, head=head), [np.zeros(64, np.uint32)], check=False).faults
    assert (fault.kind, fault.thread, fault.count) == ("trap", 5, 1)
    assert fault.detail == "the kernel ends the launch with one too"
    with pytest.raises(Unsupported, match="functions are called to end a launch only"):
        run(kernel(HEAD + "call.uni other, ();"), [np.zeros(64, np.uint32)])


@pytest.mark.parametrize(
    "instruction",
    [
        "bar.warp.sync -1;",
        "shfl.sync.bfly.b32 %r2|%p2, %r1, 16, 31, -1;",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2}, [%r3];",
        "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3], {%r2};",
    ],
)
def test_a_warp_that_is_not_complete(instruction):
    body = HEAD + "mov.u32 %r2, 0; mov.u32 %r3, 0; st.shared.v4.u32 [%r3], {%r2, %r2, %r2, %r2};\n"
    body += "and.b32 %r4, %r1, 31; setp.ge.u32 %p1, %r4, 16; @%p1 bra LATER;\n"
    body += f"{instruction}\nLATER: bar.sync 0;"
    output = run(kernel(body), [np.zeros(64, np.uint32)], block=64, shared=128, check=False).faults
    assert "divergent warp" in {fault.kind for fault in output}


def test_counts():
    """Instructions times threads, by line."""
    text = """
    .file 1 "folder/norm.cu"
    """
    body = (
        HEAD
        + """
    .loc 1 10 3
    setp.lt.u32 %p1, %r1, 10;
    @%p1 bra SKIP;
    .loc 1 11 3
    add.s32 %r2, %r1, 1; add.s32 %r2, %r2, 1;
    SKIP:
    .loc 1 12 1
    neg.s32 %r3, %r2;
    """
    )
    report = run(kernel(body, head=text), [np.zeros(64, np.uint32)], block=64, grid=3)
    assert report.lines()["folder/norm.cu", 11] == 3 * 2 * 54
    assert report.lines()["folder/norm.cu", 10] == 3 * 2 * 64
