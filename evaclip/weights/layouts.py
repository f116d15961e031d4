"""The names that the same weights have in different files.

Models here use the names of the original EVA-CLIP release. open_clip has its own for the parts of the vision
tower, which are timm's with a prefix; old files have the text tower without a prefix; training programs wrap the
names or the whole dictionary. No tensor is ever changed.

A file may hold an image tower alone, under the names of the whole model without `visual.`: those of masked image
modelling, which CLIP training starts from, and timm's. Some of timm's put several tensors into one; see `packing`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from evaclip.errors import UserError
from evaclip.weights.packing import pack, pack_gates, unpack

_WRAPPERS = ("model", "module", "state_dict")
_PARALLEL, _COMPILED = "module.", "_orig_mod."
_FLAT_TEXT = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
# Rotary tables are computed, never loaded: files disagree on their shape, and 16-bit files round them.
_ROTARY = re.compile(r"(^|\.)rope\.freqs_(cos|sin)$")

_ORIGINAL, _OPEN_CLIP = "visual.", "visual.trunk."
MASKED_IMAGE = re.compile(r"(mask_token|lm_head|decoder_blocks|decoder_norm)(\.|$)")
"""How the names begin of what masked image modelling has beside the model."""
_IN_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")
# Inside a block, original -> open_clip; each pair also stands for all names that go on with a dot.
_SPLIT_QKV_NAMES = {
    "attn.q_bias": "attn.q_proj.bias",
    "attn.v_bias": "attn.v_proj.bias",
    "attn.inner_attn_ln": "attn.norm",
}
_SWIGLU_NAMES = {"mlp.w1": "mlp.fc1_g", "mlp.w2": "mlp.fc1_x", "mlp.ffn_ln": "mlp.norm", "mlp.w3": "mlp.fc2"}
# A table holds for a model that has one of these parameters.
_SPLIT_QKV_SIGNS = ("attn.q_proj.weight",)
_SWIGLU_SIGNS = ("mlp.w1.weight", "mlp.fc1_g.weight")


def to_original(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict of any known layout in that of the original EVA-CLIP, which models here use.

    Raises:
        UserError: for contents that are no state dict.
    """
    flat = {_with_text_prefix(name): tensor for name, tensor in unwrapped(state).items() if not _ROTARY.search(name)}
    old = _OPEN_CLIP if any(name.startswith(_OPEN_CLIP) for name in flat) else ""
    if not old and not is_image_tower(flat):
        return flat
    flat = unpack(flat)
    names = {theirs: ours for ours, theirs in _block_names(flat).items()}
    return {_renamed(name, old, _ORIGINAL if old else "", names): tensor for name, tensor in flat.items()}


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model here under open_clip's names; `to_original` is its inverse.

    Raises:
        UserError: for an image tower alone.
    """
    if is_image_tower(state):
        raise UserError("the weights are those of an image tower alone; open_clip's layout has a text tower too")
    packed = pack(state)
    names = _block_names(packed)
    return {_renamed(name, _ORIGINAL, _OPEN_CLIP, names): tensor for name, tensor in packed.items()}


def to_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An image tower alone under the names of the authors' files of masked image modelling and fine-tuning."""
    return pack_gates(state)


def to_timm(state: Mapping[str, Tensor], joint_bias: bool = False) -> dict[str, Tensor]:
    """The image tower of a model here, or an image tower alone, under timm's names.

    From masked image modelling it leaves with what timm's models have, its last norm behind the mean of the patches.

    `joint_bias` is for `eva_large_*`, whose q, k and v have one bias there.
    """
    old = "" if is_image_tower(state) else _ORIGINAL
    if "mask_token" in state:
        kept = {name: tensor for name, tensor in state.items() if not MASKED_IMAGE.match(name)}
        state = {re.sub(r"^norm\.", "fc_norm.", name): tensor for name, tensor in kept.items()}
    packed = pack({name: tensor for name, tensor in state.items() if name.startswith(old)}, joint_bias)
    names = _block_names(packed)
    return {_renamed(name, old, "", names): tensor for name, tensor in packed.items()}


def is_image_tower(names: Iterable[str]) -> bool:
    """Whether these are the names of an image tower alone."""
    return any(name.startswith("blocks.") for name in names)


def _block_names(names: Iterable[str]) -> dict[str, str]:
    present = tuple(names)
    table: dict[str, str] = {}
    for signs, entries in ((_SPLIT_QKV_SIGNS, _SPLIT_QKV_NAMES), (_SWIGLU_SIGNS, _SWIGLU_NAMES)):
        if any(name.endswith(signs) for name in present):
            table |= entries
    return table


def _renamed(name: str, old_prefix: str, new_prefix: str, block_names: Mapping[str, str]) -> str:
    if not name.startswith(old_prefix):
        return name
    rest = name.removeprefix(old_prefix)
    if match := _IN_BLOCK.fullmatch(rest):
        rest = match[1] + _renamed_in_block(match[2], block_names)
    return new_prefix + rest


def _renamed_in_block(name: str, block_names: Mapping[str, str]) -> str:
    for old, new in block_names.items():
        if name == old or name.startswith(old + "."):
            return new + name.removeprefix(old)
    return name


def unwrapped(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state dict without the wrappers of training programs.

    Raises:
        UserError: for contents that are no state dict.
    """
    for key in _WRAPPERS:
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    strangers = [
        str(name) for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))
    ]
    if strangers or not state:
        found = f"other things under {', '.join(strangers[:5])}" if strangers else "nothing"
        wrappers = " or ".join(_WRAPPERS)
        raise UserError(f"the weights hold {found}; expected tensors by name, or those under {wrappers}")
    return _without_parallel_prefix({name.replace(_COMPILED, ""): tensor for name, tensor in state.items()})


def _without_parallel_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if all(name.startswith(_PARALLEL) for name in state):
        return {name.removeprefix(_PARALLEL): tensor for name, tensor in state.items()}
    return state


def _with_text_prefix(name: str) -> str:
    return f"text.{name}" if name.split(".")[0] in _FLAT_TEXT else name
