"""Every family that `accelerate` serves: small models with random weights, compared with untouched ones."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from op_checks import Recorder
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from timm.layers import RmsNorm, SwiGLUPacked
from timm.models.eva import Eva
from timm.models.vision_transformer import ResPostBlock, VisionTransformer
from timm.models.vision_transformer_relpos import ResPostRelPosBlock, VisionTransformerRelPos
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    LlamaConfig,
    LlamaModel,
    Siglip2Config,
    Siglip2Model,
    SiglipConfig,
    SiglipModel,
)

import evakernels


@dataclass(frozen=True)
class Family:
    """`build` makes the model, `inputs(seed)` its arguments, `features` calls it; `ops` are the ops of that call."""

    build: Callable[[], nn.Module]
    ops: set[str]
    inputs: Callable[[int], dict[str, Any]]
    features: Callable[[nn.Module, dict[str, Any]], Tensor]


def randomised(build: Callable[[], nn.Module]) -> nn.Module:
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


def run(family: Family, model: nn.Module, seed: int) -> Tensor:
    """The features for the inputs of this seed; the modules draw from the same one."""
    torch.manual_seed(seed)
    return family.features(model, family.inputs(seed))


def gradients(family: Family, model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Gradients of a loss that weights every feature differently."""
    model.zero_grad()
    out = run(family, model, seed)
    (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(7))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def accelerated(model: nn.Module, **options: Any) -> nn.Module:
    """An accelerated copy."""
    model = copy.deepcopy(model)
    evakernels.accelerate(model, force=True, **options)
    return model


@contextmanager
def log_ops() -> Iterator[set[str]]:
    """Fills the set with the names of the ops that run inside the `with` block."""
    ops: set[str] = set()
    with Recorder() as recorder:
        yield ops
    ops.update(
        _public_name(op.name().partition("::")[2].removesuffix("_forward"), args) for op, args in recorder.own_calls()
    )


def _public_name(op: str, args: tuple[Any, ...]) -> str:
    """The public function of a call; the norms are one op, with a residual as seventh argument."""
    if op != "layer_norm" or args[6:7] in ((), (None,)):
        return op
    return "add_layer_norm" if args[9:] == (True,) else "layer_norm_add"


def ops_of(family: Family, model: nn.Module) -> set[str]:
    """The ops that a call runs."""
    with log_ops() as ops, torch.no_grad():
        run(family, model, 0)
    return ops


# --- timm -------------------------------------------------------------------------------------------------------------

ATTENTION, SWIGLU, ADD_NORM, NORM = "rope_attention", "swiglu", "add_layer_norm", "layer_norm"
BLOCK = {ATTENTION, ADD_NORM, NORM}


def images(seed: int) -> dict[str, Any]:
    return {"x": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))}


def _timm(kind: type[nn.Module], *ops: str, **options: Any) -> Family:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5}
    return Family(
        partial(randomised, partial(kind, **sizes, **options)),
        BLOCK | set(ops) | (set() if SWIGLU in ops else {"gelu"}),
        images,
        lambda model, inputs: model.forward_features(**inputs),
    )


_ROPE = {"use_rot_pos_emb": True}
_DINOV3 = {**_ROPE, "rope_type": "dinov3", "rope_rotate_half": True}
_EVA02 = {**_ROPE, "mlp_ratio": 8 / 3, "swiglu_mlp": True, "ref_feat_shape": (16, 16)}

