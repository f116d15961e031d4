"""Features of images and texts: in batches, under autocast, optionally cached on disk."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from rich.console import Console
from rich.progress import track
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from evaclip.atomic import replacing, writing
from evaclip.data import BadSample, EvalBatch, Source, iterate
from evaclip.errors import Refused, UserError, require_finite
from evaclip.model.config import Preprocess
from evaclip.transforms import Normalization, levels_of
from evaclip.weights.files import save_file, weights_hash

Precision = Literal["fp32", "bf16", "fp16"]
Item = TypeVar("Item")
_PROBES = 64
"""Samples of a source that the name of its cache file depends on."""
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
Tokenizer = Callable[[list[str]], Tensor]
"""Texts to int64 tokens [n, context_length]."""


class NothingReadable(UserError):
    """None of the samples could be read."""


class ImageModel(Protocol):
    """A module with image features: evaclip's CLIP and image models, or any other with this method."""

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor: ...


class ImageTextModel(ImageModel, Protocol):
    """A module with image and text features: evaclip's CLIP, or any other with these two methods."""

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor: ...


@dataclass(frozen=True)
class FeatureOptions:
    """Options of the computation of features.

    Attributes:
        batch_size: images (or texts) per batch.
        workers: processes that decode images; 0 decodes in this one.
        precision: fp32, or the 16-bit dtype of autocast.
        cache: folder of cached features; None for no cache.
        progress: show a progress bar, on a terminal.
    """

    batch_size: int = 64
    workers: int = 0
    precision: Precision = "fp32"
    cache: Path | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {self.batch_size}")
        if self.workers < 0:
            raise UserError(f"workers must be 0 or more, got {self.workers}")


@dataclass(frozen=True)
class ImageFeatures:
    """Features of images in the order of the source, without unreadable samples.

    Attributes:
        features: [N, embed_dim] float32 on the CPU, of length 1.
        captions: the N captions.
        keys: the N names of the samples.
    """

    features: Tensor
    captions: list[str]
    keys: list[str]

    def __len__(self) -> int:
        return len(self.keys)


def encode_images(
    model: ImageModel, transform: Callable[[Any], Any], source: Source, options: FeatureOptions | None = None
) -> ImageFeatures:
    """Normalized features of all images of a source.

    The cache is keyed by the weights, the data, the transform and the precision.

    Raises:
        NothingReadable: no sample could be read.
        UserError: the model gave NaN or infinity (the sample is named).
    """
    options = options or FeatureOptions()

    def encode() -> dict[str, Tensor]:
        rows, captions, keys = list[Tensor](), list[str](), list[str]()

        def add(batch: EvalBatch) -> None:
            rows.append(model.encode_image(batch.images, normalize=True).float().cpu())
            captions.extend(batch.captions)
            keys.extend(batch.keys)

        for_each_batch(model, add, transform, source, options)
        features = torch.cat(rows)
        require_finite(features, keys, "image")
        return {"features": features, "captions": _pack(captions), "keys": _pack(keys)}

    inputs = [] if options.cache is None else [_describe_source(source), _describe(transform)]
    content = _cached(options, model, "images", inputs, encode)
    return ImageFeatures(content["features"], _unpack(content["captions"]), _unpack(content["keys"]))


def for_each_batch(
    model: object,
    action: Callable[[EvalBatch], None],
    transform: Callable[[Any], Any],
    source: Source,
    options: FeatureOptions,
) -> None:
    """Call `action` with every batch of a source, the images on the model's device, the model in evaluation mode.

    Args:
        transform: PIL image -> float32 `[3, height, width]`, or one packed image.

    Raises:
        NothingReadable: no sample could be read.
    """
    is_empty = True
    # Workers send uint8: a quarter of the shared memory and of the host-to-device copy.
    preprocess = getattr(transform, "preprocess", Preprocess())
    levels = levels_of(transform, preprocess)
    batches = iterate(source, levels, options.batch_size, workers=options.workers)
    with _inference(model, options.precision) as device:
        finish = nn.Identity() if levels is transform else Normalization(preprocess, device)
        for batch in _progress(batches, len(source), "images", options):
            action(batch._replace(images=finish(batch.images.to(device))))
            is_empty = False
    if is_empty:
        raise NothingReadable(f"none of the {len(source)} samples could be read")


