"""The names that the same weights have in different files.

Models here use the names of the original EVA-CLIP release. open_clip has its own for the parts of the vision
tower; old files have the text tower without a prefix; training programs wrap the names or the whole
dictionary. No tensor is ever changed.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from evaclip.errors import UserError

_WRAPPERS = ("model", "module", "state_dict")
_PARALLEL = "module."
_FLAT_TEXT = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
# Rotary tables are computed, never loaded: files disagree on their shape, and 16-bit files round them.
_ROTARY = re.compile(r"(^|\.)rope\.freqs_(cos|sin)$")

_ORIGINAL, _OPEN_CLIP = "visual.", "visual.trunk."
_IN_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")
# Inside a block, original -> open_clip; each pair also stands for all names that go on with a dot.
_SPLIT_QKV_NAMES = {
    "attn.q_bias": "attn.q_proj.bias",
    "attn.v_bias": "attn.v_proj.bias",
    "attn.inner_attn_ln": "attn.norm",
}
_SWIGLU_NAMES = {
    "mlp.w1": "mlp.fc1_g",
    "mlp.w2": "mlp.fc1_x",
    "mlp.ffn_ln": "mlp.norm",
    "mlp.w3": "mlp.fc2",
}
# A table holds for a model that has one of these parameters.
_SPLIT_QKV_SIGNS = ("attn.q_proj.weight",)
_SWIGLU_SIGNS = ("mlp.w1.weight", "mlp.fc1_g.weight")


def to_original(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """A state dict of any known layout in that of the original EVA-CLIP, which models here use.

    Raises:
        UserError: for contents that are no state dict.
    """
    flat = _without_parallel_prefix(_unwrapped(state))
    flat = {_with_text_prefix(name): tensor for name, tensor in flat.items() if not _ROTARY.search(name)}
    if not any(name.startswith(_OPEN_CLIP) for name in flat):
        return flat
    names = {theirs: ours for ours, theirs in _block_names(flat).items()}
    return {_renamed(name, _OPEN_CLIP, _ORIGINAL, names): tensor for name, tensor in flat.items()}


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a model here under open_clip's names; `to_original` is its inverse."""
    names = _block_names(state)
    return {_renamed(name, _ORIGINAL, _OPEN_CLIP, names): tensor for name, tensor in state.items()}


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


def _unwrapped(state: Mapping[str, Any]) -> dict[str, Tensor]:
    for key in _WRAPPERS:
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    strangers = [str(name) for name, value in state.items() if not isinstance(value, Tensor)]
    if strangers or not state:
        found = f"other things under {', '.join(strangers[:5])}" if strangers else "nothing"
        wrappers = " or ".join(_WRAPPERS)
        raise UserError(f"the weights hold {found}; expected tensors by name, or those under {wrappers}")
    return dict(state)


def _without_parallel_prefix(state: dict[str, Tensor]) -> dict[str, Tensor]:
    if all(name.startswith(_PARALLEL) for name in state):
        return {name.removeprefix(_PARALLEL): tensor for name, tensor in state.items()}
    return state


def _with_text_prefix(name: str) -> str:
    return f"text.{name}" if name.split(".")[0] in _FLAT_TEXT else name
