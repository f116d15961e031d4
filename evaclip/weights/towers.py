"""Starting a CLIP model or a classifier from the weights of other models, tower by tower.

The image tower starts from masked image modelling (EVA, EVA-02), a CLIP model or a classifier; the text tower from a
CLIP model of OpenAI, open_clip, transformers or EVA. What belongs to the other task is left out: the heads, the mask
token, the projections and the temperature (Sun et al. 2023, section 3).
"""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from evaclip.errors import UserError
from evaclip.model.vision import VisionTower
from evaclip.weights.files import read_tensors
from evaclip.weights.layouts import is_image_tower, to_original
from evaclip.weights.load import differences, fit_image_size, summarize, with_last_norm_of
from evaclip.weights.shards import put

_log = logging.getLogger(__name__)

_IMAGE_SKIPPED = re.compile(r"(head|lm_head|mask_token|decoder\w*|text_projection|logit_scale)(\.|$)")
_TEXT_SKIPPED = re.compile(r"(text_projection|logit_scale|logit_bias)(\.|$)")
_TEXT, _IMAGE = "text.", "visual."

_HF_TEXT = "text_model."
_HF_NAMES = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.": "ln_final.",
}
_HF_LAYER = re.compile(r"text_model\.encoder\.layers\.(\d+)\.(.+)")
_HF_LAYER_NAMES = {
    "self_attn.out_proj.": "attn.out_proj.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}


def start_image_tower(tower: VisionTower, source: Path | Mapping[str, Tensor], antialias: bool = False) -> None:
    """Copies the image tower of `source` into `tower`, a `VisionTower`.

    Position embedding and patch kernel are resized to the tower's, as the authors did (bicubic), or with `antialias`
    as timm does. The head keeps its start values; so do parameters that the source lacks, which are named in a warning.

    Raises:
        UserError: naming every unexpected and misshapen parameter; the tower is then unchanged.
    """
    state = to_original(source if isinstance(source, Mapping) else read_tensors(source))
    if not is_image_tower(state):
        state = {name.removeprefix(_IMAGE): t for name, t in state.items() if name.startswith(_IMAGE)}
    state = with_last_norm_of(tower, state)
    state = {name: tensor for name, tensor in state.items() if not _IMAGE_SKIPPED.match(name)}
    fit_image_size(state, tower.state_dict(), tower.config.grid, antialias=antialias)
    _start(tower, state, "image tower", source, ("head.", "lm_head.", "mask_token", "decoder_"))


def start_text_tower(tower: nn.Module, source: Path | Mapping[str, Tensor]) -> None:
    """Copies the text tower of `source` into `tower`, a `TextTower`; its projection keeps its start values.

    Raises:
        UserError: as `start_image_tower`.
    """
    tensors = source if isinstance(source, Mapping) else read_tensors(source)
    if any(name.startswith(_HF_TEXT) for name in tensors):
        state = _from_transformers(tensors)
    else:
        state = {n.removeprefix(_TEXT): t for n, t in to_original(tensors).items() if n.startswith(_TEXT)}
    state = {name: tensor for name, tensor in state.items() if not _TEXT_SKIPPED.match(name)}
    _start(tower, state, "text tower", source, ("text_projection",))


def _start(
    tower: nn.Module, state: Mapping[str, Tensor], kind: str, source: Path | Mapping[str, Tensor], own: tuple[str, ...]
) -> None:
    origin = "the weights" if isinstance(source, Mapping) else f"the weights {str(source)!r}"
    if not state:
        raise UserError(f"{origin} have no {kind}")
    expected = {name: tensor for name, tensor in tower.state_dict().items() if not name.startswith(own)}
    problems = differences({**expected, **state}, expected)
    if problems:
        raise UserError(f"{origin} don't fit the {kind}: {'; '.join(problems)}")
    missing = expected.keys() - state.keys()
    if missing:
        listed = ", ".join(summarize(missing))
        _log.warning("%s lack %s of the %s; they keep their start values", origin, listed, kind)
    put(tower, state, strict=False)


def _from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text tower of a CLIP model of transformers, whose q, k and v are matrices of their own."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := _HF_LAYER.fullmatch(name):
            rest = _replaced(match[2], _HF_LAYER_NAMES)
            if rest is not None:
                found[f"transformer.resblocks.{match[1]}.{rest}"] = tensor
            elif match[2] == "self_attn.q_proj.weight":
                found |= _packed(state, match[1])
            elif not match[2].startswith("self_attn."):
                found[name] = tensor  # Unknown: it is reported as unexpected.
        elif (known := _replaced(name, _HF_NAMES)) is not None:
            found[known] = tensor
    return found


def _packed(state: Mapping[str, Tensor], layer: str) -> dict[str, Tensor]:
    """q, k and v of a layer as one matrix and one bias; what is incomplete is left out, and so reported as missing."""
    packed = {}
    for kind in ("weight", "bias"):
        names = [f"text_model.encoder.layers.{layer}.self_attn.{part}_proj.{kind}" for part in "qkv"]
        if all(name in state for name in names):
            joined = torch.cat([state[name] for name in names])
            packed[f"transformer.resblocks.{layer}.attn.in_proj_{kind}"] = joined
    return packed


def _replaced(name: str, table: Mapping[str, str]) -> str | None:
    for old, new in table.items():
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name.removeprefix(old)
    return None
