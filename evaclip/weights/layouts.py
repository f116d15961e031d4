"""Names and packing of the same weights in different files.

Models here use the names of the original EVA-CLIP release. open_clip has its own for the parts of the vision
tower, which are timm's with a prefix; old files have the text tower without a prefix; training programs wrap the
names or the whole dictionary. No value is ever changed.

A file may hold an image tower alone, under the names of the whole model without `visual.`. Files of masked image
modelling, which CLIP training starts from, and timm's do. timm puts several parameters into one tensor: both SwiGLU
matrices of the two smallest EVA-02 models, as the authors' files do, and the bias of q, k and v of EVA-L. The bias of k
is 0 here: it adds the same to all scores of a query, which changes no result. timm's NaFlexVit has the embeddings under
`embeds.`, a linear layer for the convolution and no positions for class token and registers, which are one tensor here.
SigLIP 2 of transformers has almost the same tower.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from evaclip.errors import UserError
from evaclip.weights.transformers_names import is_siglip2, rename_tower

_WRAPPERS = ("model", "module", "state_dict")
_PARALLEL, _COMPILED = "module.", "_orig_mod."
_FLAT_TEXT = ("text_projection", "positional_embedding", "token_embedding", "transformer", "ln_final")
# Tables are computed, never loaded: files disagree on their shape, and 16-bit files round them.
_TABLES = re.compile(r"(^|\.)(rope\.freqs_(cos|sin)|embeddings\.position_ids)$")

_ORIGINAL, _OPEN_CLIP = "visual.", "visual.trunk."
MASKED_IMAGE = re.compile(r"(mask_token|lm_head|decoder_blocks|decoder_norm)(\.|$)")
"""Prefixes of the parameters that only masked image modelling has."""
_IN_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")
# Inside a block, original -> open_clip; each pair also holds for names that continue with a dot.
_SPLIT_QKV_NAMES = {
    "attn.q_bias": "attn.q_proj.bias",
    "attn.v_bias": "attn.v_proj.bias",
    "attn.inner_attn_ln": "attn.norm",
}
_SWIGLU_NAMES = {"mlp.w1": "mlp.fc1_g", "mlp.w2": "mlp.fc1_x", "mlp.ffn_ln": "mlp.norm", "mlp.w3": "mlp.fc2"}
# A table applies to a model with one of these parameters.
_SPLIT_QKV_SIGNS = ("attn.q_proj.weight",)
_SWIGLU_SIGNS = ("mlp.w1.weight", "mlp.fc1_g.weight")


def to_original(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """Rename a state dict of any known layout to the names of the original EVA-CLIP, which models here use.

    Raises:
        UserError: for anything but a state dict.
    """
    state = unwrapped(state)
    if is_siglip2(state):
        return _of_siglip2(state)
    flat = {
        f"text.{name}" if name.split(".")[0] in _FLAT_TEXT else name: tensor
        for name, tensor in _without_naflex(state).items()
        if not _TABLES.search(name)
    }
    old = _OPEN_CLIP if any(name.startswith(_OPEN_CLIP) for name in flat) else ""
    if not old and not is_image_tower(flat):
        return flat
    flat = unpack(flat)
    names = {theirs: ours for ours, theirs in _block_names(flat).items()}
    return {_renamed(name, old, _ORIGINAL if old else "", names): tensor for name, tensor in flat.items()}


def to_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the state dict of a model here to open_clip's names; `to_original` is the inverse.

    Raises:
        UserError: for an image tower alone.
    """
    if is_image_tower(state):
        raise UserError("the weights are those of an image tower alone; open_clip's layout has a text tower too")
    packed = pack(state)
    names = _block_names(packed)
    return {_renamed(name, _ORIGINAL, _OPEN_CLIP, names): tensor for name, tensor in packed.items()}


def to_timm(state: Mapping[str, Tensor], joint_bias: bool = False) -> dict[str, Tensor]:
    """Rename the image tower of a CLIP, or an image tower alone, to timm's names.

    Weights of masked image modelling lose the parameters that timm's models lack; their last norm becomes `fc_norm`.

    Args:
        state: tensors with this package's parameter names.
        joint_bias: for `eva_large_*`, where timm has one bias for q, k and v.
    """
    old = "" if is_image_tower(state) else _ORIGINAL
    if "mask_token" in state:
        kept = {name: tensor for name, tensor in state.items() if not MASKED_IMAGE.match(name)}
        state = {re.sub(r"^norm\.", "fc_norm.", name): tensor for name, tensor in kept.items()}
    packed = pack({name: tensor for name, tensor in state.items() if name.startswith(old)}, joint_bias)
    names = _block_names(packed)
    return {_renamed(name, old, "", names): tensor for name, tensor in packed.items()}


def is_image_tower(names: Iterable[str]) -> bool:
    """Whether parameters with these names are an image tower alone."""
    return any(name.startswith("blocks.") for name in names)


