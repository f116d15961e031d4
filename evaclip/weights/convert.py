"""Convert weights to the names of another library."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from evaclip.errors import UserError, unknown_name
from evaclip.model.clip import CLIP
from evaclip.model.config import CLIPConfig, find_model, get_config, list_models, override
from evaclip.model.vision import RotaryTable
from evaclip.model.vision_names import is_vision_model, vision_config
from evaclip.outputs import check_output
from evaclip.weights.files import (
    check_suffix,
    load_state_dict,
    read_model_options,
    save_tensors,
    weight_files,
    weights_kind,
)
from evaclip.weights.layouts import is_image_tower, to_authors, to_open_clip, to_timm
from evaclip.weights.load import differences

FORMATS = ("original", "open_clip", "timm", "safetensors")
"""`original`: the authors' file, rotary tables included; `safetensors`: the same names without the tables."""


def convert(
    source: Path,
    target: Path,
    layout: str,
    model: str | None = None,
    *,
    others: Sequence[tuple[Path, float]] = (),
    overwrite: bool = False,
) -> None:
    """Write the weights of `source`, in any layout, in another; values and dtypes stay without `others`.

    Args:
        source: a file that `load_state_dict` reads.
        target: `.safetensors`, or `.pt`, `.pth`, `.bin` for a file of `torch.save`.
        layout: one of `FORMATS`.
        model: name of the configuration, for `original`; None takes the name in the checkpoint of `source`, or finds it
            by the shapes.
        others: weights of the same model with their shares in a weighted mean; `source` has the rest. One other with
            the share alpha is WiSE-FT (Wortsman et al. 2021, arXiv 2109.01903), equal shares are a model soup
            (Wortsman et al. 2022, arXiv 2203.05482).
        overwrite: replace `target` if it exists. The source, and files in a run or a checkpoint, are never replaced.

    Raises:
        UserError: for files or names that don't fit together, or a target that may not be written; nothing is written.
    """
    if layout not in FORMATS:
        raise unknown_name("layout", layout, FORMATS)
    if layout == "safetensors" and target.suffix != ".safetensors":
        raise UserError(f"target must end in .safetensors, got {str(target)!r}")
    check_suffix(target)
    if model and not is_vision_model(model):
        get_config(model)
    inputs = [source, *(path for path, _ in others)]
    check_output(
        target, overwrite=overwrite, sources=[*inputs, *(file for path in inputs for file in weight_files(path))]
    )
    state = load_state_dict(source)
    if others:
        state = weighted_mean(state, [(load_state_dict(path), share) for path, share in others])
    if not any(name.startswith(("blocks.", "visual.blocks.")) for name in state):
        raise UserError(f"{str(source)!r} holds no image tower of the EVA series (names that begin with visual.blocks)")
    prefixes = [tensor.shape[1] for name, tensor in state.items() if name.endswith("cls_token")]
    is_ours = prefixes != [1] or any("attn_pool." in name for name in state)
    if layout == "timm":  # a NaFlexVit with one register, which timm calls reg_token
        is_ours |= any(".gamma_1" in name for name in state) and any("fc_norm." in name for name in state)
    if layout != "safetensors" and is_ours:
        kinds = "registers, attention pooling, no class token or, in timm's, layer scale with mean pooling"
        raise UserError(f"layout must be safetensors for a tower with {kinds}, got {layout!r}")
    match layout:
        case "original":
            state = _with_rotary_tables(state, model, source)
        case "open_clip":
            state = to_open_clip(state)
        case "timm":
            state = to_timm(state, joint_bias=_is_large(state))
    save_tensors(state, target, weights="mean of several" if others else weights_kind(source))


def weighted_mean(
    state: Mapping[str, Tensor], others: Sequence[tuple[Mapping[str, Tensor], float]]
) -> dict[str, Tensor]:
    """Average weights of one model, in float64, in the dtypes of `state`.

    Args:
        state: has one minus the sum of the shares of the others.
        others: state dicts with equal names and shapes, and their shares.

    Raises:
        UserError: names or shapes differ.
    """
    for other, _ in others:
        if problems := differences(other, state):
            raise UserError(f"weights to average must be of one model, got {'; '.join(problems)}")
    rest = 1 - sum(share for _, share in others)

    def mean(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        total = tensor.double() * rest
        for other, share in others:
            total.add_(other[name].double(), alpha=share)
        return total.to(tensor.dtype)

    return {name: mean(name, tensor) for name, tensor in state.items()}


def identify(state: Mapping[str, Tensor]) -> str:
    """Name of the shipped configuration with these tensor names and shapes.

    Raises:
        UserError: no configuration matches.
    """
    for name in list_models():
        if not _differences(state, get_config(name)):
            return name
    raise UserError("the weights have the shapes of no known model; name it with --model")


def _differences(state: Mapping[str, Tensor], config: CLIPConfig) -> list[str]:
    """Differences between the weights and the model's names and shapes, for any loss."""
    with torch.device("meta"):
        expected = CLIP(config).state_dict()
    expected.pop("logit_bias", None)
    return differences({name: tensor for name, tensor in state.items() if name != "logit_bias"}, expected)


def _config_of(state: Mapping[str, Tensor], model: str | None, source: Path) -> CLIPConfig:
    """Configuration of the weights: from their checkpoint, by name, or by the shapes.

    Raises:
        UserError: there is no such model, or its weights have other names or shapes.
    """
    options = read_model_options(source) or {"name": model or identify(state)}
    name = str(options.pop("name"))
    if model and find_model(model) != find_model(name):
        raise UserError(f"the weights are of {name!r}, not of {model!r}; leave --model out")
    config = override(get_config(name), options)
    if problems := _differences(state, config):
        raise UserError(f"the weights aren't of {name!r}: {'; '.join(problems)}")
    return config


def _with_rotary_tables(state: Mapping[str, Tensor], model: str | None, source: Path) -> dict[str, Tensor]:
    """The authors' layout: their CLIP files have rotary tables for the tower and for each block."""
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
    """Whether the image tower is an `eva_large_*`: of its width, with q, k and v in one matrix."""
    qkv = state.get("blocks.0.attn.qkv.weight", state.get("visual.blocks.0.attn.qkv.weight"))
    return qkv is not None and qkv.shape[1] == vision_config("eva_large_patch14_196").width
