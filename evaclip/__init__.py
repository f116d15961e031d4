"""EVA-CLIP: the models, their weights, and a trainer, on the ops of `evakernels`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evaclip.factory import create_model, create_model_and_transforms, create_vision_model, get_tokenizer
    from evaclip.model.clip import CLIP
    from evaclip.model.config import CLIPConfig, Preprocess, TextConfig, VisionConfig, get_config, list_models
    from evaclip.model.savings import Savings
    from evaclip.model.vision_model import VisionModel
    from evaclip.transforms import Augmentation, eval_transform, train_transform
    from evaclip.weights import load_state_dict, load_weights
    from evakernels import __version__

__all__ = [
    "CLIP",
    "Augmentation",
    "CLIPConfig",
    "Preprocess",
    "Savings",
    "TextConfig",
    "VisionConfig",
    "VisionModel",
    "__version__",
    "create_model",
    "create_model_and_transforms",
    "create_vision_model",
    "eval_transform",
    "get_config",
    "get_tokenizer",
    "list_models",
    "load_state_dict",
    "load_weights",
    "train_transform",
]

_MODULES = {
    "evaclip.factory": ("create_model", "create_model_and_transforms", "create_vision_model", "get_tokenizer"),
    "evaclip.model.clip": ("CLIP",),
    "evaclip.model.config": (
        "CLIPConfig",
        "Preprocess",
        "TextConfig",
        "VisionConfig",
        "get_config",
        "list_models",
    ),
    "evaclip.model.savings": ("Savings",),
    "evaclip.model.vision_model": ("VisionModel",),
    "evaclip.transforms": ("Augmentation", "eval_transform", "train_transform"),
    "evaclip.weights": ("load_state_dict", "load_weights"),
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
