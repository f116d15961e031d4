"""Triton multiplies float32 as torch does on GPUs: `torch.set_float32_matmul_precision` holds for both.

That results keep the error rule under "highest", the default, is what the ops' own tests show on Triton's PTX.
"""

import re

import pytest
import torch

from evakernels.triton._launch import float32_products

FLOAT32, BFLOAT16 = torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("precision", "kind"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_torchs_setting_holds_for_float32(precision, kind):
    torch.set_float32_matmul_precision(precision)
    assert (float32_products(FLOAT32), float32_products(BFLOAT16)) == (kind, "ieee")


def test_torchs_newer_setting_holds_too():
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    assert float32_products(FLOAT32) == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert float32_products(FLOAT32) == "ieee"


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
    monkeypatch.setattr(tuning, "gpu_of", lambda tensor: ("", 80))
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", without_assembling)

    def found(op):
        shape = {"depth": 768} if "contrastive" in op or "siglip" in op else {"head_dim": 64, "tokens": 64}
        kernels = compiled(op, next(calls(op, shape, Draw("meta", torch.float32))))
        return {kind for one in kernels for kind in re.findall(r"mma\.sync\S*?\.f32\.(\w+)\.", one.asm["ptx"])}

    return found


MORE = ("contrastive_backward", "siglip_value", "packed_attention_backward")
OPS = ["contrastive_forward", "packed_attention_forward"]
OPS += [pytest.param(op, marks=pytest.mark.exhaustive) for op in MORE]


@pytest.mark.parametrize("op", OPS)
def test_matrix_units_round_to_tf32_where_torchs_do(matrix_units, op):
    """Under "highest" there is no matrix instruction at all: sums of float32 products have none."""
    assert matrix_units(op) == set()
    torch.set_float32_matmul_precision("high")
    assert matrix_units(op) == {"tf32"}
