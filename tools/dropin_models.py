"""Small models, with random weights, of each family that `evakernels.accelerate` serves, and a comparison of each.

    python tools/dropin_models.py timm [--all] [--by-behaviour]

prints a line of JSON for each model of the library that is on PYTHONPATH: what was replaced, what was left and why, and
the largest difference of outputs and gradients from the untouched model, of their largest value. `--all` takes every
model of timm's class `Eva` and every DINOv2 in the place of one of each kind. With `--by-behaviour` no form of any
library is known, as of a release of next year: what is replaced then was tried.
"""

import argparse
import copy
import importlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

import evakernels
from evakernels.dropin import _form

TIMM = (
    "eva_giant_patch14_224",
    "eva02_tiny_patch14_224",
    "eva02_base_patch16_clip_224",
    "vit_base_patch16_rope_reg1_gap_256",
    "vit_pe_core_base_patch16_224",
    "vit_pe_lang_large_patch14_448",
    "vit_pe_spatial_base_patch16_512",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_small_patch16_dinov3",
    "vit_7b_patch16_dinov3",
    "vit_base_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_giant_patch14_dinov2",
    "vit_relpos_small_patch16_224",
)
"""One model of each kind, in all releases that are tried."""

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 12, "projection_size": 128}
QWEN = {"depth": 2, "num_heads": 2, "patch_size": 8, "hidden_act": "silu"}


