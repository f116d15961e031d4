"""EVA-CLIP: the models, their weights, and a trainer, on the ops of `evakernels`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaclip.augmentation import Augmentation
    from evaclip.eval.zero_shot import (
        IMAGENET_CLASSNAMES,
        OPENAI_IMAGENET_TEMPLATES,
        SIMPLE_IMAGENET_TEMPLATES,
        build_zero_shot_classifier,
    )
    from evaclip.factory import (
        create_model,
        create_model_and_transforms,
        create_model_from_pretrained,
        create_vision_model,
        get_model_config,
        get_tokenizer,
        list_pretrained,
        list_pretrained_tags_by_model,
        list_vision_models,
    )
    from evaclip.model.clip import CLIP
    from evaclip.model.config import (
        CLIPConfig,
        Preprocess,
        Savings,
        TextConfig,
        VisionConfig,
        add_model_config,
        get_config,
        list_models,
    )
    from evaclip.model.packing import PackedImages, pack_images
    from evaclip.model.vision_model import VisionModel
    from evaclip.runtime.encoder import Encoder
    from evaclip.tokenizer import Tokenizer, decode, tokenize
    from evaclip.transforms import eval_transform, train_transform
    from evaclip.weights import load_state_dict, load_weights
    from evaclip.weights.publish import push_to_hf_hub, save_for_hf
    from evakernels import __version__

__all__ = [
    "CLIP",
    "IMAGENET_CLASSNAMES",
    "OPENAI_IMAGENET_TEMPLATES",
    "SIMPLE_IMAGENET_TEMPLATES",
    "Augmentation",
    "CLIPConfig",
    "Encoder",
    "PackedImages",
    "Preprocess",
    "Savings",
    "TextConfig",
    "Tokenizer",
    "VisionConfig",
    "VisionModel",
    "__version__",
    "add_model_config",
    "build_zero_shot_classifier",
    "create_model",
    "create_model_and_transforms",
    "create_model_from_pretrained",
    "create_vision_model",
    "decode",
    "eval_transform",
    "get_config",
    "get_model_config",
    "get_tokenizer",
    "list_models",
    "list_pretrained",
    "list_pretrained_tags_by_model",
    "list_vision_models",
    "load_state_dict",
    "load_weights",
    "pack_images",
    "push_to_hf_hub",
    "save_for_hf",
    "tokenize",
    "train_transform",
]

_MODULES = {
    "evaclip.augmentation": ("Augmentation",),
    "evaclip.eval.zero_shot": (
        "IMAGENET_CLASSNAMES",
        "OPENAI_IMAGENET_TEMPLATES",
        "SIMPLE_IMAGENET_TEMPLATES",
        "build_zero_shot_classifier",
    ),
    "evaclip.factory": (
        "create_model",
        "create_model_and_transforms",
        "create_model_from_pretrained",
        "create_vision_model",
        "get_model_config",
        "get_tokenizer",
        "list_pretrained",
        "list_pretrained_tags_by_model",
        "list_vision_models",
    ),
    "evaclip.model.clip": ("CLIP",),
    "evaclip.model.config": (
        "CLIPConfig",
        "Preprocess",
        "Savings",
        "TextConfig",
        "VisionConfig",
        "add_model_config",
        "get_config",
        "list_models",
    ),
    "evaclip.model.packing": ("PackedImages", "pack_images"),
    "evaclip.model.vision_model": ("VisionModel",),
    "evaclip.runtime.encoder": ("Encoder",),
    "evaclip.tokenizer": ("Tokenizer", "decode", "tokenize"),
    "evaclip.transforms": ("eval_transform", "train_transform"),
    "evaclip.weights": ("load_state_dict", "load_weights"),
    "evaclip.weights.publish": ("push_to_hf_hub", "save_for_hf"),
    "evakernels": ("__version__",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    # Loaded on first use: `import evaclip` and `evaclip --help` shouldn't wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'evaclip' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
