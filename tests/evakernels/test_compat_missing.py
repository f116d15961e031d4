"""Names of other libraries that the faces lack say what takes their place."""

import importlib
import operator
import re

import pytest

import evakernels

MISSING = {
    "apex": ["fused_layer_norm_affine", "fused_rms_norm", "FusedSGD"],
    "flash_attn": ["flash_attn_with_kvcache", "apply_rotary_emb", "unpad_input"],
    "liger": ["LigerGEGLUMLP", "LigerRMSNormForGemma", "liger_rotary_pos_emb", "LigerCrossEntropyLoss"],
    "xformers": ["RMSNorm", "AttentionBias", "memory_efficient_attention_forward", "rope_padded"],
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in MISSING for name in MISSING[module]])
def test_a_name_of_the_library_says_what_takes_its_place(module, name):
    with pytest.raises(ImportError) as caught:
        exec(f"from evakernels.compat.{module} import {name}")
    start, _, sentence = str(caught.value).partition(": ")
    assert start == f"evakernels.compat.{module} has no {name}"
    for path in re.findall(r"evakernels\.([\w.]+)", sentence):
        operator.attrgetter(path)(evakernels)  # is there


@pytest.mark.parametrize("module", MISSING)
def test_any_other_name_is_an_attribute_error(module):
    face = importlib.import_module(f"evakernels.compat.{module}")
    assert not hasattr(face, "no_such_name")
    with pytest.raises(AttributeError, match=f"module 'evakernels.compat.{module}' has no attribute 'no_such_name'"):
        _ = face.no_such_name
