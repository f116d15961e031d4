"""Whole models: each tower, and a training step's forward and backward pass through both towers and the loss.

Plain PyTorch is open_clip's model: timm's EVA and open_clip's text tower, built from the same configuration and called
with the same parameters. Parameters are inputs like any other; the models hold none.
"""

import math
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

import evakernels
from benchmarks.cases._inputs import captions, kept_patches
from benchmarks.cases._open_clip import PlainClip
from benchmarks.cases.contrastive import clip_loss
from benchmarks.operation import Cost, Draw, Inputs, Operation, Work, register
from benchmarks.shapes import Shape, short_names
from evaclip import CLIP, CLIPConfig, Savings, create_model
from evaclip.errors import UserError
from evaclip.model.config import override
from evaclip.model.flops import text_flops, vision_flops
from evaclip.tokenizer import VOCAB_SIZE
from evaclip.weights import to_open_clip

_NOISE = 0.02
"""Added to the start values of training, with their zero biases and tiny features."""

_DEFAULT, _RECOMPUTE = Savings(), Savings(recompute="activations")
_VISION, _TEXT = "visual.", "text."


@dataclass(frozen=True)
class Network:
    """A model or a part of it, without parameters.

    Attributes:
        module: on the meta device, except exact tables.
        names: names of its parameters, in the order of the input `parameters`.
        buffers: buffers that follow the dtype of the parameters.
    """

    module: nn.Module
    names: tuple[str, ...]
    buffers: dict[str, Tensor]

    def __call__(self, parameters: list[Tensor], *args: Any, token_index: Tensor | None = None) -> Any:
        """Runs the module with these parameters, on the patches of `token_index` if there is one."""
        tensors = dict(zip(self.names, parameters, strict=True))
        for name, values in self.buffers.items():
            tensors[name] = values.to(parameters[0].dtype)
        options = {} if token_index is None else {"token_index": token_index}
        return functional_call(self.module, tensors, args, options)

    def hold(self, parameters: list[Tensor]) -> None:
        """Leaves these parameters in the module, where a recomputing backward pass reads them."""
        for name, values in zip(self.names, parameters, strict=True):
            owner, _, last = name.rpartition(".")
            self.module.get_submodule(owner)._parameters[last] = cast(nn.Parameter, values)


@dataclass(frozen=True)
class Pair:
    """The same model here and in plain PyTorch."""

    ours: Network
    plain: Network


# --- inputs ---------------------------------------------------------------------------------------------------------


def _tower_inputs(shape: Shape, draw: Draw, part: str) -> Inputs:
    if shape.drop:
        raise UserError(f"shape {shape.name!r}: patches are dropped in training only; clip_step measures that")
    samples = _images(shape, draw) if part == _VISION else _texts(shape, draw)
    return {**_model(shape, draw, part, draw.dtype), "samples": samples}


def _step_inputs(shape: Shape, draw: Draw) -> Inputs:
    """Parameters in float32, and autocast to the dtype of the images, as in training."""
    return {
        **_model(shape, draw, "", torch.float32),
        "images": _images(shape, draw),
        "texts": _texts(shape, draw),
        "token_index": kept_patches("clip_step", shape, draw),
    }


def _model(shape: Shape, draw: Draw, part: str, dtype: torch.dtype) -> Inputs:
    """Both networks of a part of the model, and its parameters: the same for every set of samples."""
    check_comparable(f"shape {shape.name!r}", shape.config)
    pixels = pixels_of(shape)
    parameters = parameters_of(shape.model, pixels, draw.device)
    own = [values.detach().to(dtype) for name, values in parameters.items() if name.startswith(part)]
    return {"pair": _pair(shape.model, pixels, draw.device, part), "parameters": own}


def check_comparable(what: str, config: CLIPConfig) -> None:
    """Raises `UserError` where open_clip has no model like this one to compare with."""
    text, pool = config.text, config.vision.pool
    if pool != "token" or text.vocab_size < VOCAB_SIZE:
        raise UserError(
            f"{what}: open_clip pools by class token and has {VOCAB_SIZE:,} words, this model pools by "
            f"{pool} and has {text.vocab_size:,}; expected another model, such as tiny@32"
        )


