"""EVA-CLIP: the models, their weights, and a trainer, on the ops of `evakernels`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaclip.augmentation import Augmentation as Augmentation
    from evaclip.eval.zero_shot import IMAGENET_CLASSNAMES as IMAGENET_CLASSNAMES
    from evaclip.eval.zero_shot import OPENAI_IMAGENET_TEMPLATES as OPENAI_IMAGENET_TEMPLATES
    from evaclip.eval.zero_shot import SIMPLE_IMAGENET_TEMPLATES as SIMPLE_IMAGENET_TEMPLATES
    from evaclip.eval.zero_shot import build_zero_shot_classifier as build_zero_shot_classifier
    from evaclip.factory import create_model as create_model
    from evaclip.factory import create_model_and_transforms as create_model_and_transforms
    from evaclip.factory import create_model_from_pretrained as create_model_from_pretrained
    from evaclip.factory import create_vision_model as create_vision_model
    from evaclip.factory import get_model_config as get_model_config
    from evaclip.factory import get_tokenizer as get_tokenizer
    from evaclip.factory import list_pretrained as list_pretrained
    from evaclip.factory import list_pretrained_tags_by_model as list_pretrained_tags_by_model
    from evaclip.factory import list_vision_models as list_vision_models
    from evaclip.model.clip import CLIP as CLIP
    from evaclip.model.config import CLIPConfig as CLIPConfig
    from evaclip.model.config import Preprocess as Preprocess
    from evaclip.model.config import Savings as Savings
    from evaclip.model.config import TextConfig as TextConfig
    from evaclip.model.config import VisionConfig as VisionConfig
    from evaclip.model.config import add_model_config as add_model_config
    from evaclip.model.config import get_config as get_config
    from evaclip.model.config import list_models as list_models
    from evaclip.model.vision_model import VisionModel as VisionModel
    from evaclip.packing import PackedImages as PackedImages
    from evaclip.packing import pack_images as pack_images
    from evaclip.runtime.encoder import Encoder as Encoder
    from evaclip.tokenizer import Tokenizer as Tokenizer
    from evaclip.tokenizer import decode as decode
    from evaclip.tokenizer import tokenize as tokenize
    from evaclip.transforms import eval_transform as eval_transform
    from evaclip.transforms import train_transform as train_transform
    from evaclip.weights import load_state_dict as load_state_dict
    from evaclip.weights import load_weights as load_weights
    from evaclip.weights.publish import push_to_hf_hub as push_to_hf_hub
    from evaclip.weights.publish import save_for_hf as save_for_hf
    from evakernels import __version__ as __version__

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
    "evaclip.packing": ("PackedImages", "pack_images"),
    "evaclip.model.vision_model": ("VisionModel",),
    "evaclip.runtime.encoder": ("Encoder",),
    "evaclip.tokenizer": ("Tokenizer", "decode", "tokenize"),
    "evaclip.transforms": ("eval_transform", "train_transform"),
    "evaclip.weights": ("load_state_dict", "load_weights"),
    "evaclip.weights.publish": ("push_to_hf_hub", "save_for_hf"),
    "evakernels": ("__version__",),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    # Loaded on first use: `import evaclip` and `evaclip --help` shouldn't wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module 'evaclip' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
