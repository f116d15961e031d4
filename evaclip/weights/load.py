"""Putting weights into a model, all or nothing."""

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
from evaclip.model.masked_image import MaskedImageModel
from evaclip.model.vision import VisionTower
from evaclip.model.vision_model import VisionModel
from evaclip.weights.files import load_state_dict
from evaclip.weights.layouts import MASKED_IMAGE, to_original
from evaclip.weights.shards import is_sharded, put

_log = logging.getLogger(__name__)

_POS_EMBED, _PATCH_KERNEL = "pos_embed", "patch_embed.proj.weight"
_IMAGE = "visual."
_INDEX = re.compile(r"\b(blocks|resblocks)\.(\d+)\.")


def load_weights(model: nn.Module, source: str | Path | Mapping[str, Tensor]) -> None:
    """Copies weights into `model`, whose device and dtypes stay.

    The position embedding of another image size is resized, as the authors did from 224 to 336 pixels; this
    is logged.

    Args:
        model: a `CLIP`; not on the meta device.
        source: a weights file or a state dict, in any layout that `load_state_dict` knows.

    Raises:
        UserError: naming every missing, unexpected and misshapen parameter; the model is then unchanged.
    """
    put(model, _fitting(model, source))


def materialize(model: nn.Module, source: Path, device: torch.device, antialias: bool = False) -> None:
    """Gives a model on the meta device its weights: no memory is taken beside that of the weights themselves.

    Tensors of a `.safetensors` file that need no conversion are views of the mapped file; they are copied when they are
    first written to, or at once where the model is sharded. `antialias` is for positions of another image size, see
    `resize_pos_embed`. The rest is as for `load_weights`.
    """
    state = _fitting(model, source, antialias)
    if is_sharded(model):
        put(model.to_empty(device=device), state)
        return
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    # torch.save cuts the file that it writes over, whose pages would go from under a model that was read from there.
    copy = ".safetensors" not in source.name
    for name in list(state):
        state[name] = state[name].to(device, dtypes[name], copy=copy)
    model.load_state_dict(state, assign=True)


def _fitting(model: nn.Module, source: str | Path | Mapping[str, Tensor], antialias: bool = False) -> dict[str, Tensor]:
    """The weights of `source`, which have the names and shapes of the model's."""
    state = to_original(source) if isinstance(source, Mapping) else load_state_dict(source)
    expected = model.state_dict()
    if isinstance(model, VisionModel):
        if not isinstance(model, MaskedImageModel):
            state = {name: t for name, t in state.items() if not MASKED_IMAGE.match(name)}
        state = with_last_norm_of(model, state)
        fit_image_size(state, expected, model.config.grid, antialias=antialias)
    elif isinstance(model, CLIP):
        if model.config.init_logit_bias is not None:  # It may be that of a model that goes on with SigLIP's loss.
            state.setdefault("logit_bias", torch.tensor(float(model.config.init_logit_bias)))
        elif state.pop("logit_bias", None) is not None:
            _log.warning("the weights' logit_bias is left out: this model, without SigLIP's loss, has none")
        fit_image_size(state, expected, model.config.vision.grid, _IMAGE)
    problems = differences(state, expected)
    if problems:
        origin = "the weights" if isinstance(source, Mapping) else f"the weights {str(source)!r}"
        raise UserError(f"{origin} don't fit the model: {'; '.join(problems)}")
    return state


def with_last_norm_of(tower: VisionTower, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an image tower, whose last norm has the name of this one's: behind the mean it has another."""
    theirs, own = ("fc_norm.", "norm.") if tower.norm is not None else ("norm.", "fc_norm.")
    if f"{own}weight" in state:
        return state
    return {own + name.removeprefix(theirs) if name.startswith(theirs) else name: t for name, t in state.items()}


def fit_image_size(
    state: dict[str, Tensor],
    expected: Mapping[str, Tensor],
    grid: tuple[int, int],
    prefix: str = "",
    antialias: bool = False,
) -> None:
    """Resizes the position embedding and the patch kernel among `state` to those of the model, and logs it."""
    pos_embed, kernel = prefix + _POS_EMBED, prefix + _PATCH_KERNEL
    if pos_embed in state:
        state[pos_embed] = _fitted(state[pos_embed], grid, antialias)
    if kernel in state and kernel in expected:
        state[kernel] = _fitted_kernel(state[kernel], expected[kernel].shape)


def resize_pos_embed(pos_embed: Tensor, grid: tuple[int, int], antialias: bool = False) -> Tensor:
    """A position embedding `[1, 1 + g*g, C]` for a grid of rows and columns of patches; the class token's stays.

    Bicubic without antialiasing, as the released models were adapted to other sizes. Libraries that antialias, as timm
    does, get other numbers: those of `antialias`.
    """
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    old = math.isqrt(patches.shape[1])
    image = patches.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    resized = F.interpolate(image, size=grid, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([cls, resized.flatten(2).transpose(1, 2).to(cls.dtype)], dim=1)


def _fitted_kernel(kernel: Tensor, shape: torch.Size) -> Tensor:
    if kernel.ndim != 4 or kernel.shape == shape or kernel.shape[:2] != shape[:2]:
        return kernel
    _log.warning(
        "weights of another patch size: the kernel is resized from %d to %d pixels", kernel.shape[-1], shape[-1]
    )
    # Bicubic as the position embedding, without regard to its norm: so the released B/16 came from patches of 14.
    resized = F.interpolate(kernel.float(), size=shape[2:], mode="bicubic", align_corners=False, antialias=False)
    return resized.to(kernel.dtype)


def _fitted(pos_embed: Tensor, grid: tuple[int, int], antialias: bool) -> Tensor:
    patches = pos_embed.shape[1] - 1 if pos_embed.ndim == 3 else 0
    old = math.isqrt(max(patches, 0))
    # As many patches are taken for those of this grid: weights of 2x8 patches aren't of 4x4.
    if patches < 1 or patches == math.prod(grid) or old**2 != patches:
        return pos_embed
    _log.warning("weights of another image size: positions are resized from %dx%d to %dx%d patches", old, old, *grid)
    return resize_pos_embed(pos_embed, grid, antialias)


def differences(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    """What keeps `state` from being loaded, by kind; names that differ in their block only are put together."""
    missing = expected.keys() - state.keys()
    unexpected = state.keys() - expected.keys()
    shared = [name for name in expected if name in state]
    misshapen = [
        f"{name} {list(state[name].shape)} instead of {list(expected[name].shape)}"
        for name in shared
        if state[name].shape != expected[name].shape
    ]
    # Codes of quantized weights, whose scales nobody reads here, would be taken for values.
    codes = [f"{name} {state[name].dtype}" for name in shared if not state[name].is_floating_point()]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape": misshapen, "no floats": codes}
    return [f"{kind}: {', '.join(summarize(names))}" for kind, names in kinds.items() if names]


def summarize(names: Iterable[str]) -> list[str]:
    """Names that differ only in their block as one, such as `visual.blocks.{0-11}.norm1.weight`."""
    blocks: dict[str, list[int]] = {}
    for name in names:
        match = _INDEX.search(name)
        pattern = _INDEX.sub(r"\1.{}.", name, count=1)
        blocks.setdefault(pattern, []).extend([int(match[2])] if match else [])
    return sorted(
        pattern.replace("{}", "{" + _ranges(found) + "}", 1) if found else pattern for pattern, found in blocks.items()
    )


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
