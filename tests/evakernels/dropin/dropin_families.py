"""Small models of every family that `accelerate` serves, with random weights: nothing is loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import RmsNorm, SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

ATTENTION, SWIGLU, ADD_NORM, NORM = "rope_attention", "swiglu", "add_layer_norm", "layer_norm"
BLOCK = {ATTENTION, ADD_NORM, NORM}


@dataclass(frozen=True)
class Family:
    """`build` makes the model, `inputs(seed)` its arguments, `features` calls it; `ops` are what it then runs on."""

    build: Callable[[], nn.Module]
    ops: set[str]
    inputs: Callable[[int], dict[str, Any]]
    features: Callable[[nn.Module, dict[str, Any]], Tensor]


def _randomised(build: Callable[[], nn.Module]) -> nn.Module:
    """Random values in every parameter: a layer scale of 1e-5 or a bias of zero would hide what they multiply."""
    torch.manual_seed(0)
    model = build()
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            nn.init.normal_(parameter, float(parameter.detach().mean()), 0.1)
        if "gamma" in name or "lambda1" in name:
            nn.init.uniform_(parameter, 0.3, 0.7)
        if name.startswith("head."):
            nn.init.normal_(parameter, 0, 0.1)
    return model.eval()


def images(seed: int) -> dict[str, Any]:
    return {"x": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))}


def _timm(kind: type[nn.Module], *ops: str, **options: Any) -> Family:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
    return Family(
        partial(_randomised, partial(kind, **sizes, **options)),
        BLOCK | set(ops),
        images,
        lambda model, inputs: model.forward_features(**inputs),
    )


_ROPE = {"use_rot_pos_emb": True}
_EVA02 = {**_ROPE, "mlp_ratio": 8 / 3, "swiglu_mlp": True, "ref_feat_shape": (16, 16)}

FAMILIES = {
    "eva": _timm(Eva, "token_dropout", patch_drop_rate=0.25, drop_path_rate=0.2),
    "eva02": _timm(
        Eva, SWIGLU, "token_dropout", **_EVA02, qkv_fused=False, scale_mlp=True, patch_drop_rate=0.5, drop_path_rate=0.2
    ),
    "eva02-packed": _timm(Eva, SWIGLU, **_EVA02, scale_attn_inner=True, init_values=0.5),
    "eva-post-norm": _timm(Eva, "layer_norm_add", **_ROPE, use_post_norm=True, drop_path_rate=0.2),
    "dinov3": _timm(
        Eva,
        **_ROPE,
        rope_type="dinov3",
        rope_rotate_half=True,
        init_values=0.5,
        qkv_bias=False,
        num_reg_tokens=4,
        use_abs_pos_emb=False,
    ),
    "dinov3-gated": _timm(
        Eva,
        SWIGLU,
        **_ROPE,
        rope_type="dinov3",
        rope_rotate_half=True,
        swiglu_mlp=True,
        swiglu_align_to=8,
        init_values=0.5,
    ),
    "perception-encoder": _timm(
        Eva,
        **_ROPE,
        attn_type="rope",
        rope_grid_indexing="xy",
        rope_grid_offset=1.0,
        use_pre_transformer_norm=True,
        global_pool="map",
        init_values=0.5,
    ),
    "rope-mixed": _timm(Eva, **_ROPE, attn_type="rope", rope_type="mixed", qk_norm=True),
    "vit": _timm(
        VisionTransformer, "token_dropout", init_values=0.5, drop_path_rate=0.3, patch_drop_rate=0.4, reg_tokens=2
    ),
    "vit-swiglu": _timm(
        VisionTransformer, SWIGLU, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, qk_norm=True, scale_attn_norm=True
    ),
    "vit-rms": _timm(VisionTransformer, norm_layer=RmsNorm, class_token=False, global_pool="avg"),
    "vit-post-norm": _timm(VisionTransformer, "layer_norm_add", block_fn=ResPostBlock, init_values=0.5),
}
FAMILIES["eva-post-norm"].ops.difference_update({ADD_NORM, NORM})
FAMILIES["vit-post-norm"].ops.discard(ADD_NORM)


def run(family: Family, model: nn.Module, seed: int) -> Tensor:
    """The features for the inputs of this seed; the modules draw from the same one."""
    torch.manual_seed(seed)
    return family.features(model, family.inputs(seed))


def gradients(family: Family, model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Of a loss in which every feature has a weight of its own."""
    model.zero_grad()
    out = run(family, model, seed)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(7))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


class _Log(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func.name().partition("::")
        if namespace == "evakernels":
            self.ops.add(name.removesuffix("_forward"))
        return func(*args, **(kwargs or {}))


def ops_of(family: Family, model: nn.Module) -> set[str]:
    """The ops that a call runs."""
    with _Log() as log, torch.no_grad():
        run(family, model, 0)
    return log.ops