def pixels_of(shape: Shape) -> int:
    """The side of the images; the model's for a shape of the text tower."""
    return shape.pixels or shape.config.vision.image_shape[0]


def _images(shape: Shape, draw: Draw) -> Tensor:
    return draw.normal(shape.batch, 3, pixels_of(shape), pixels_of(shape))


def _texts(shape: Shape, draw: Draw) -> Tensor:
    """Captions of photographs: most of a row is padding."""
    known = captions(shape.config.text.context_length).to(draw.device)
    return known[draw.integers(len(known), shape.batch)]


@lru_cache(maxsize=1)
def parameters_of(model: str, pixels: int, device: torch.device) -> dict[str, Tensor]:
    """The parameters of a model in float32, by name."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        built = create_model(short_names()[model], device=device, vision={"image_size": pixels})
        with torch.no_grad():
            for parameter in built.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=_NOISE)
    return dict(built.named_parameters())


# --- networks -------------------------------------------------------------------------------------------------------


@cache
def _pair(model: str, pixels: int, device: torch.device, part: str) -> Pair:
    """Both networks of a tower, or of the whole model where `part` is empty."""
    ours = create_model(short_names()[model], device="meta", vision={"image_size": pixels})
    if ours.visual.rope is not None:
        ours.visual.rope.fill(device)
    plain = PlainClip(ours.config, device)
    plain_part = f"{part}trunk." if part == _VISION else part
    # Only whole models are trained.
    our_module, plain_module = (
        model.get_submodule(own.removesuffix(".")).train(part == "")
        for model, own in ((ours, part), (plain, plain_part))
    )
    plain_names = _names(to_open_clip(ours.state_dict()), plain_part)
    return Pair(
        Network(our_module, _names(ours.state_dict(), part), {}),
        Network(plain_module, plain_names, dict(plain_module.named_buffers())),
    )


def _names(state: dict[str, Tensor], part: str) -> tuple[str, ...]:
    """Names within a part of a model, in the order of the state."""
    return tuple(name.removeprefix(part) for name in state if name.startswith(part))


# --- operations -----------------------------------------------------------------------------------------------------


def _encode_ours(pair: Pair, parameters: list[Tensor], samples: Tensor) -> Any:
    return pair.ours(parameters, samples)


def _encode_plain(pair: Pair, parameters: list[Tensor], samples: Tensor) -> Any:
    return pair.plain(parameters, samples)


def _step_ours(
    pair: Pair,
    parameters: list[Tensor],
    images: Tensor,
    texts: Tensor,
    token_index: Tensor | None,
    savings: Savings = _DEFAULT,
) -> Tensor:
    cast(CLIP, pair.ours.module).set_savings(savings)
    if savings.recompute != "none":
        pair.ours.hold(parameters)
    with autocast(parameters, images):
        return evakernels.clip_loss(*pair.ours(parameters, images, texts, token_index=token_index))


def _step_plain(
    pair: Pair, parameters: list[Tensor], images: Tensor, texts: Tensor, token_index: Tensor | None
) -> Tensor:
    with autocast(parameters, images):
        return clip_loss(*pair.plain(parameters, images, texts, token_index=token_index))


def autocast(parameters: list[Tensor], images: Tensor) -> torch.autocast:
    """Autocast to the dtype of the images if the parameters have another one."""
    return torch.autocast(images.device.type, dtype=images.dtype, enabled=images.dtype != parameters[0].dtype)


# --- cost -----------------------------------------------------------------------------------------------------------


def _image_work(shape: Shape, itemsize: int) -> Work:
    """Bytes of the tower's parameters, the images and the features."""
    config = _config(shape)
    values = _count(shape, _VISION) + shape.batch * (3 * math.prod(config.vision.image_shape) + config.embed_dim)
    return Work(Cost(shape.batch * vision_flops(config.vision, config.embed_dim), values * itemsize))


