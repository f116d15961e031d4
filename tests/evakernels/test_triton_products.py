"""Triton multiplies float32 as torch does on GPUs: `torch.set_float32_matmul_precision` holds for both.

That results keep the error rule under "highest", the default, is what the ops' own tests show on Triton's PTX.
"""

import re

import pytest
import torch


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.fixture
def matrix_units(monkeypatch):
    """`matrix_units(op)`: the types of factors that the kernels' matrix instructions take on an A100."""
    pytest.importorskip("triton")
    from triton import knobs
    from triton.runtime.driver import driver
    from triton_compile import AbsentGPU, compiled

    from evakernels import tuning
    from evakernels.tuning.calls import Draw, calls
    from ptx_interpreter.triton_driver import without_assembling

    monkeypatch.setattr(driver, "_active", AbsentGPU(80))
    monkeypatch.setattr(tuning, "find_gpu", lambda tensor: ("", 80))
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", without_assembling)

    def found(op, *, split=False):
        """With `split` whether factors are split in two."""
        shape = {"depth": 768} if "contrastive" in op or "siglip" in op else {"head_dim": 64, "tokens": 64}
        kernels = compiled(op, next(calls(op, shape, Draw("meta", torch.float32))))
        if split:
            return any("cvt.rna.tf32.f32" in one.asm["ptx"] for one in kernels)
        return {kind for one in kernels for kind in re.findall(r"mma\.sync\S*?\.f32\.(\w+)\.", one.asm["ptx"])}

    return found


OPS = ["packed_attention_forward", pytest.param("packed_attention_backward", marks=pytest.mark.exhaustive)]


@pytest.mark.parametrize("op", OPS)
def test_matrix_units_round_to_tf32_where_torchs_do(matrix_units, op):
    """Under "highest" there is no matrix instruction at all: sums of float32 products have none."""
    assert matrix_units(op) == set()
    torch.set_float32_matmul_precision("high")
    assert matrix_units(op) == {"tf32"}


LOSSES = ["contrastive_forward"]
LOSSES += [pytest.param(op, marks=pytest.mark.exhaustive) for op in ("contrastive_backward", "siglip_forward")]


@pytest.mark.parametrize("op", LOSSES)
def test_losses_split_float32_by_default(matrix_units, op):
    assert matrix_units(op) == {"tf32"}
    assert matrix_units(op, split=True)
    torch.set_float32_matmul_precision("high")  # torch's rule comes first
    assert matrix_units(op) == {"tf32"}
    assert not matrix_units(op, split=True)
