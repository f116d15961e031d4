"""Reading weights: files of every known layout, released models, and their preprocessing."""

from evaclip.weights.files import find_weights, load_state_dict
from evaclip.weights.layouts import to_open_clip, to_original
from evaclip.weights.load import load_weights
from evaclip.weights.preprocess import describe_preprocess, read_preprocess

__all__ = [
    "describe_preprocess",
    "find_weights",
    "load_state_dict",
    "load_weights",
    "read_preprocess",
    "to_open_clip",
    "to_original",
]