@dataclass(frozen=True)
class Model:
    """`build` makes it, with what importing its library needs, and `inputs` its arguments."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, Any]]


def models(library: str, every: bool = False) -> dict[str, Model]:
    """Of timm, open_clip, transformers or torchvision."""
    found: dict[str, Model] = {
        "timm": _timm,
        "open_clip": _open_clip,
        "transformers": _transformers,
        "torchvision": _torchvision,
    }[library](every)
    return found


def _images(size: int = 32, name: str = "x") -> dict[str, Any]:
    return {name: torch.randn(2, 3, size, size)}


# --- timm -----------------------------------------------------------------------------------------------------------


def _timm(every: bool) -> dict[str, Model]:
    timm = importlib.import_module("timm")
    names = [*timm.list_models(module="eva"), *timm.list_models("*dinov2*")] if every else []
    return {name: _of_timm(name) for name in dict.fromkeys([*names, *TIMM]) if timm.is_model(name)}


def _of_timm(name: str) -> Model:
    patch = int(re.findall(r"patch(\d+)", name)[0])
    options = {"num_kv_heads": (2, 1)} if "sapiens2" in name else {}
    create = importlib.import_module("timm").create_model
    build = partial(create, name, depth=2, embed_dim=128, num_heads=2, img_size=4 * patch, num_classes=5, **options)
    return Model(build, partial(_images, 4 * patch))


# --- open_clip ------------------------------------------------------------------------------------------------------


def _open_clip(every: bool) -> dict[str, Model]:
    model = importlib.import_module("open_clip.model")
    text = {"context_length": 12, "vocab_size": 50, "width": 64, "heads": 2, "layers": 2}
    vision = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 8, "image_size": 32}
    custom = {"scale_attn_inner": True, "scale_attn": True, "scale_fc": True, "block_type": "custom"}
    eva = {"timm_model_name": "eva02_tiny_patch14_224", "timm_pool": "token", "timm_proj": "linear", "image_size": 224}

    def clip(kind: str, **options: Any) -> Model:
        known = model.CLIPVisionCfg.__dataclass_fields__
        options = {key: value for key, value in options.items() if key in known}
        return Model(
            lambda: getattr(model, kind)(16, model.CLIPVisionCfg(**options), model.CLIPTextCfg(**text)),
            lambda: {"image": torch.randn(2, 3, *[options["image_size"]] * 2), "text": torch.randint(1, 49, (2, 12))},
        )

    def loss(name: str, **more: float) -> Model:
        def inputs() -> dict[str, Any]:
            image, text = nn.functional.normalize(torch.randn(2, 8, 16), dim=-1)
            scalars = {key: torch.tensor(value) for key, value in more.items()}
            return {"image_features": image, "text_features": text, "logit_scale": torch.tensor(10.0), **scalars}

        return Model(getattr(importlib.import_module("open_clip.loss"), name), inputs)

    return {
        "CLIP": clip("CLIP", **vision, ls_init_value=0.5),
        "CLIP, patch dropout": clip("CLIP", **vision, patch_dropout=0.4),
        "CustomTextCLIP, custom blocks": clip("CustomTextCLIP", **vision, **custom),
        "CustomTextCLIP, tower of timm's EVA02": clip("CustomTextCLIP", **eva),
        "ClipLoss": loss("ClipLoss"),
        "SigLipLoss": loss("SigLipLoss", logit_bias=-2.0),
    }


# --- transformers ---------------------------------------------------------------------------------------------------


def _transformers(every: bool) -> dict[str, Model]:
    library = importlib.import_module("transformers")
    pixels = partial(_images, 32, "pixel_values")

    def tokens() -> dict[str, Any]:
        return {"input_ids": torch.randint(3, 49, (2, 12))}

    def pair() -> dict[str, Any]:
        return pixels() | tokens()

    def naflex() -> dict[str, Any]:
        shapes, mask = torch.tensor([[4, 4]] * 2), torch.ones(2, 16, dtype=torch.int32)
        patches = {"pixel_values": torch.randn(2, 16, 192), "pixel_attention_mask": mask, "spatial_shapes": shapes}
        return patches | tokens()

    def grid() -> dict[str, Any]:
        return {"hidden_states": torch.randn(32, 3 * 2 * 64), "grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]])}

    def of(model: str, inputs: Callable[[], dict[str, Any]], config: str = "", **options: Any) -> Model:
        def build() -> nn.Module:
            made: nn.Module = _class(library, model)(_class(library, config or f"{model[:-5]}Config")(**options))
            return made

        return Model(build, inputs)

    naflex_vision = {**SIZES, "patch_size": 8, "num_patches": 16}
    qwen3 = {
        **QWEN,
        "hidden_size": 128,
        "intermediate_size": 192,
        "out_hidden_size": 128,
        "deepstack_visual_indexes": [],
    }
    return {
        "CLIP": of("CLIPModel", pair, text_config=TEXT, vision_config=VISION),
        "SigLIP": of("SiglipModel", pair, text_config=TEXT, vision_config=VISION),
        "SigLIP2": of("Siglip2Model", naflex, text_config=TEXT, vision_config=naflex_vision),
        "ViT": of("ViTModel", pixels, **VISION),
        "DINOv2": of("Dinov2Model", pixels, **VISION),
        "DINOv2, SwiGLU": of("Dinov2Model", pixels, **VISION, use_swiglu_ffn=True),
        "DINOv2 with registers": of("Dinov2WithRegistersModel", pixels, **VISION),
        "DINOv3 ViT": of("DINOv3ViTModel", pixels, **VISION, num_register_tokens=2),
        "DINOv3 ViT, SwiGLU": of("DINOv3ViTModel", pixels, **VISION, use_gated_mlp=True, hidden_act="silu"),
        "MLCD vision": of("MLCDVisionModel", pixels, "MLCDVisionConfig", **VISION),
        "Pixtral vision": of(
            "PixtralVisionModel",
            lambda: {**pixels(), "image_sizes": torch.tensor([[32, 32]] * 2)},
            "PixtralVisionConfig",
            **VISION,
        ),
        "Llama 4 vision": of(
            "Llama4VisionModel",
            pixels,
            "Llama4VisionConfig",
            **{**VISION, "intermediate_size": 512},
            vision_output_dim=128,
            projector_input_dim=128,
            projector_output_dim=128,
        ),
        "Qwen2-VL vision": of(
            "Qwen2VisionTransformerPretrainedModel", grid, "Qwen2VLVisionConfig", **QWEN, embed_dim=128, hidden_size=128
        ),
        "Qwen2.5-VL vision": of(
            "Qwen2_5_VisionTransformerPretrainedModel",
            grid,
            "Qwen2_5_VLVisionConfig",
            **QWEN,
            hidden_size=128,
            intermediate_size=192,
            out_hidden_size=128,
            window_size=32,
            fullatt_block_indexes=[1],
        ),
        "Qwen3-VL vision": of("Qwen3VLVisionModel", grid, "Qwen3VLVisionConfig", **qwen3),
        "Llama": of("LlamaModel", tokens, **SIZES, vocab_size=50),
    }


def _class(library: Any, name: str) -> Any:
    """Some of a library's classes are only in the files of its models."""
    if hasattr(library, name):
        return getattr(library, name)
    files = {"Qwen2_5_": "qwen2_5_vl", "Qwen2": "qwen2_vl", "Qwen3VL": "qwen3_vl", "Llama4": "llama4"}
    folder = next(folder for start, folder in files.items() if name.startswith(start))
    kind = "configuration" if name.endswith("Config") else "modeling"
    return getattr(importlib.import_module(f"transformers.models.{folder}.{kind}_{folder}"), name)


