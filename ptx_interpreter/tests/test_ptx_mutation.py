"""Mutants: which there are of an instruction, that one instruction is changed, and that the kernel itself is not."""

import numpy as np
import pytest
from ptx_programs import faults, kernel

from ptx_interpreter import Kernel
from ptx_interpreter.mutants import KINDS, mutants_of, mutated

# The numbers of 64 threads by way of shared memory, in the other order; of these the first 32.
REVERSED = """mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 2; st.shared.u32 [%r2], %r1;
bar.sync 0;
sub.s32 %r3, 63, %r1; shl.b32 %r4, %r3, 2; ld.shared.u32 %r5, [%r4];
mul.wide.u32 %d1, %r1, 4; add.s64 %d2, %d1, %d30; setp.lt.s32 %p1, %r1, 32;
@%p1 st.global.u32 [%d2], %r5;"""


def changes(body: str) -> list[tuple[str, str]]:
    """Kind and operands of each mutant, as text."""
    program = kernel(body, params=0)
    return [(mutant.kind, str(mutant.changed.args)) for mutant in mutants_of(program.parsed)]


SUMS, LEFT, RIGHT = "{%f1,%f2,%f3,%f4}", "{%r1,%r2,%r3,%r4}", "{%r5,%r6}"
PRODUCT = f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {SUMS}, {LEFT}, {RIGHT}, {SUMS};"
SUMS, RIGHT = "['%f1', '%f2', '%f3', '%f4']", "['%r5', '%r6']"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("bar.sync 0;", [("barrier", "[]")]),
        ("bar.warp.sync -1;", [("warp barrier", "[]")]),
        ("cp.async.commit_group; cp.async.wait_group 1;", [("wait", "[]")] * 2),
        ("sub.s32 %r1, %r2, %r3; add.s32 %r1, %r2, %r3;", [("operands", "['%r1', '%r3', '%r2']")]),
        ("selp.b32 %r1, 1, 2, %p1; sub.f32 %f1, %f2, %f2;", [("operands", "['%r1', '2', '1', '%p1']")]),
        ("setp.eq.s32 %p1, %r1, 4; setp.lt.s32 %p1, %r1, 4;", [("operands", "['%p1', '4', '%r1']")]),
        ("@%p1 mov.u32 %r1, 3;", [("predicate", "['%r1', '3']")]),
        ("ld.global.v2.f32 {%f1, %f2}, [%d1+4];", [("address", "[['%f1', '%f2'], Address(base='%d1', offset=12)]")]),
        ("st.u16 [%d1], %h1;", [("address", "[Address(base='%d1', offset=2), '%h1']")]),
        (PRODUCT, [("factor", f"[{SUMS}, ['%r2', '%r1', '%r4', '%r3'], {RIGHT}, {SUMS}]")]),
    ],
)
def test_what_is_changed_of_an_instruction(body: str, expected: list[tuple[str, str]]) -> None:
    assert changes(body) == expected


def test_both_addresses_of_a_copy_are_moved() -> None:
    to, of = "Address(base='%r1', offset={})", "Address(base='%d1', offset={})"
    found = [args for _, args in changes("cp.async.cg.shared.global [%r1], [%d1], 16;")]
    assert found == [f"[{to.format(m)}, {of.format(n)}, '16']" for m, n in ((16, 0), (0, 16))]


def said_of(program: Kernel) -> str:
    found = np.zeros(32, np.uint32)
    kinds = faults(program, [found], block=64, shared=256)
    return kinds[0] if kinds else "right" if found.tolist() == list(range(63, 31, -1)) else "wrong"


def test_mutation_changes_one_instruction_of_a_copy() -> None:
    program = kernel(REVERSED)
    said = {}
    for mutant in mutants_of(program.parsed):
        assert mutant.kind in KINDS
        said[mutant.kind, mutant.changed.op] = said_of(mutated(program, mutant))
    assert said_of(program) == "right"
    assert said["barrier", "fence"] == "race"
    assert said["predicate", "st"] == "out of bounds"
    assert "right" not in said.values()
