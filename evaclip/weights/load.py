"""Load weights into a model, or into one of its towers; all or nothing.

The image tower can start from masked image modelling (EVA, EVA-02), a CLIP model or a classifier; the text tower from a
CLIP model of OpenAI, open_clip, transformers or EVA. Parts of other tasks are left out: the heads, the mask token, the
projections and the temperature (Sun et al. 2023, section 3).
"""

import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evaclip.errors import UserError
from evaclip.model.clip import CLIP
from evaclip.model.config import VisionConfig
from evaclip.model.masked_image import MaskedImageModel
from evaclip.model.vision import VisionTower, resize_grid
from evaclip.model.vision_model import VisionModel
from evaclip.weights.files import load_state_dict, read_tensors
from evaclip.weights.layouts import MASKED_IMAGE, is_image_tower, to_original
from evaclip.weights.shards import is_sharded, put
from evaclip.weights.transformers_names import TEXT, rename_tower

_log = logging.getLogger(__name__)

_POS_EMBED, _PATCH_KERNEL = "pos_embed", "patch_embed.proj.weight"
_TEXT, _IMAGE = "text.", "visual."
_INDEX = re.compile(r"\b(blocks|resblocks)\.(\d+)\.")
_IMAGE_SKIPPED = re.compile(r"(head|lm_head|mask_token|decoder\w*|text_projection|logit_scale)(\.|$)")
_TEXT_SKIPPED = re.compile(r"(text_projection(_bias)?|proj|logit_scale|logit_bias)(\.|$)")


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> None:
    """Copy weights into `model`; its device and dtypes stay.

    The position embedding of another image size is resized as the authors did from 224 to 336 pixels, with a warning.

    Args:
        model: a `CLIP`; not on the meta device.
        source: a weights file or a state dict, in any layout that `load_state_dict` knows.

    Raises:
        UserError: names every missing, unexpected and misshapen parameter; the model is unchanged.
    """
    put(model, _fitting(model, source))


def materialize(model: nn.Module, source: Path, device: torch.device) -> None:
    """Load weights into a model on the meta device, with no more memory than the weights take.

    Tensors of a `.safetensors` file that need no conversion are views of the mapped file. They are copied at the
    first write, or immediately if the model is sharded. Other arguments and errors are as for `load_weights`.
    """
    state = _fitting(model, source)
    if is_sharded(model):
        put(model.to_empty(device=device), state)
        return
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    # torch.save truncates the file that it overwrites, and with it the pages of a model that is mapped from it.
    copy = ".safetensors" not in source.name
    for name in list(state):
        state[name] = state[name].to(device, dtypes[name], copy=copy)
    model.load_state_dict(state, assign=True)