TIMM = {
    "eva": _timm(Eva, "token_dropout", patch_drop_rate=0.25, drop_path_rate=0.2),
    "eva02": _timm(
        Eva, SWIGLU, "token_dropout", **_EVA02, qkv_fused=False, scale_mlp=True, patch_drop_rate=0.5, drop_path_rate=0.2
    ),
    "eva02-packed": _timm(Eva, SWIGLU, **_EVA02, scale_attn_inner=True, init_values=0.5),
    "eva-post-norm": _timm(Eva, "layer_norm_add", **_ROPE, use_post_norm=True, drop_path_rate=0.2),
    "dinov3": _timm(Eva, **_DINOV3, init_values=0.5, qkv_bias=False, num_reg_tokens=4, use_abs_pos_emb=False),
    "dinov3-gated": _timm(Eva, SWIGLU, **_DINOV3, swiglu_mlp=True, swiglu_align_to=8, init_values=0.5),
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
    "rope-grouped": _timm(Eva, **_DINOV3, attn_type="rope", qkv_fused=False, num_kv_heads=1, qk_norm=True),
    "rope-mixed": _timm(Eva, **_ROPE, attn_type="rope", rope_type="mixed", qk_norm=True),
    "vit": _timm(
        VisionTransformer, "token_dropout", init_values=0.5, drop_path_rate=0.3, patch_drop_rate=0.4, reg_tokens=2
    ),
    "vit-swiglu": _timm(
        VisionTransformer, SWIGLU, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, qk_norm=True, scale_attn_norm=True
    ),
    "vit-rms": _timm(VisionTransformer, norm_layer=RmsNorm, class_token=False, global_pool="avg"),
    "vit-post-norm": _timm(
        VisionTransformer, "layer_norm_add", block_fn=ResPostBlock, init_values=0.5, act_layer="quick_gelu"
    ),
    "relative": _timm(VisionTransformerRelPos, init_values=0.5, drop_path_rate=0.2, class_token=True),
    "relative-post-norm": _timm(VisionTransformerRelPos, "layer_norm_add", block_fn=ResPostRelPosBlock),
}
TIMM["eva-post-norm"].ops.difference_update({ADD_NORM, NORM})
TIMM["vit-post-norm"].ops.discard(ADD_NORM)
TIMM["relative"].ops.discard(ATTENTION)
TIMM["relative-post-norm"].ops.difference_update({ATTENTION, ADD_NORM})


# --- transformers -----------------------------------------------------------------------------------------------------

_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
_VISION = {**_SIZES, "image_size": 32, "patch_size": 8}
_NAFLEX = {**_SIZES, "patch_size": 8, "num_patches": 16}
_TEXT = {**_SIZES, "vocab_size": 50, "max_position_embeddings": 12, "projection_size": 64}


def _pixels(seed: int) -> Tensor:
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def _tokens(seed: int) -> Tensor:
    return torch.randint(3, 49, (4, 12), generator=torch.Generator().manual_seed(seed))


def _pair(seed: int) -> dict[str, Any]:
    return {"pixel_values": _pixels(seed), "input_ids": _tokens(seed)}


def _patches(seed: int) -> dict[str, Any]:
    pixels = torch.randn(4, 16, 3 * 8 * 8, generator=torch.Generator().manual_seed(seed))
    shapes, mask = torch.tensor([[4, 4]] * 4), torch.ones(4, 16, dtype=torch.int32)
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": shapes, "input_ids": _tokens(seed)}