def _text_work(shape: Shape, itemsize: int) -> Work:
    """Bytes of the tower's parameters, the token ids and the features."""
    config = _config(shape)
    ids = 8 * shape.batch * config.text.context_length
    values = _count(shape, _TEXT) - _unread(shape) + shape.batch * config.embed_dim
    return Work(Cost(shape.batch * text_flops(config.text, config.embed_dim), values * itemsize + ids))


def tower_work(shape: Shape, itemsize: int) -> Work:
    """The work of the shape's tower."""
    return (_text_work if shape.tower == "text" else _image_work)(shape, itemsize)


def _step_work(shape: Shape, itemsize: int) -> Work:
    """Both towers and the loss; backward twice that, but without gradients of the images.

    Bytes of the parameters in float32, of images and token ids, and backward also of the gradients. Activations are
    neither input nor output.
    """
    config, batch = _config(shape), shape.batch
    keep = shape.kept_patches / shape.patches
    towers = vision_flops(config.vision, config.embed_dim, keep) + text_flops(config.text, config.embed_dim)
    forward = batch * towers + 2 * batch**2 * config.embed_dim
    pixels = 3 * math.prod(config.vision.image_shape)
    embedding = 2 * batch * config.vision.width * pixels
    gradients = 4 * _count(shape, "")
    given = gradients - 4 * _unread(shape) + batch * (pixels * itemsize + 8 * config.text.context_length)
    return Work(Cost(forward, given), Cost(2 * forward - embedding, given + gradients))


def _unread(shape: Shape) -> int:
    """Values of the token embedding that no caption reads: it has a row for each token of the vocabulary."""
    text = shape.config.text
    return max(0, text.vocab_size - shape.batch * text.context_length) * text.width


def _config(shape: Shape) -> CLIPConfig:
    return override(shape.config, {"vision": {"image_size": pixels_of(shape)}})


@cache
def _count(shape: Shape, part: str) -> int:
    """Parameters of a part of the model."""
    built = create_model(short_names()[shape.model], device="meta", vision={"image_size": pixels_of(shape)})
    return sum(values.numel() for name, values in built.named_parameters() if name.startswith(part))


_ENCODE_IMAGE = register(
    Operation(
        name="encode_image",
        summary="the vision tower, weights in the dtype measured",
        inputs=partial(_tower_inputs, part=_VISION),
        eager=_encode_plain,
        ours=_encode_ours,
        baseline="open_clip",
        baseline_package="open_clip_torch",
        is_model=True,
        work=_image_work,
        shapes={
            "cpu": ("eva02-b16@224 b1",),
            "cuda": ("eva02-b16@224 b256", "eva02-l14@224 b128", "eva02-l14@336 b32", "eva02-bige14@224 b16"),
        },
    )
)
register(
    replace(
        _ENCODE_IMAGE,
        name="encode_text",
        summary="the text tower, weights in the dtype measured",
        inputs=partial(_tower_inputs, part=_TEXT),
        work=_text_work,
        shapes={
            "cpu": ("eva02-b16:text b1",),
            "cuda": ("eva02-b16:text b256", "eva02-l14:text b128", "eva02-bige14:text b16"),
        },
    )
)
register(
    Operation(
        name="clip_step",
        summary="both towers and the CLIP loss, weights in float32 and autocast to the dtype measured",
        inputs=_step_inputs,
        eager=_step_plain,
        ours=_step_ours,
        baseline="open_clip",
        baseline_package="open_clip_torch",
        is_model=True,
        variants={"recompute activations": partial(_step_ours, savings=_RECOMPUTE)},
        work=_step_work,
        shapes={
            "cpu": ("tiny@32 b32",),  # larger ones take torch.compile minutes
            "cuda": ("eva02-b16@224 b64", "eva02-b16@224 b256", "eva02-l14@224 b128", "eva02-l14@336 b32"),
        },
        gradients=("parameters",),
    )
)
