"""Models of other libraries before and after `evakernels.accelerate`, and through torch.compile.

A model has random weights in float32; samples in bfloat16 make it run under autocast, as users do. Both sides are
copies of one model and share its parameters. For inference only (`dropin_frozen`) the weights are in the dtype of the
samples, and prepacked by `accelerate(freeze=True)`.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import evakernels
from benchmarks.candidates import compile_frozen
from benchmarks.cases.models import Network, Pair, autocast
from benchmarks.operation import Cost, Draw, Function, Inputs, Operation, Work, peer, register
from benchmarks.shapes import Shape
from evaclip.errors import UserError, unknown_name

DROPIN, FROZEN = "dropin", "dropin_frozen"
_FORM = re.compile(r"(?P<model>[\w./-]+) b(?P<batch>[1-9]\d*)( t(?P<tokens>[1-9]\d*))?")


@dataclass(frozen=True)
class Model:
    """One public model.

    Attributes:
        build: makes it with random weights on a device.
        encode: features of images, and with a text tower also of captions, and the temperature, so that every parameter
            has a gradient.
        pixels: height and width of an image.
        vocabulary: number of token ids; 0 for a model of images.
        context: tokens of a caption.
    """

    build: Callable[[torch.device], nn.Module]
    encode: Callable[[Any, Tensor, Tensor | None], Any]
    pixels: int = 224
    vocabulary: int = 0
    context: int = 0


def parse(name: str) -> Shape:
    """The shape called `name`, such as `timm/vit-b b4`, or `open_clip/vit-b-32 b4 t13` for captions of 13 tokens.

    The model is one of `MODELS` and `PADDED`, or any other of timm or open_clip by its name there. Without `t` captions
    are full, and `tokens` is 0.

    Raises:
        UserError: the name has another form, the model is unknown, or takes no such captions.
    """
    match = _FORM.fullmatch(name.strip())
    if match is None:
        forms = "'timm/vit-b b4', or 'open_clip/vit-b-32 b4 t13' for texts of 13 tokens and padding"
        raise UserError(f"unknown shape {name!r}; expected a model and a batch such as {forms}")
    tokens, context = int(match["tokens"] or 0), model_of(match["model"]).context
    if tokens > context:
        raise UserError(f"shape {name!r}: {match['model']} takes texts of up to {context} tokens")
    shown = f"{match['model']} b{int(match['batch'])}" + (f" t{tokens}" if tokens else "")
    return Shape(shown, int(match["batch"]), tokens, model=match["model"])


# --- models ---------------------------------------------------------------------------------------------------------


@cache
def model_of(name: str) -> Model:
    """The model called `name`: of `MODELS` or `PADDED`, else timm's or open_clip's, as in `timm/vit_tiny_patch16_224`.

    Raises:
        UserError: neither knows it, or it isn't installed.
    """
    library, _, model = name.partition("/")
    if found := (MODELS | PADDED).get(name):
        return found
    if library == "timm" and find_spec("timm"):
        from timm.models import get_pretrained_cfg_value, is_model

        if is_model(model):
            size: Any = get_pretrained_cfg_value(model, "input_size")
            return _timm(model, size[-1])
    elif library == "open_clip" and find_spec("open_clip"):
        import open_clip

        if config := open_clip.get_model_config(model):
            texts = config["text_cfg"]
            sizes = config["vision_cfg"]["image_size"], texts.get("vocab_size", 49_408), texts.get("context_length", 77)
            return _open_clip(model, *sizes)
    raise unknown_name("model", name, [*MODELS, *PADDED])


def _timm(name: str, pixels: int = 224) -> Model:
    def build(device: torch.device) -> Any:
        return import_module("timm").create_model(name, device=device)

    return Model(build, lambda model, images, texts: model(images), pixels)


def _open_clip(name: str, pixels: int = 224, vocabulary: int = 49_408, context: int = 77) -> Model:
    def build(device: torch.device) -> Any:
        return import_module("open_clip").create_model(name, device=device)

    return Model(build, lambda model, images, texts: model(images, texts), pixels, vocabulary, context)


def _transformers(kind: str, vocabulary: int, context: int) -> Model:
    def build(device: torch.device) -> Any:
        transformers = import_module("transformers")
        # The defaults of both are the base model's, except the patches.
        config = getattr(transformers, f"{kind}Config")(vision_config={"patch_size": 16})
        with device:
            return getattr(transformers, f"{kind}Model")(config)

    return Model(build, _embed, 224, vocabulary, context)


def _embed(model: Any, images: Tensor, texts: Tensor | None) -> Any:
    output = model(input_ids=texts, pixel_values=images)
    # Not the few logits: with random weights they are differences near zero, with an error of mere luck.
    scalars = [getattr(model, name) for name in ("logit_scale", "logit_bias") if hasattr(model, name)]
    return output.image_embeds, output.text_embeds, *scalars


MODELS = {
    "timm/eva02-b": _timm("eva02_base_patch16_clip_224"),
    "timm/eva02-l": _timm("eva02_large_patch14_clip_224"),
    "timm/vit-b": _timm("vit_base_patch16_224"),
    "timm/dinov3-b": _timm("vit_base_patch16_dinov3", 256),
    "open_clip/eva02-b-16": _open_clip("EVA02-B-16"),
    "open_clip/vit-b-32": _open_clip("ViT-B-32"),
    "transformers/clip-b-16": _transformers("CLIP", 49_408, 77),
    "transformers/siglip-b": _transformers("Siglip", 32_000, 64),
}


# --- padded batches of images: 256 patches of 16 pixels, of which the last ones are padding --------------------------


def _patches(images: Tensor, padding: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Patches `[B, 256, 768]`, the mask of real ones, (row, column) of each patch and (rows, columns) of each image.

    On the meta device, where FLOPs are counted, real patches alone.
    """
    patches = images.unfold(2, 16, 16).unfold(3, 16, 16).permute(0, 2, 3, 4, 5, 1).reshape(len(images), 256, 768)
    rows, place = 16 * (100 - padding) // 100, torch.arange(256)
    real, grid = place < 16 * rows, torch.stack((place // 16, place % 16), 1)
    single = real, grid * real.unsqueeze(1), torch.tensor([rows, 16])
    real, places, shapes = (x.expand(len(images), *x.shape) for x in single)
    if images.is_meta:
        patches, real, places = (x[:, : 16 * rows] for x in (patches, real, places))
    return patches, real, places, shapes


def _naflexvit(padding: int) -> Model:
    def encode(model: nn.Module, images: Tensor, texts: Tensor | None) -> Any:
        patches, real, places, _ = _patches(images, padding)
        return model({"patches": patches, "patch_coord": places, "patch_valid": real.to(images.device)})

    return replace(_timm("naflexvit_base_patch16_gap", 256), encode=encode)


def _siglip2(padding: int) -> Model:
    def build(device: torch.device) -> Any:
        transformers = import_module("transformers")
        with device:
            return transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(patch_size=16, num_patches=256))

    def encode(model: nn.Module, images: Tensor, texts: Tensor | None) -> Any:
        patches, real, _, shapes = _patches(images, padding)
        mask = None if images.is_meta else real.to(images.device)  # to count FLOPs; a mask would be read
        return model(patches, pixel_attention_mask=mask, spatial_shapes=shapes).pooler_output

    return Model(build, encode, 256)


PADDED = {
    f"{name}-p{padding}": model(padding)
    for name, model in (("timm/naflexvit-b", _naflexvit), ("transformers/siglip2-b", _siglip2))
    for padding in (25, 50, 75)
}
"""Models by name and percentage of padding."""


# --- operations -----------------------------------------------------------------------------------------------------


class _Encoder(nn.Module):
    """A model as one call, for `functional_call`."""

    def __init__(self, model: nn.Module, encode: Callable[[Any, Tensor, Tensor | None], Any]) -> None:
        super().__init__()
        self.model = model
        self.encode = encode

    def forward(self, images: Tensor, texts: Tensor | None) -> Any:
        return self.encode(self.model, images, texts)


@lru_cache(maxsize=1)
def _pair(name: str, device: torch.device) -> Pair:
    """A model as it was built, and accelerated; both have the same parameters."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        before = _Encoder(model_of(name).build(device).train(), model_of(name).encode)
    for module in before.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    after = copy.deepcopy(before, {id(parameter): parameter for parameter in before.parameters()})
    evakernels.accelerate(after.model)
    names = tuple(key for key, value in before.named_parameters() if value.requires_grad)
    floats = [
        {key: buffer for key, buffer in encoder.named_buffers() if buffer.is_floating_point()}
        for encoder in (after, before)
    ]
    return Pair(Network(after, names, floats[0]), Network(before, names, floats[1]))


@lru_cache(maxsize=3)  # the two of one dtype, and the truth
def _frozen(name: str, dtype: torch.dtype, accelerated: bool) -> "_Encoder":
    """A model for inference, as it was built or accelerated with prepacked weights.

    Built weights require gradients, as in most programs: without them torch multiplies some inputs in bfloat16 at a
    tenth of the speed.
    """
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        encoder = _Encoder(model_of(name).build(torch.device("cpu")).to(dtype).eval(), model_of(name).encode)
    if accelerated:
        evakernels.accelerate(encoder.model, freeze=True)
    return encoder


def _inputs(shape: Shape, draw: Draw) -> Inputs:
    pair = _pair(shape.model, draw.device)
    return {
        "pair": pair,
        # torch multiplies by a weight without a gradient in another way.
        "parameters": [pair.plain.module.get_parameter(name).detach().requires_grad_() for name in pair.plain.names],
        **_samples(shape, draw),
    }


def _samples(shape: Shape, draw: Draw) -> Inputs:
    model = model_of(shape.model)
    texts = None
    if model.vocabulary:
        # The largest id is the end token, which some models pool.
        texts = draw.integers(model.vocabulary - 2, shape.batch, model.context)
        end = (shape.tokens or model.context) - 1
        texts[:, end], texts[:, end + 1 :] = model.vocabulary - 1, 0
    return {"images": draw.normal(shape.batch, 3, model.pixels, model.pixels), "texts": texts}


def _frozen_inputs(shape: Shape, draw: Draw) -> Inputs:
    return {"model": shape.model, **_samples(shape, draw)}


def _encode(model: str, images: Tensor, texts: Tensor | None, accelerated: bool = False) -> Any:
    return _frozen(model, images.dtype, accelerated)(images, texts)


def _before(pair: Pair, parameters: list[Tensor], images: Tensor, texts: Tensor | None) -> Any:
    with autocast(parameters, images):
        return pair.plain(parameters, images, texts)


def _after(pair: Pair, parameters: list[Tensor], images: Tensor, texts: Tensor | None) -> Any:
    with autocast(parameters, images):
        return pair.ours(parameters, images, texts)


def _work(shape: Shape, itemsize: int) -> Work:
    """FLOPs as torch counts them in the untouched model, backward twice as many; bytes of the parameters."""
    flops, parameters = _counted(shape.model)
    read = 4.0 * parameters
    return Work(Cost(flops * shape.batch, read), Cost(2 * flops * shape.batch, 2 * read))


@cache
def _counted(name: str) -> tuple[int, int]:
    """FLOPs of one sample, and parameters."""
    model = model_of(name)
    with (meta := torch.device("meta")):
        # Weights that require gradients keep torch's counter from following some modules under no_grad.
        module = model.build(meta).eval().requires_grad_(False)
        texts = torch.zeros(1, model.context, dtype=torch.int64) if model.vocabulary else None
        images = torch.zeros(1, 3, model.pixels, model.pixels)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.encode(module, images, texts)
    return counter.get_total_flops(), sum(parameter.numel() for parameter in module.parameters())


_DROPIN = register(
    Operation(
        name=DROPIN,
        summary="models of other libraries after accelerate(), weights in float32, autocast to the measured dtype",
        inputs=_inputs,
        eager=_before,
        ours=_after,
        baseline="untouched",
        work=_work,
        parse=parse,
        shapes={
            "cpu": tuple(f"{name} b{2 if name == 'timm/eva02-l' else 4}" for name in MODELS),
            "cuda": tuple(f"{name} b64" for name in MODELS),
        },
        gradients=("parameters",),
        small="timm/vit-b b1",
        by_request=True,
        is_model=True,
        references=False,
    )
)

register(
    replace(
        _DROPIN,
        name=FROZEN,
        summary="models of other libraries for inference after accelerate(freeze=True), weights in this dtype",
        inputs=_frozen_inputs,
        eager=_encode,
        ours=partial(_encode, accelerated=True),
        shapes={"cpu": tuple(f"{name} b{2 if name == 'timm/eva02-l' else 4}" for name in MODELS)},
        gradients=(),
        compiles=False,
    )
)


def _register_frozen(backend: str, **options: Any) -> None:
    @peer(FROZEN, devices=("cpu",), **options)
    def build(shape: Shape) -> Function:
        compiled: dict[torch.dtype, Function] = {}

        def encode(model: str, images: Tensor, texts: Tensor | None) -> Any:
            dtype = images.dtype
            if dtype not in compiled:
                compiled[dtype] = compile_frozen(_frozen(model, dtype, False), backend)
            return compiled[dtype](images, texts)

        return encode


_register_frozen("inductor", name="compile-freezing", package="torch")
_register_frozen("zentorch", package="zentorch")