def _embeddings(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    out = model(**inputs)
    return torch.cat((out.image_embeds, out.text_embeds))


def _last(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    hidden: Tensor = model(**inputs).last_hidden_state
    return hidden


def _transformers(build: Callable[[], nn.Module], ops: set[str], inputs: Any, features: Any = _last) -> Family:
    return Family(partial(randomised, build), ops, inputs, features)


_NORMS = {"layer_norm", "add_layer_norm"}
_ENCODER = {*_NORMS, "rope_attention", "gelu"}

TRANSFORMERS = {
    "clip": _transformers(
        lambda: CLIPModel(CLIPConfig(text_config=_TEXT, vision_config=_VISION, projection_dim=16)),
        _ENCODER,
        _pair,
        _embeddings,
    ),
    "siglip": _transformers(
        lambda: SiglipModel(SiglipConfig(text_config=_TEXT, vision_config=_VISION)), _ENCODER, _pair, _embeddings
    ),
    "siglip2": _transformers(
        lambda: Siglip2Model(Siglip2Config(text_config=_TEXT, vision_config=_NAFLEX)), _ENCODER, _patches, _embeddings
    ),
    "dinov3-vit": _transformers(
        lambda: DINOv3ViTModel(DINOv3ViTConfig(**_VISION, num_register_tokens=2, drop_path_rate=0.2)),
        _ENCODER,
        lambda seed: {"pixel_values": _pixels(seed)},
    ),
    "dinov3-vit-gated": _transformers(
        lambda: DINOv3ViTModel(DINOv3ViTConfig(**_VISION, use_gated_mlp=True, hidden_act="silu")),
        {*_NORMS, "rope_attention", "swiglu"},
        lambda seed: {"pixel_values": _pixels(seed)},
    ),
    "llama": _transformers(
        lambda: LlamaModel(LlamaConfig(**_SIZES, vocab_size=50)),
        {"layer_norm", "swiglu", "rope_attention"},
        lambda seed: {"input_ids": _tokens(seed)},
    ),
    "llama-grouped": _transformers(
        lambda: LlamaModel(LlamaConfig(**{**_SIZES, "num_attention_heads": 4}, num_key_value_heads=2, vocab_size=50)),
        {"layer_norm", "swiglu", "rope_attention"},
        lambda seed: {"input_ids": _tokens(seed)},
    ),
}


# --- open_clip --------------------------------------------------------------------------------------------------------

_CLIP_TEXT = {"context_length": 12, "vocab_size": 50, "width": 64, "heads": 2, "layers": 2}
_CLIP_VISION = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32}
_CUSTOM = {"block_type": "custom", "qk_norm": True, "scale_attn_inner": True, "scale_attn": True, "scale_fc": True}


def _image_and_text(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(4, 3, 32, 32, generator=generator)
    return {"image": image, "text": torch.randint(1, 49, (4, 12), generator=generator)}


def _features(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    image, text, *_ = model(**inputs)
    return torch.cat((image, text))


def _open_clip(
    kind: type[nn.Module], vision: dict[str, Any], text: dict[str, Any], *ops: str, quick_gelu: bool = False
) -> Family:
    def build() -> nn.Module:
        return kind(16, CLIPVisionCfg(**vision), CLIPTextCfg(**text), quick_gelu=quick_gelu)

    return Family(
        partial(randomised, build),
        {"layer_norm", "add_layer_norm", "rope_attention", "gelu", *ops},
        _image_and_text,
        _features,
    )


def _eva() -> nn.Module:
    """As EVA02-B-16, with a smaller tower in place of timm's, the smallest of which is too large for a test."""
    vision = {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": "linear"}
    model = CustomTextCLIP(16, CLIPVisionCfg(**vision), CLIPTextCfg(**_CLIP_TEXT))
    model.visual.trunk = Eva(
        img_size=32,
        patch_size=8,
        embed_dim=model.visual.trunk.embed_dim,
        depth=2,
        num_heads=3,
        num_classes=0,
        global_pool="token",
        mlp_ratio=8 / 3,
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(16, 16),
    )
    return model


OPEN_CLIP = {
    "open-clip": _open_clip(CLIP, {**_CLIP_VISION, "ls_init_value": 0.5}, _CLIP_TEXT, quick_gelu=True),
    "open-clip-dropout": _open_clip(CLIP, {**_CLIP_VISION, "patch_dropout": 0.4}, _CLIP_TEXT, "token_dropout"),
    "open-clip-eva": Family(
        partial(randomised, _eva),
        {"layer_norm", "add_layer_norm", "rope_attention", "swiglu", "gelu"},
        _image_and_text,
        _features,
    ),
    "open-clip-custom": _open_clip(CustomTextCLIP, {**_CLIP_VISION, **_CUSTOM}, {**_CLIP_TEXT, "ls_init_value": 0.5}),
}


# --- all --------------------------------------------------------------------------------------------------------------

FAMILIES = TIMM | TRANSFORMERS | OPEN_CLIP


def pair(name: str) -> tuple[Family, nn.Module, nn.Module]:
    """The family, an accelerated model and an untouched one."""
    family = FAMILIES[name]
    untouched = family.build()
    return family, accelerated(untouched), untouched


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def assert_same_gradients(actual, expected):
    """Compiled code gives parameters that had no part in the loss a gradient of zeros."""
    assert all(not actual[key].any() for key in actual.keys() - expected.keys())
    largest = max(float(g.abs().max()) for g in expected.values() if g.numel())
    for key, value in expected.items():
        torch.testing.assert_close(
            actual[key], value, rtol=1e-4, atol=1e-5 * largest, msg=lambda text, k=key: f"{k}: {text}"
        )