def _of_siglip2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reshape SigLIP 2 of transformers to the parameters here."""
    vision = unpack(_without_naflex(rename_tower(state, "vision")))
    named = {f"{_ORIGINAL}{name}": tensor for name, tensor in vision.items()}
    named |= {f"text.{name}": tensor for name, tensor in rename_tower(state, "text").items()}
    return named | {name: state[name].reshape(()) for name in ("logit_scale", "logit_bias") if name in state}


def _without_naflex(state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Rename and reshape timm's NaFlexVit to the parameters of timm's other image models."""
    if "embeds.proj.weight" not in state or "embeds.pos_embed" not in state:
        return state
    renamed = {name.replace("embeds.proj.", "patch_embed.proj.").removeprefix("embeds."): state[name] for name in state}
    renamed = {re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name): tensor for name, tensor in renamed.items()}
    for name in [name for name in renamed if name.endswith(".attn.qkv.weight")]:
        attention = name.removesuffix("qkv.weight")
        if f"{attention}q_bias" not in renamed:
            renamed.setdefault(f"{attention}qkv.bias", renamed[name].new_zeros(len(renamed[name])))
    weight, positions = state["embeds.proj.weight"], state["embeds.pos_embed"]
    if weight.ndim == 2:  # SigLIP 2 of one image size has a convolution
        side = math.isqrt(weight.shape[1] // 3)
        renamed["patch_embed.proj.weight"] = weight.unflatten(1, (side, side, 3)).permute(0, 3, 1, 2)
    positions = positions.reshape(1, -1, positions.shape[-1])
    prefix = [renamed.pop(name) for name in ("cls_token", "reg_token") if name in renamed]
    if prefix:
        renamed["cls_token"] = torch.cat(prefix, 1)
        positions = torch.cat((torch.zeros_like(renamed["cls_token"]), positions), 1)
    renamed["pos_embed"] = positions
    return renamed


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
    """Tensors of a state dict without the wrappers of training programs.

    Raises:
        UserError: for anything but a state dict.
    """
    for key in _WRAPPERS:
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    others = [str(name) for name, value in state.items() if not (isinstance(name, str) and isinstance(value, Tensor))]
    if others or not state:
        content = f"other things under {', '.join(others[:5])}" if others else "nothing"
        wrappers = " or ".join(_WRAPPERS)
        raise UserError(f"the weights hold {content}; expected tensors by name, or those under {wrappers}")
    tensors = {name.replace(_COMPILED, ""): tensor for name, tensor in state.items()}
    if all(name.startswith(_PARALLEL) for name in tensors):
        return {name.removeprefix(_PARALLEL): tensor for name, tensor in tensors.items()}
    return tensors


def unpack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with one tensor per matrix and bias."""
    unpacked: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, layer, kind = _split(name)
        is_gated = layer == "w12" or (layer in ("fc1", "fc2") and _is_gated(state, module))
        if is_gated and layer == "fc2":
            unpacked[f"{module}.w3.{kind}"] = tensor
        elif is_gated:
            unpacked[f"{module}.w1.{kind}"], unpacked[f"{module}.w2.{kind}"] = tensor.chunk(2)
        elif (layer, kind) == ("qkv", "bias"):
            unpacked[f"{module}.q_bias"], _, unpacked[f"{module}.v_bias"] = tensor.chunk(3)
        else:
            unpacked[name] = tensor
    return unpacked


def to_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename an image tower alone to the authors' names of masked image modelling and fine-tuning.

    Both matrices of a SwiGLU without a norm are one there, `w12`.
    """
    packed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        module, layer, kind = _split(name)
        if layer not in ("w1", "w2") or f"{module}.ffn_ln.weight" in state:
            packed[name] = tensor
        elif layer == "w1":
            packed[f"{module}.w12.{kind}"] = torch.cat([tensor, state[f"{module}.w2.{kind}"]])
    return packed


def pack(state: Mapping[str, Tensor], joint_bias: bool = False) -> dict[str, Tensor]:
    """The inverse of `unpack`, under timm's names; `joint_bias` joins the biases of q, k and v."""
    gates = to_authors(state)
    packed: dict[str, Tensor] = {}
    for name, tensor in gates.items():
        module, layer, kind = _split(name)
        if layer == "w12":
            packed[f"{module}.fc1.{kind}"] = tensor
        elif layer == "w3" and f"{module}.w12.weight" in gates:
            packed[f"{module}.fc2.{kind}"] = tensor
        elif joint_bias and kind == "q_bias":
            attention = name.removesuffix(".q_bias")
            packed[f"{attention}.qkv.bias"] = torch.cat(
                [tensor, torch.zeros_like(tensor), state[f"{attention}.v_bias"]]
            )
        elif not (joint_bias and kind == "v_bias"):
            packed[name] = tensor
    return packed


def _split(name: str) -> tuple[str, str, str]:
    """Module, layer and kind of a parameter, such as ("blocks.0.mlp", "w1", "weight")."""
    layer, _, kind = name.rpartition(".")
    module, _, layer = layer.rpartition(".")
    return module, layer, kind


def _is_gated(state: Mapping[str, Tensor], mlp: str) -> bool:
    """Whether an MLP of timm is a SwiGLU with both matrices in `fc1`."""
    first, last = state.get(f"{mlp}.fc1.weight"), state.get(f"{mlp}.fc2.weight")
    return first is not None and last is not None and first.shape[0] == 2 * last.shape[1]
