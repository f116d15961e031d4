"""Triton multiplies float32 as torch does on GPUs: `torch.set_float32_matmul_precision` holds for both.

That results keep the error rule under "highest", the default, is what the ops' own tests show on Triton's PTX.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evakernels
from evakernels.triton._launch import float32_products

FLOAT32, BFLOAT16 = torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.bfloat16)


@pytest.fixture(autouse=True)
def restored():
    yield
    torch.set_float32_matmul_precision("highest")
    evakernels.set_loss_products("ieee")


def test_torchs_settings_hold_for_float32():
    for precision, kind in (("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")):
        torch.set_float32_matmul_precision(precision)
        assert (float32_products(FLOAT32), float32_products(BFLOAT16)) == (kind, "ieee")
    for newer in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = newer
        assert float32_products(FLOAT32) == newer


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

    def found(op, *, split=False):
        """With `split` whether factors are split in two."""
        shape = {"depth": 768} if "contrastive" in op or "siglip" in op else {"head_dim": 64, "tokens": 64}
        kernels = compiled(op, next(calls(op, shape, Draw("meta", torch.float32))))
        if split:
            return any("cvt.rna.tf32.f32" in one.asm["ptx"] for one in kernels)
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


LOSSES = ["contrastive_forward"]
LOSSES += [pytest.param(op, marks=pytest.mark.exhaustive) for op in ("contrastive_backward", "siglip_forward")]


@pytest.mark.parametrize("op", LOSSES)
def test_losses_split_float32_where_they_are_told_to(matrix_units, op):
    evakernels.set_loss_products("tf32x3")
    assert matrix_units(op) == {"tf32"}
    assert matrix_units(op, split=True)
    torch.set_float32_matmul_precision("high")  # torch's rule comes first
    assert not matrix_units(op, split=True)


@pytest.mark.exhaustive
def test_attention_never_splits_float32(matrix_units):
    evakernels.set_loss_products("tf32x3")
    assert matrix_units("packed_attention_forward") == set()


def test_other_products_are_refused():
    with pytest.raises(ValueError, match="unknown kind of products 'tf32x2'"):
        evakernels.set_loss_products("tf32x2")


ERRORS = """
import torch, torch.nn.functional as F
import evakernels
from ptx_launches import triton_kernels

random = torch.Generator().manual_seed(0)
def directions(rows):
    return F.normalize(torch.randn(rows, 768, dtype=torch.float64, generator=random), dim=1)
pairs, common = directions(64), directions(1)
data = [F.normalize(0.32 * pairs + 0.3 * common + 0.9 * directions(64), dim=1).float() for _ in range(2)]

def found(loss, dtype):
    features = [x.to(dtype).detach().requires_grad_() for x in data]
    values = loss(*features, torch.tensor(100.0, dtype=dtype))
    sum(value.mean() for value in values).backward()
    return [x.double() for x in (*(value.detach() for value in values), *(x.grad for x in features))]
def statistics(image, text, scale):
    logits = scale * image @ text.T
    return logits.logsumexp(1), logits.logsumexp(0), -2 * logits.diagonal()
def siglip(image, text, scale):
    signs = 2 * torch.eye(64, dtype=image.dtype) - 1
    return (-F.logsigmoid(signs * (scale * image @ text.T - 10)).sum() / 64,)
def our_statistics(image, text, scale):
    row_lse, col_lse, positive = evakernels.contrastive_statistics(image, text, scale)[:3]
    return row_lse, col_lse, -2 * positive
def our_siglip(image, text, scale):
    return (evakernels.siglip_loss(image, text, scale, torch.tensor(-10.0)),)

with triton_kernels(90):
    for plain, ours in ((statistics, our_statistics), (siglip, our_siglip)):
        exact, torchs = found(plain, torch.float64), found(plain, torch.float32)
        for precision in ("highest", "high"):
            evakernels.set_loss_products("tf32x3")
            torch.set_float32_matmul_precision(precision)
            results = found(ours, torch.float32)
            factors = [2] * (len(exact) - 2) + [3] * 2
            for factor, e, p, o in zip(factors, exact, torchs, results):
                limit = factor * (p - e).abs().max() + torch.finfo(torch.float32).eps * e.abs().max()
                print(((o - e).abs().max() / limit).item(), end=" ")
            print()
"""


@pytest.mark.slow
def test_sums_of_three_products_keep_the_error_rule():
    """What the losses are made of, and features' gradients, as `assert_as_accurate_as_torch`; TF32 alone is far off.

    The loss of CLIP itself is a lone number, whose error torch may have small by luck.
    """
    pytest.importorskip("triton")
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (here, here.parents[1])))}
    call = [sys.executable, "-c", ERRORS]
    result = subprocess.run(call, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-5000:]
    clip, rounded_clip, siglip, rounded_siglip = (
        [float(share) for share in line.split()] for line in result.stdout.splitlines()
    )
    assert max(clip + siglip) <= 1, (clip, siglip)
    assert min(rounded_clip + rounded_siglip) > 30, (rounded_clip, rounded_siglip)