# --- torchvision ----------------------------------------------------------------------------------------------------


def _torchvision(every: bool) -> dict[str, Model]:
    kind = importlib.import_module("torchvision.models.vision_transformer").VisionTransformer
    sizes = {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 128, "mlp_dim": 256}
    return {"VisionTransformer": Model(partial(kind, **sizes, num_classes=5), _images)}


# --- the comparison -------------------------------------------------------------------------------------------------


def compare(model: Model, unknown: Literal["skip", "verify"] = "skip") -> dict[str, Any]:
    """The model, with all ops forced, beside itself untouched, in evaluation and in training."""
    torch.manual_seed(0)
    untouched = model.build()
    with torch.no_grad():
        for parameter in untouched.parameters():
            if parameter.dim() < 2:  # a zero hides what it multiplies
                parameter.uniform_(0.3, 0.8)
            elif parameter.std() < 0.01:
                parameter.normal_(0, 0.1)
    accelerated = copy.deepcopy(untouched)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = evakernels.accelerate(accelerated, force=True, unknown=unknown)
        inputs = model.inputs()
        runs = [_run(m.train(training), inputs) for training in (False, True) for m in (accelerated, untouched)]
    return {
        "headline": report.headline,
        "replaced": Counter(done.module for done in report.replaced),
        "left": Counter(f"{left.module}: {left.reason}" for left in report.left),
        "blocks": len(report.blocks),
        "forward": max(_difference(runs[i][0], runs[i + 1][0]) for i in (0, 2)),
        "gradients": max(_difference(runs[i][1], runs[i + 1][1]) for i in (0, 2)),
    }


def _run(model: nn.Module, inputs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(1)
    outputs = [out for out in _tensors(model(**inputs)) if out.requires_grad]
    if not outputs:  # a loss has no parameters
        inputs = {k: v.clone().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
        outputs = [out for out in _tensors(model(**inputs)) if out.requires_grad]
    wanted = [p for p in model.parameters() if p.requires_grad] or [v for v in inputs.values() if v.requires_grad]
    generator = torch.Generator().manual_seed(2)
    total = torch.stack([(out * torch.randn(out.shape, generator=generator)).sum() for out in outputs]).sum()
    found = torch.autograd.grad(total, wanted, allow_unused=True)
    return [out.detach() for out in outputs], [g for g in found if g is not None]


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _tensors(part)


def _difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    """The largest, of the largest value of all."""
    largest = max(float(value.abs().max()) for value in expected if value.numel())
    pairs = zip(actual, expected, strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs if b.numel()) / largest


def main(arguments: list[str] | None = None) -> None:
    """A line of JSON for each model; an `error` where its library can't build or run it."""
    parser = argparse.ArgumentParser(description="compare small models before and after evakernels.accelerate")
    parser.add_argument("library", choices=("timm", "open_clip", "transformers", "torchvision"))
    parser.add_argument("--all", action="store_true", help="every model of timm's class Eva, and every DINOv2")
    parser.add_argument("--by-behaviour", action="store_true", help="with no form known: what is replaced was tried")
    options = parser.parse_args(arguments)
    if options.by_behaviour:
        _form._known = dict  # type: ignore[assignment]
    for name, model in models(options.library, options.all).items():
        try:
            found = compare(model, "verify" if options.by_behaviour else "skip")
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"}
        print(json.dumps({"model": name, **found}), flush=True)


if __name__ == "__main__":
    main()
