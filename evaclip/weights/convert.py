"""Weights under the names of another library."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from evaclip.errors import UserError, unknown_name
from evaclip.model.clip import CLIP
from evaclip.model.config import CLIPConfig, find_model, get_config, list_models, override
from evaclip.model.rotary import RotaryTable
from evaclip.model.vision_names import is_vision_model, vision_config
from evaclip.outputs import check_output
from evaclip.weights.files import check_suffix, load_state_dict, options_beside, save_tensors, weight_files
from evaclip.weights.layouts import is_image_tower, to_authors, to_open_clip, to_timm
from evaclip.weights.load import differences

FORMATS = ("original", "open_clip", "timm", "safetensors")
"""`original`: the authors' file, rotary tables included; `safetensors`: the same names without the tables."""


def convert(source: Path, target: Path, layout: str, model: str | None = None, *, overwrite: bool = False) -> None:
    """Writes the weights of `source`, in any layout, in another; the values and dtypes stay.

    Args:
        source: what `load_state_dict` reads.
        target: `.safetensors`, or `.pt`, `.pth`, `.bin` for a file of `torch.save`.
        layout: one of `FORMATS`.
        model: name of the configuration. `original` needs to know it; None finds it in the checkpoint that `source`
            lies in, or by the shapes.
        overwrite: replace `target` if it exists. What is read, and what lies in a run or a checkpoint, is never
            replaced.

    Raises:
        UserError: for files or names that don't fit together, or a target that may not be written; nothing is written
            then.
    """
    if layout not in FORMATS:
        raise unknown_name("layout", layout, FORMATS)
    if layout == "safetensors" and target.suffix != ".safetensors":
        raise UserError(f"{str(target)!r} doesn't end in .safetensors, which is the format asked for")
    check_suffix(target)
    if model and not is_vision_model(model):
        get_config(model)
    check_output(target, overwrite=overwrite, sources=[source, *weight_files(source)])
    state = load_state_dict(source)
    if not any(name.startswith(("blocks.", "visual.blocks.")) for name in state):
        raise UserError(f"{str(source)!r} holds no image tower of the EVA series, whose names begin with visual.blocks")
    save_tensors(_LAYOUTS[layout](state, model, source), target)


def identify(state: Mapping[str, Tensor]) -> str:
    """The shipped configuration whose model has these names and shapes.

    Raises:
        UserError: if there is none.
    """
    for name in list_models():
        if not _unlike(state, get_config(name)):
            return name
    raise UserError("the weights have the shapes of no known model; name it with --model")


def _unlike(state: Mapping[str, Tensor], config: CLIPConfig) -> list[str]:
    """In what names and shapes the weights aren't those of the model, whatever its loss."""
    with torch.device("meta"):
        expected = CLIP(config).state_dict()
    expected.pop("logit_bias", None)
    return differences({name: tensor for name, tensor in state.items() if name != "logit_bias"}, expected)


def _config_of(state: Mapping[str, Tensor], model: str | None, source: Path) -> CLIPConfig:
    """What the weights are of: as the training that they lie in says, or by name, or by the shapes.

    Raises:
        UserError: there is no such model, or the weights aren't of that one.
    """
    options = options_beside(source) or {"name": model or identify(state)}
    name = str(options.pop("name"))
    if model and find_model(model) != find_model(name):
        raise UserError(f"the weights are of {name!r}, not of {model!r}; leave --model out")
    config = override(get_config(name), options)
    if unlike := _unlike(state, config):
        raise UserError(f"the weights aren't of {name!r}: {'; '.join(unlike)}")
    return config


def _with_rotary_tables(state: Mapping[str, Tensor], model: str | None, source: Path) -> dict[str, Tensor]:
    """The authors' layout: their files of CLIP hold the tables once for the tower and once for each block."""
    if is_image_tower(state):
        return to_authors(state)
    vision = _config_of(state, model, source).vision
    if not vision.rope:
        return dict(state)
    table = RotaryTable(vision)
    tables = {kind: values.repeat_interleave(2, -1) for kind, values in (("cos", table.cos), ("sin", table.sin))}
    places = ["visual.rope", *(f"visual.blocks.{block}.attn.rope" for block in range(vision.layers))]
    dtype = state["visual.pos_embed"].dtype
    rotary = {f"{place}.freqs_{kind}": values.to(dtype) for place in places for kind, values in tables.items()}
    return {**state, **{name: tensor.clone() for name, tensor in rotary.items()}}


def _is_large(state: Mapping[str, Tensor]) -> bool:
    """Whether the image tower is an `eva_large_*`, by its width and by q, k and v in one matrix."""
    qkv = state.get("blocks.0.attn.qkv.weight", state.get("visual.blocks.0.attn.qkv.weight"))
    return qkv is not None and qkv.shape[1] == vision_config("eva_large_patch14_196").width


_LAYOUTS: dict[str, Callable[[dict[str, Tensor], str | None, Path], dict[str, Tensor]]] = {
    "original": _with_rotary_tables,
    "open_clip": lambda state, *_: to_open_clip(state),
    "timm": lambda state, *_: to_timm(state, joint_bias=_is_large(state)),
    "safetensors": lambda state, *_: state,
}
