"""Lists of models and weights, with the function names of open_clip and timm."""

from fnmatch import fnmatch
from typing import Any

from evaclip.model.config import find_model, get_config
from evaclip.model.vision_names import RELEASES
from evaclip.weights.hub import RELEASED


def list_pretrained(as_str: bool = False) -> list[tuple[str, str]] | list[str]:
    """Model and tag of all released weights, or `MODEL:TAG` if `as_str`.

    Example:
        `("EVA02-CLIP-B-16", "merged2b_s8b_b131k") in evaclip.list_pretrained()`
    """
    pairs = [(model, tag) for model, tags in RELEASED.items() for tag in tags]
    return [":".join(pair) for pair in pairs] if as_str else pairs


def list_pretrained_tags_by_model(model: str) -> list[str]:
    """The tags of a model's released weights; none for a model without any.

    Example:
        `evaclip.list_pretrained_tags_by_model("EVA02-B-16")` is `["eva_clip", "merged2b_s8b_b131k"]`.
    """
    return list(RELEASED.get(find_model(model) or "", {}))


def list_vision_models(filter: str = "", pretrained: bool = False) -> list[str]:
    """Names for `create_vision_model`.

    Args:
        filter: a pattern with `*` and `?`; empty for all.
        pretrained: list `NAME.TAG` for each of the released weights.

    Example:
        `evaclip.list_vision_models("eva02_base*", pretrained=True)`
    """
    names = [f"{name}.{tag}" for name, tags in RELEASES.items() for tag in tags] if pretrained else list(RELEASES)
    return sorted(name for name in names if fnmatch(name, filter or "*"))


def get_model_config(model_name: str) -> dict[str, Any]:
    """All options of a model as plain data.

    Raises:
        UserError: for an unknown name, with the nearest known ones.

    Example:
        `evaclip.get_model_config("EVA02-B-16")["vision"]["patch_size"]` is 16.
    """
    return get_config(model_name).to_dict()
