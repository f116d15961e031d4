"""Weights: files of every known layout, released models, and their preprocessing."""

from evaclip.weights.config_files import describe_preprocess, read_preprocess
from evaclip.weights.files import find_weights, load_state_dict
from evaclip.weights.layouts import to_open_clip, to_original, to_timm
from evaclip.weights.load import load_weights, materialize, start_image_tower, start_text_tower
from evaclip.weights.shards import is_dtensor, is_sharded, put, shard_like

__all__ = [
    "describe_preprocess",
    "find_weights",
    "is_dtensor",
    "is_sharded",
    "load_state_dict",
    "load_weights",
    "materialize",
    "put",
    "read_preprocess",
    "shard_like",
    "start_image_tower",
    "start_text_tower",
    "to_open_clip",
    "to_original",
    "to_timm",
]
