"""Features of pictures and texts: batched, in inference mode, under autocast and cached on disk if asked."""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from evaclip.data.config import DEFAULT_MAX_BAD_SHARE
from evaclip.errors import Refused, UserError
from evaclip.eval.finite import require_finite
from evaclip.model.config import Preprocess
from evaclip.transforms import Normalization, levels_of
from evaclip.weights import is_cut
from evaclip.weights.saving import save_file

Precision = Literal["fp32", "bf16", "fp16"]
Item = TypeVar("Item")
ALLOWED_UNREADABLE = DEFAULT_MAX_BAD_SHARE
"""Share of the samples that may be unreadable."""
_PROBES = 64
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NothingReadable(UserError):
    """Not one of the samples could be read."""


class ImageModel(Protocol):
    """What features of pictures need of a model."""

    def encode_image(self, images: Tensor, normalize: bool = False) -> Tensor: ...


class ImageTextModel(ImageModel, Protocol):
    """What the evaluation needs of a model: evaclip's CLIP, or any `nn.Module` with the same two methods."""

    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor: ...


Tokenizer = Callable[[list[str]], Tensor]
"""Texts to int64 tokens [n, context_length]."""


@dataclass(frozen=True)
class FeatureOptions:
    """How features are computed.

    Attributes:
        batch_size: pictures (or texts) at once.
        workers: processes that decode pictures; 0 decodes in this one.
        precision: fp32, or the 16-bit type of the autocast.
        cache: a folder in which features are kept for the next time.
        progress: show a bar, on a terminal.
    """

    batch_size: int = 64
    workers: int = 0
    precision: Precision = "fp32"
    cache: Path | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"the batch size must be 1 or more, got {self.batch_size}")
        if self.workers < 0:
            raise UserError(f"the number of workers must be 0 or more, got {self.workers}")


