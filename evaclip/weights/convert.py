"""Weights under the names of another library."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from evaclip.errors import UserError, unknown_name
from evaclip.model.clip import CLIP
from evaclip.model.config import CLIPConfig, get_config, list_models
from evaclip.model.rotary import RotaryTable
from evaclip.outputs import check_output
from evaclip.weights.files import check_suffix, load_state_dict, save_tensors, weight_files
from evaclip.weights.layouts import is_image_tower, to_authors, to_open_clip, to_timm

FORMATS = ("original", "open_clip", "timm", "safetensors")
"""`original`: the authors' file, rotary tables included; `safetensors`: the same names without the tables."""


def convert(source: Path, target: Path, layout: str, model: str | None = None, *, overwrite: bool = False) -> None:
    """Writes the weights of `source`, in any layout, in another; the values and dtypes stay.

    Args:
        source: what `load_state_dict` reads.
        target: `.safetensors`, or `.pt`, `.pth`, `.bin` for a file of `torch.save`.
        layout: one of `FORMATS`.
        model: name of the configuration. `original` needs to know it, and finds it by the shapes for None; so does
            `timm` of an `eva_large_*`.
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
    check_output(target, overwrite=overwrite, sources=[source, *weight_files(source)])
    state = load_state_dict(source)
    save_tensors(_LAYOUTS[layout](state, model), target)


def identify(state: Mapping[str, Tensor]) -> str:
    """The shipped configuration whose model has these names and shapes.

    Raises:
        UserError: if there is none.
    """
    shapes = {name: tensor.shape for name, tensor in state.items() if name != "logit_bias"}
    for name in list_models():
        if _shapes(get_config(name)) == shapes:
            return name
    raise UserError("the weights have the shapes of no known model; name it with --model")


def _shapes(config: CLIPConfig) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in CLIP(config).state_dict().items()}


def _with_rotary_tables(state: Mapping[str, Tensor], model: str | None) -> dict[str, Tensor]:
    """The authors' layout: their files of CLIP hold the tables once for the tower and once for each block."""
    if is_image_tower(state):
        return to_authors(state)
    vision = get_config(model or identify(state)).vision
    if not vision.rope:
        return dict(state)
    table = RotaryTable(vision)
    tables = {kind: values.repeat_interleave(2, -1) for kind, values in (("cos", table.cos), ("sin", table.sin))}
    places = ["visual.rope", *(f"visual.blocks.{block}.attn.rope" for block in range(vision.layers))]
    dtype = state["visual.pos_embed"].dtype
    rotary = {f"{place}.freqs_{kind}": values.to(dtype) for place in places for kind, values in tables.items()}
    return {**state, **{name: tensor.clone() for name, tensor in rotary.items()}}


_LAYOUTS: dict[str, Callable[[dict[str, Tensor], str | None], dict[str, Tensor]]] = {
    "original": _with_rotary_tables,
    "open_clip": lambda state, model: to_open_clip(state),
    "timm": lambda state, model: to_timm(state, joint_bias=(model or "").startswith("eva_large")),
    "safetensors": lambda state, model: state,
}
