"""nvcc compiles every GPU kernel for each GPU, within its budget and with memory accesses as wide as they are meant.

In one folder and one process, so that the kernels are compiled once. Of a source whose PTX, assembler and numbers are
those that budget.json seals, the numbers are taken from there; all others are assembled, and a few always.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from op_suite import ROOT
from ptx_build import budget

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.slow,
    pytest.mark.xdist_group("nvcc"),
    pytest.mark.skipif(budget.nvcc() is None, reason="no nvcc"),
]

# So many elements at a time of the first type: `norm_add_forward<BFloat16, BFloat16, 8, 3>` has 8 of 2 bytes.
ELEMENTS = re.compile(r"<(?:\d+, )?(?:TokenTypes<)?(BFloat16|Float16|float)\b[^>]*?>?, (\d+)(?:, \d+)?>$")
ALWAYS = {"gelu", "lamb"}
"""Sources that are assembled whatever their seals say."""
ALWAYS_WIDE = re.compile(r"lamb_(update|apply)_kernel$|, staged, ")


def is_wide(kernel: str) -> bool:
    """Whether a kernel accesses its large buffers by 16 bytes a thread."""
    found = ELEMENTS.search(kernel)
    return ALWAYS_WIDE.search(kernel) is not None or (
        found is not None and int(found[2]) * (4 if found[1] == "float" else 2) == 16
    )


def check_accesses(found: dict[str, Any], same_compiler: bool, remedy: str) -> None:
    allowed = budget.read_accesses()
    wide = [kernel for kernel in found if is_wide(kernel)]
    assert len(wide) >= 60, wide
    for kernel in wide:
        accesses = found[kernel]
        assert accesses.wide_loads > 0, (kernel, accesses)
        assert accesses.wide_stores > 0, (kernel, accesses)
        if same_compiler:
            assert accesses.other_loads <= allowed[kernel].other_loads, (kernel, accesses, allowed[kernel], remedy)
            assert accesses.other_stores <= allowed[kernel].other_stores, (kernel, accesses, allowed[kernel], remedy)


@pytest.fixture(scope="module", autouse=True)
def _compiled(made_once: Callable[..., Path]) -> None:
    """By this process or by that which runs the PTX."""
    made_once("ptx", lambda folder: budget.build("ptx"))


def test_kernels_keep_to_their_budget() -> None:
    (release, allowed), assembled = budget.read(), budget.unsealed() | ALWAYS
    print("assembled:", *sorted(assembled))
    found = budget.measure(assembled)
    same_compiler = release == budget.nvcc_release()
    remedy = "if that is meant to be so: python tests/cuda/budget.py"
    sources = {budget.source_of(path) for path in budget.objects()}
    assert {kernel.partition(":")[0] for kernel in allowed["sm_80"]} == sources, remedy
    for arch, kernels in found.items():
        assert set(kernels) == {k for k in allowed[arch] if k.partition(":")[0] in assembled}, remedy
        for kernel, usage in kernels.items():
            registers, shared = allowed[arch][kernel]
            assert usage.spilled == usage.stack == 0, (arch, kernel, usage)
            assert usage.shared <= shared, (arch, kernel, usage, remedy)
            if same_compiler:
                assert usage.registers <= registers, (arch, kernel, usage, remedy)
    tool = budget.disassembler()
    if tool is None:
        pytest.skip("registers and shared memory are within the budget; no cuobjdump to look at memory accesses")
    check_accesses(budget.read_accesses() | budget.measure_accesses(tool, assembled), same_compiler, remedy)


def test_the_assembler_still_says_what_is_sealed() -> None:
    sealed = ALWAYS - budget.unsealed()
    _, recorded = budget.read()
    for arch, kernels in budget.measure(sealed).items():
        for kernel, usage in kernels.items():
            assert tuple(usage[:2]) == recorded[arch][kernel]
    if tool := budget.disassembler():
        accesses = budget.read_accesses()
        assert all(accesses[k] == found for k, found in budget.measure_accesses(tool, sealed).items())


def test_a_seal_breaks_with_an_instruction_an_option_or_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    path = next(path for path in budget.objects() if budget.source_of(path) == "lamb")
    stored = json.loads(budget.BUDGET.read_text())
    recorded = [stored[name] for name in budget.SECTIONS]
    seal = budget.seal(path, recorded)
    assert seal == budget.seal(path, recorded)
    for section in recorded:
        kernel = next(name for name in section if name.startswith("lamb: "))
        changed = [other | {kernel: [9, 9, 9, 9]} if other is section else other for other in recorded]
        assert budget.seal(path, changed) != seal
        assert budget.seal(path, [other | {"gelu: ": 1} for other in recorded]) == seal
    with monkeypatch.context() as other:
        other.setattr(budget, "ASSEMBLER_OPTIONS", ("-v", "-O1"))
        assert budget.seal(path, recorded) != seal
    with monkeypatch.context() as other:
        other.setattr(budget, "assembler_release", lambda: "13.0.1")
        assert budget.seal(path, recorded) != seal
    with monkeypatch.context() as other:
        texts = {
            capability: text.replace("add.f32", "sub.f32", 1)
            for capability, text in budget.ptx_in(path.read_bytes())[0].items()
        }
        other.setattr(budget, "ptx_in", lambda data: [texts])
        assert budget.seal(path, recorded) != seal


def test_ptx_is_the_same_of_a_checkout_elsewhere_and_of_lines_that_moved(tmp_path: Path) -> None:
    """But for what `without_places` leaves out. Of the source whose kernels have variables in shared memory."""
    source = "csrc/cuda/token_dropout_backward.cu"
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    (tmp_path / source).write_text("\n\n" + (tmp_path / source).read_text())
    code = ("--generate-code=arch=compute_80,code=compute_80", *filter(None, budget.FLAGS.split(";")))
    call = [budget.nvcc(), "-std=c++20", "-O3", "-DNDEBUG", *code, f"-I{tmp_path / 'csrc'}"]
    subprocess.run([*call, "-c", tmp_path / source, "-o", tmp_path / "elsewhere.o"], check=True)
    built = budget.BUILD / "CMakeFiles/cuda_kernels.dir" / f"{source}.o"
    here, elsewhere = (budget.ptx_in(path.read_bytes())[0][80] for path in (built, tmp_path / "elsewhere.o"))
    assert elsewhere != here
    assert budget.without_places(elsewhere) == budget.without_places(here)


def test_the_program_that_drives_them_is_linked_and_runs() -> None:
    """Without a GPU it ends at its first question for one."""
    budget.build("drive_gpu")
    result = subprocess.run([budget.BUILD / "drive_gpu", "gelu"], capture_output=True, text=True, check=False)
    assert result.returncode == 0 or "cudaMallocManaged: " in result.stdout, result