@dataclass(frozen=True)
class ImageFeatures:
    """What `encode_images` gives, in the order of the source; unreadable samples are left out.

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
    model: ImageModel, transform: Callable[[Any], Tensor], source: Source, options: FeatureOptions | None = None
) -> ImageFeatures:
    """Normalised features of all pictures of a source.

    The cache, if there is one, is keyed by the weights, the data, the transform and the precision.

    Raises:
        NothingReadable: no sample could be read.
        UserError: the model gave NaN or infinity (the sample is named).
    """
    options = options or FeatureOptions()
    cached = _CacheFile.of(options, model, "images", [_describe_source(source), _describe(transform)])
    if cached and (hit := cached.load()):
        return ImageFeatures(hit["features"], _unpack(hit["captions"]), _unpack(hit["keys"]))
    rows, captions, keys = [], list[str](), list[str]()

    def encode(batch: EvalBatch) -> None:
        rows.append(model.encode_image(batch.images, normalize=True).float().cpu())
        captions.extend(batch.captions)
        keys.extend(batch.keys)

    for_each_batch(model, encode, transform, source, options)
    result = ImageFeatures(torch.cat(rows), captions, keys)
    require_finite(result.features, keys, "picture")
    if cached:
        cached.save({"features": result.features, "captions": _pack(captions), "keys": _pack(keys)})
    return result


def for_each_batch(
    model: object,
    action: Callable[[EvalBatch], None],
    transform: Callable[[Any], Tensor],
    source: Source,
    options: FeatureOptions,
) -> None:
    """Hands every batch of a source to `action`, its pictures on the device of the model, which is in evaluation mode.

    Raises:
        NothingReadable: no sample could be read.
    """
    found = False
    # Workers send uint8: a quarter of the shared memory, and of the way to the device.
    preprocess = getattr(transform, "preprocess", Preprocess())
    levels = levels_of(transform, preprocess)
    batches = iterate(source, levels, options.batch_size, workers=options.workers)
    with _inference(model, options.precision) as device:
        finish = nn.Identity() if levels is transform else Normalization(preprocess, device)
        for batch in _progress(batches, len(source), "images", options):
            action(batch._replace(images=finish(batch.images.to(device))))
            found = True
    if not found:
        raise NothingReadable(f"none of the {len(source)} samples could be read")


def refuse_rest(source: Source, unreadable: int, allowed: float, option: str) -> None:
    """Refuses to measure what is left of a source where more than a share `allowed` of it could not be read.

    Args:
        unreadable: samples that could not be read, or that have fewer pixels than was asked for.
        option: what has the rest measured all the same.

    Raises:
        Refused: they are more.
    """
    if unreadable <= allowed * len(source):
        return
    smaller = f" or has fewer than {size} pixels a side" if (size := source.decoding.min_size) else ""
    raise Refused(
        f"{unreadable:,} of the {len(source):,} samples of {source.description} could not be read{smaller}, more than"
        f" {allowed:.0%}, so the result would not be that of the data: `evaclip data check` lists what is wrong,"
        f" {option} measures the rest all the same"
    )


def encode_texts(
    model: ImageTextModel, tokenizer: Tokenizer, texts: Sequence[str], options: FeatureOptions | None = None
) -> Tensor:
    """Normalised features [len(texts), embed_dim] float32 on the CPU.

    The cache, if there is one, is keyed by the weights, the texts and the precision.

    Raises:
        UserError: no texts, or the model gave NaN or infinity (the text is named).
    """
    options = options or FeatureOptions()
    if not texts:
        raise UserError("there are no texts to encode")
    cached = _CacheFile.of(options, model, "texts", texts)
    if cached and (hit := cached.load()):
        return hit["features"]
    batches = [list(texts[i : i + options.batch_size]) for i in range(0, len(texts), options.batch_size)]
    with _inference(model, options.precision) as device:
        rows = [
            model.encode_text(tokenizer(batch).to(device), normalize=True).float().cpu()
            for batch in _progress(batches, len(texts), "texts", options)
        ]
    features = torch.cat(rows)
    require_finite(features, texts, "text")
    if cached:
        cached.save({"features": features})
    return features


def weights_hash(model: object) -> str:
    """SHA-256 (hex) over the names, types, shapes and bytes of all weights; the same anywhere.

    Of a module that is cut up it is that of the whole, which all processes put together, a tensor at a time.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_module(model).state_dict().items()):
        whole = tensor.full_tensor() if is_cut(tensor) else tensor
        digest.update(f"{name} {whole.dtype} {tuple(whole.shape)}\n".encode())
        digest.update(whole.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _inference(model: object, precision: Precision) -> Iterator[torch.device]:
    """Evaluation mode (until the end), no gradients, autocast; yields the model's device."""
    module = _module(model)
    device = next(module.parameters()).device
    autocast: AbstractContextManager[object] = nullcontext()
    if precision != "fp32":
        autocast = torch.autocast(device.type, dtype=_AUTOCAST[precision])
    was_training = module.training
    module.eval()
    try:
        # Not inference_mode: what a sharded model gathers in it could never take part in training again.
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
    # The fingerprint covers names and sizes only; which member is the caption shows in the samples.
    digest = hashlib.sha256(f"{source.fingerprint} {source.decoding}".encode())
    for index in range(0, len(source), max(1, len(source) // _PROBES)):
        try:
            sample = source[index]
        except BadSample:
            continue
        digest.update(json.dumps(sample.captions).encode() + sample.image)
    return digest.hexdigest()


def _describe(transform: Callable[[Any], Tensor]) -> str:
    text = repr(transform)
    if re.search(r" at 0x[0-9a-f]+", text):
        raise UserError(f"features can be cached only for a transform whose repr tells what it does, got {text}")
    return text


@dataclass(frozen=True)
class _CacheFile:
    """One safetensors file, named after the hash of all that its contents depend on."""

    path: Path

    @classmethod
    def of(cls, options: FeatureOptions, model: object, kind: str, inputs: Sequence[str]) -> "_CacheFile | None":
        if options.cache is None:
            return None
        described = json.dumps([kind, weights_hash(model), options.precision, *inputs])
        return cls(options.cache / f"{kind}-{hashlib.sha256(described.encode()).hexdigest()[:24]}.safetensors")

    def load(self) -> dict[str, Tensor] | None:
        """The tensors, or None if there are none or the file is damaged (it is then written anew)."""
        try:
            return load_file(self.path)
        except (OSError, SafetensorError):
            return None

    def save(self, tensors: dict[str, Tensor]) -> None:
        try:
            with writing(self.path):
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with replacing(self.path) as temporary:
                    save_file(tensors, temporary)
        except SafetensorError as exc:  # of a full disk, for one
            raise UserError(f"cannot write {self.path}: {exc}") from exc


def _pack(texts: list[str]) -> Tensor:
    """A list of texts as bytes: safetensors holds tensors only."""
    return torch.frombuffer(bytearray(json.dumps(texts).encode()), dtype=torch.uint8)


def _unpack(data: Tensor) -> list[str]:
    texts: list[str] = json.loads(data.numpy().tobytes())
    return texts
