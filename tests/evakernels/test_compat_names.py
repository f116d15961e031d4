"""Names of `evakernels.compat`: signatures are those of the other libraries; a missing name's error has a replacement.

xformers' are compared where it is installed: pip install --no-deps --target DIR xformers    and DIR in PYTHONPATH
"""

import importlib
import inspect
import operator
import re
from types import ModuleType

import pytest
import torch

import evakernels
from evakernels.compat import flash_attn, xformers

MISSING = {
    "apex": ["fused_layer_norm_affine", "fused_rms_norm", "FusedSGD"],
    "flash_attn": ["flash_attn_with_kvcache", "apply_rotary_emb", "unpad_input"],
    "xformers": ["RMSNorm", "AttentionBias", "SwiGLU", "memory_efficient_attention_forward", "rope_padded"],
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in MISSING for name in MISSING[module]])
def test_missing_name_has_replacement(module, name):
    with pytest.raises(ImportError, match=f"^evakernels.compat.{module} has no {name}: ") as caught:
        exec(f"from evakernels.compat.{module} import {name}")
    for path in re.findall(r"evakernels\.([\w.]+)", str(caught.value).partition(": ")[2]):
        operator.attrgetter(path)(evakernels)


@pytest.mark.parametrize("module", MISSING)
def test_unknown_name_raises_attribute_error(module):
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = importlib.import_module(f"evakernels.compat.{module}").no_such_name


# --- signatures -----------------------------------------------------------------------------------------------------

OPTIONS = "window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False"
OPTIONS = f"dropout_p=0.0, softmax_scale=None, causal=False, {OPTIONS}"
LENGTHS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
FLASH_ATTN = {  # of flash-attn 2.8, which has no wheel
    "flash_attn_func": f"q, k, v, {OPTIONS}",
    "flash_attn_varlen_func": f"q, k, v, {LENGTHS}, {OPTIONS}, block_table=None",
}


def arguments(function) -> str:
    signature = inspect.signature(function)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(plain))


def package(module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        pytest.skip(f"xformers is missing ({exc}): pip install --no-deps --target DIR xformers, and DIR in PYTHONPATH")


@pytest.mark.parametrize("name", FLASH_ATTN)
def test_flash_attn_signature(name):
    assert arguments(getattr(flash_attn, name)) == f"({FLASH_ATTN[name]})"


def test_xformers_signature():
    theirs = package("xformers.ops").memory_efficient_attention
    assert arguments(xformers.memory_efficient_attention) == arguments(theirs)


def test_xformers_masks():
    masks = package("xformers.ops.fmha.attn_bias")
    for name in ("from_seqlens", "split"):
        ours, theirs = (getattr(library.BlockDiagonalMask, name) for library in (xformers, masks))
        assert arguments(ours) == arguments(theirs)
    q = torch.randn(1, 7, 2, 8)
    for name in ("BlockDiagonalMask", "BlockDiagonalCausalMask", "BlockDiagonalCausalFromBottomRightMask"):
        made = [getattr(library, name).from_seqlens([3, 4]) for library in (xformers, masks)]
        torch.testing.assert_close(*(xformers.memory_efficient_attention(q, q, q, bias) for bias in made))
    for name in ("LowerTriangularMask", "LowerTriangularFromBottomRightMask"):
        made = [getattr(library, name)() for library in (xformers, masks)]
        torch.testing.assert_close(*(xformers.memory_efficient_attention(q, q, q, bias) for bias in made))