def refuse_rest(source: Source, unreadable: int, allowed: float, option: str) -> None:
    """Refuse to evaluate a source of which more than a share `allowed` could not be read.

    Args:
        unreadable: number of samples that could not be read, or that have too few pixels.
        option: name of the option that allows them.

    Raises:
        Refused: there are more.
    """
    if unreadable <= allowed * len(source):
        return
    smaller = f" or has fewer than {size} pixels a side" if (size := source.decoding.min_size) else ""
    raise Refused(
        f"{unreadable:,} of the {len(source):,} samples of {source.description} could not be read{smaller}, more than"
        f" {allowed:.0%}, so the result would not describe the data: `evaclip data check` lists the faults,"
        f" {option} measures the rest all the same"
    )


def encode_texts(
    model: ImageTextModel, tokenizer: Tokenizer, texts: Sequence[str], options: FeatureOptions | None = None
) -> Tensor:
    """Normalized features [len(texts), embed_dim] float32 on the CPU.

    The cache is keyed by the weights, the texts and the precision.

    Raises:
        UserError: no texts, or the model gave NaN or infinity (the text is named).
    """
    options = options or FeatureOptions()
    if not texts:
        raise UserError("there are no texts to encode")

    def encode() -> dict[str, Tensor]:
        batches = [list(texts[i : i + options.batch_size]) for i in range(0, len(texts), options.batch_size)]
        with _inference(model, options.precision) as device:
            rows = [
                model.encode_text(tokenizer(batch).to(device), normalize=True).float().cpu()
                for batch in _progress(batches, len(texts), "texts", options)
            ]
        features = torch.cat(rows)
        require_finite(features, texts, "text")
        return {"features": features}

    return _cached(options, model, "texts", texts, encode)["features"]


@contextmanager
def _inference(model: object, precision: Precision) -> Iterator[torch.device]:
    """Context with evaluation mode, no gradients and autocast; yields the model's device."""
    module = _module(model)
    device = next(module.parameters()).device
    autocast: AbstractContextManager[object] = nullcontext()
    if precision != "fp32":
        autocast = torch.autocast(device.type, dtype=_AUTOCAST[precision])
    was_training = module.training
    module.eval()
    try:
        # Not inference_mode: tensors that a sharded model gathers in it could never take part in training again.
        with torch.no_grad(), autocast:
            yield device
    finally:
        module.train(was_training)


def _module(model: object) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    return model


def _progress(batches: Iterable[Item], samples: int, what: str, options: FeatureOptions) -> Iterable[Item]:
    console = Console(stderr=True)
    return track(
        batches,
        description=f"encoding {samples:,} {what}",
        total=-(-samples // options.batch_size),
        console=console,
        transient=True,
        disable=not (options.progress and console.is_terminal),
    )


def _describe_source(source: Source) -> str:
    # The fingerprint covers names and sizes only; the member with the caption shows in the samples.
    digest = hashlib.sha256(f"{source.fingerprint} {source.decoding}".encode())
    for index in range(0, len(source), max(1, len(source) // _PROBES)):
        try:
            sample = source[index]
        except BadSample:
            continue
        digest.update(json.dumps(sample.captions).encode() + sample.image)
    return digest.hexdigest()


def _describe(transform: Callable[[Any], Any]) -> str:
    text = repr(transform)
    if re.search(r" at 0x[0-9a-f]+", text):
        raise UserError(f"features can be cached only for a transform with a repr that describes it, got {text}")
    return text


def _cached(
    options: FeatureOptions,
    model: object,
    kind: str,
    inputs: Sequence[str],
    encode: Callable[[], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """Tensors of `encode`, from the cache if it has them; a damaged file is replaced."""
    if options.cache is None:
        return encode()
    described = json.dumps([kind, weights_hash(_module(model)), options.precision, *inputs])
    path = options.cache / f"{kind}-{hashlib.sha256(described.encode()).hexdigest()[:24]}.safetensors"
    with suppress(OSError, SafetensorError):
        return load_file(path)
    tensors = encode()
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as temporary:
                save_file(tensors, temporary)
    except SafetensorError as exc:  # a full disk, for example
        raise UserError(f"cannot write {path}: {exc}") from exc
    return tensors


def _pack(texts: list[str]) -> Tensor:
    """Strings as bytes, as safetensors holds tensors only."""
    return torch.frombuffer(bytearray(json.dumps(texts).encode()), dtype=torch.uint8)


def _unpack(data: Tensor) -> list[str]:
    texts: list[str] = json.loads(data.numpy().tobytes())
    return texts
