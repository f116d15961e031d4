"""The faces have the signatures and state dicts of the packages themselves, where these are installed.

pip install --no-deps --target DIR liger-kernel xformers    and DIR in PYTHONPATH
"""

import importlib
import inspect
from types import ModuleType, SimpleNamespace

import pytest
import torch

from evakernels.compat import flash_attn, liger, xformers

CONFIG = SimpleNamespace(hidden_size=4, intermediate_size=6, hidden_act="silu")
MADE = {
    "LigerFusedAddRMSNorm": (4,),
    "LigerLayerNorm": (4,),
    "LigerRMSNorm": (4,),
    "LigerSwiGLUMLP": (CONFIG,),
    "SwiGLU": (4, 6),
}
OPTIONS = "window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False"
FLASH_ATTN = {  # of flash-attn 2.8, which has no wheel
    "flash_attn_func": f"q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, {OPTIONS}",
    "flash_attn_qkvpacked_func": f"qkv, dropout_p=0.0, softmax_scale=None, causal=False, {OPTIONS}",
    "flash_attn_varlen_func": "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, "
    f"softmax_scale=None, causal=False, {OPTIONS}, block_table=None",
    "flash_attn_kvpacked_func": f"q, kv, dropout_p=0.0, softmax_scale=None, causal=False, {OPTIONS}",
    "flash_attn_varlen_kvpacked_func": "q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, "
    f"softmax_scale=None, causal=False, {OPTIONS}",
    "flash_attn_varlen_qkvpacked_func": "qkv, cu_seqlens, max_seqlen, dropout_p=0.0, softmax_scale=None, causal=False, "
    f"{OPTIONS}",
}


def arguments(function) -> str:
    signature = inspect.signature(function)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(inspect.Signature(plain))


def package(module: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        pytest.skip(f"{name} is missing ({exc}): pip install --no-deps --target DIR {name}, and DIR in PYTHONPATH")


@pytest.mark.parametrize("name", flash_attn.__all__)
def test_flash_attn(name):
    assert arguments(getattr(flash_attn, name)) == f"({FLASH_ATTN[name]})"


@pytest.mark.parametrize("name", sorted({*xformers.__all__} - {"BlockDiagonalMask", "fmha"}))
def test_xformers(name):
    assert_same(getattr(xformers, name), getattr(package("xformers.ops", "xformers"), name))


@pytest.mark.parametrize("name", liger.__all__)
def test_liger(name):
    assert_same(getattr(liger, name), getattr(package("liger_kernel.transformers", "liger-kernel"), name))


def assert_same(ours, theirs) -> None:
    assert arguments(ours) == arguments(theirs)
    if theirs.__name__ in MADE:
        given = MADE[theirs.__name__]
        ours(*given).load_state_dict(theirs(*given).state_dict())
        assert arguments(ours.forward) == arguments(theirs.forward)


def test_masks_of_xformers():
    masks = package("xformers.ops.fmha.attn_bias", "xformers")
    made = masks.BlockDiagonalMask.from_seqlens([3, 4])
    for name in ("from_seqlens", "split"):
        ours, theirs = (getattr(found.BlockDiagonalMask, name) for found in (xformers, masks))
        assert arguments(ours) == arguments(theirs)
    q = torch.randn(1, 7, 2, 8)
    alone = [xformers.memory_efficient_attention(*[part] * 3) for part in q.split([3, 4], 1)]
    torch.testing.assert_close(xformers.memory_efficient_attention(q, q, q, made), torch.cat(alone, 1))
    causal = xformers.memory_efficient_attention(q, q, q, masks.LowerTriangularMask())
    torch.testing.assert_close(causal, xformers.memory_efficient_attention(q, q, q, xformers.LowerTriangularMask()))
