"""Names of other libraries that `evakernels.compat` lacks: the import error names a replacement."""

import importlib
import operator
import re

import pytest

import evakernels

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