def _fitting(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `source` with the names and shapes of the model."""
    state = to_original(source) if isinstance(source, Mapping) else load_state_dict(source)
    expected = model.state_dict()
    if isinstance(model, VisionModel):
        if not isinstance(model, MaskedImageModel):
            state = {name: t for name, t in state.items() if not MASKED_IMAGE.match(name)}
        state = with_last_norm_of(model, state)
        fit_image_size(state, expected, model.config)
    elif isinstance(model, CLIP):
        if model.config.init_logit_bias is not None:  # the model may continue with SigLIP's loss
            state.setdefault("logit_bias", torch.tensor(float(model.config.init_logit_bias)))
        elif state.pop("logit_bias", None) is not None:
            _log.warning("the weights' logit_bias is left out: this model, without SigLIP's loss, has none")
        fit_image_size(state, expected, model.config.vision, _IMAGE)
    problems = differences(state, expected)
    if problems:
        origin = "the weights" if isinstance(source, Mapping) else f"the weights {str(source)!r}"
        raise UserError(f"{origin} don't fit the model: {'; '.join(problems)}")
    return state


def with_last_norm_of(tower: VisionTower, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the last norm of an image tower as in `tower`: after mean pooling it is called `fc_norm`."""
    other, own = ("fc_norm.", "norm.") if tower.norm is not None else ("norm.", "fc_norm.")
    if f"{own}weight" in state:
        return state
    return {own + name.removeprefix(other) if name.startswith(other) else name: t for name, t in state.items()}


def fit_image_size(
    state: dict[str, Tensor],
    expected: Mapping[str, Tensor],
    config: VisionConfig,
    prefix: str = "",
) -> None:
    """Resize position embedding and patch kernel in `state` to those of the model, with a warning."""
    pos_embed, kernel = prefix + _POS_EMBED, prefix + _PATCH_KERNEL
    if pos_embed in state:
        state[pos_embed] = _fit_positions(state[pos_embed], config)
    if kernel in state and kernel in expected:
        state[kernel] = _fit_kernel(state[kernel], expected[kernel].shape)


def _fit_kernel(kernel: Tensor, shape: torch.Size) -> Tensor:
    if kernel.ndim != 4 or kernel.shape == shape or kernel.shape[:2] != shape[:2]:
        return kernel
    _log.warning(
        "weights of another patch size: the kernel is resized from %d to %d pixels", kernel.shape[-1], shape[-1]
    )
    # Bicubic like the position embedding; its norm changes. The released B/16 came so from patches of 14.
    resized = F.interpolate(kernel.float(), size=shape[2:], mode="bicubic", align_corners=False, antialias=False)
    return resized.to(kernel.dtype)


def _fit_positions(pos_embed: Tensor, config: VisionConfig) -> Tensor:
    """Resize a position embedding `[1, P + g*g, C]` to the grid of `config`; the prefix tokens' stays.

    By default bicubic without antialiasing, as the released models were adapted to other sizes; timm antialiases.
    """
    prefix, grid = config.prefix_tokens, config.grid
    count = pos_embed.shape[1] - prefix if pos_embed.ndim == 3 else 0
    old = math.isqrt(max(count, 0))
    # An equal number of patches is taken for this grid: 2x8 patches stay as they are in a grid of 4x4.
    if count < 1 or count == math.prod(grid) or old**2 != count:
        return pos_embed
    _log.warning("weights of another image size: positions are resized from %dx%d to %dx%d patches", old, old, *grid)
    first, patches = pos_embed.split([prefix, count], dim=1)
    image = patches.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = resize_grid(image, config, grid)
    return torch.cat([first, resized.flatten(2).transpose(1, 2).to(first.dtype)], dim=1)


def differences(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """Reasons why `state` can't be loaded, by kind; names that differ only in the block are joined."""
    missing = expected.keys() - state.keys()
    unexpected = state.keys() - expected.keys()
    shared = [name for name in expected if name in state]
    misshapen = [
        f"{name} {list(state[name].shape)} instead of {list(expected[name].shape)}"
        for name in shared
        if state[name].shape != expected[name].shape
    ]
    # Codes of quantized weights would be taken for values: their scales aren't read.
    codes = [f"{name} {state[name].dtype}" for name in shared if not state[name].is_floating_point()]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen, "no floats": codes}
    return [f"{kind}: {', '.join(summarize(names))}" for kind, names in kinds.items() if names]


def summarize(names: Iterable[str]) -> list[str]:
    """Join names that differ only in their block, such as `visual.blocks.{0-11}.norm1.weight`."""
    blocks: dict[str, list[int]] = {}
    for name in names:
        match = _INDEX.search(name)
        pattern = _INDEX.sub(r"\1.{}.", name, count=1)
        blocks.setdefault(pattern, []).extend([int(match[2])] if match else [])
    return sorted(
        pattern.replace("{}", "{" + _ranges(numbers) + "}", 1) if numbers else pattern
        for pattern, numbers in blocks.items()
    )


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def start_image_tower(tower: VisionTower, source: Path | Mapping[str, Tensor]) -> None:
    """Copy the image tower of `source` into `tower`.

    Position embedding and patch kernel are resized to the tower's, by default as the authors did (bicubic). The head
    keeps its start values; so do parameters that the source lacks, with a warning.

    Raises:
        UserError: names every unexpected and misshapen parameter; the tower is unchanged.
    """
    state = to_original(source if isinstance(source, Mapping) else read_tensors(source))
    if not is_image_tower(state):
        state = {name.removeprefix(_IMAGE): t for name, t in state.items() if name.startswith(_IMAGE)}
    state = with_last_norm_of(tower, state)
    state = {name: tensor for name, tensor in state.items() if not _IMAGE_SKIPPED.match(name)}
    fit_image_size(state, tower.state_dict(), tower.config)
    _start(tower, state, "image tower", source, ("head.", "lm_head.", "mask_token", "decoder_"))


def start_text_tower(tower: nn.Module, source: Path | Mapping[str, Tensor]) -> None:
    """Copy the text tower of `source` into `tower`; the projection keeps its start values.

    Raises:
        UserError: as `start_image_tower`.
    """
    tensors = source if isinstance(source, Mapping) else read_tensors(source)
    if any(name.startswith(TEXT) for name in tensors):
        state = rename_tower(tensors, "text")
    else:
        state = {n.removeprefix(_TEXT): t for n, t in to_original(tensors).items() if n.startswith(_TEXT)}
    state = {name: tensor for name, tensor in state.items() if not _TEXT_SKIPPED.match(name)}
    _start(tower, state, "text tower", source, ("text_projection", "proj."))


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
