"""Every model of the families in timm that `accelerate` serves, on meta and two blocks deep: what of it is left."""

import pytest
import timm
import torch

import evakernels
from evakernels.dropin import _swap

# Of a family that lists its heads by block, one block shares keys between heads.
OPTIONS = {"sapiens2": {"num_heads": 8, "num_kv_heads": (8, 4)}}

LEFT = {
    ("GELU", "its own is as fast"),  # without AVX-512
    *((name, "all of its tokens are read") for name in ("Eva", "VisionTransformer")),
    *(
        ("VisionTransformer", f"its last block, Parallel{kind}Block, computes all tokens")
        for kind in ("Things", "Scaling")
    ),
    *((name, "not supported") for name in ("AttentionPoolLatent", "RelPosAttention", "DiffAttention")),
    # Its attention is in the block itself.
    *((name, "not supported") for name in ("ParallelScalingBlock", "DiffParallelScalingBlock")),
}
"""Modules of supported classes, and why they are left."""

UNSUPPORTED = {
    # torch's own is as fast, or the op of the parent reads them.
    "Conv2d", "Dropout", "Identity", "LayerScale", "DropPath", "Mlp", "SiLU",
    # One query, scores with a bias, or a difference of two softmaxes: the op has none of these.
    "AttentionPoolLatent", "RelPosAttention", "RelPosMlp", "ReLU", "DiffAttention", "DiffParallelScalingBlock",
    # Two attentions or MLPs side by side, each of which is served.
    "ParallelThingsBlock",
    # Containers and tables.
    "VisionTransformerRelPos", "Sequential", "ModuleList", "PatchEmbed", "HybridEmbed",
    "RotaryEmbeddingCat", "RotaryEmbeddingDinoV3", "RotaryEmbeddingMixed",
}  # fmt: skip
"""Classes in the models, but for convolutional stems, that are not supported, and why."""


@pytest.fixture(autouse=True)
def skip_initialisation(monkeypatch):
    """On meta there are none."""
    for name in ("trunc_normal_", "normal_", "xavier_uniform_", "kaiming_normal_", "uniform_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, **options: tensor)
    monkeypatch.setattr(timm.layers.weight_init, "_trunc_normal_", lambda tensor, *args: tensor)


def _build(name):
    options = next((options for part, options in OPTIONS.items() if part in name), {})
    return timm.create_model(name, device="meta", depth=2, **options)


def _modules(model):
    """Those of the transformer; not those of a convolutional stem."""
    stem = getattr(getattr(model, "patch_embed", None), "backbone", None)
    inside = set() if stem is None else set(stem.modules())
    return [module for module in model.modules() if module not in inside]


@pytest.mark.parametrize("family", ["eva*", "vit_[!prs]*", "vit_[prs]*"])
def test_every_timm_model_is_supported(family):
    unexpected = {}
    for name in timm.list_models(family):
        model = _build(name)
        modules, before = _modules(model), list(model.state_dict())
        report = evakernels.accelerate(model)
        assert list(model.state_dict()) == before
        left = {(entry.module, entry.reason) for entry in report.left} - LEFT
        left |= (
            {type(m).__name__ for m in modules if not isinstance(m, _swap.AcceleratedModule)}
            - UNSUPPORTED
            - {module for module, _ in LEFT}
        )
        if left:
            unexpected[name] = left
    assert not unexpected
