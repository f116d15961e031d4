"""A model at work: images and texts to embeddings, with decoding, transfer and compute at the same time."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Full, Queue
from typing import Any, Generic, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from evaclip.data.samples import UPRIGHT, BadSample, Fault, decode_image, loaded_image, read_image_file
from evaclip.errors import UserError, require_finite, unknown_name
from evaclip.loading import LoadedModel, load_model
from evaclip.machine import multiplies_bfloat16
from evaclip.packing import PackedImages, pack_images
from evaclip.transforms import PackedTransform, image_transform
from evakernels import keep_freed_memory
from evakernels.nn import freeze
from evakernels.nn.frozen import int8_unsupported_reason

T = TypeVar("T")
U = TypeVar("U")

Pixels = Tensor | PackedImages
"""An image `[3, height, width]`, or packed."""

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INT8 = "int8"
TEXT_TOKENS = 4096
"""Of one batch of texts: about as much work as 20 images of a B/16."""


def chosen_precision(precision: str, device: str) -> str:
    """The precision that `auto` means on a device. Raises UserError for an unknown one."""
    if precision == "auto":
        return "bf16" if not device.startswith("cpu") or multiplies_bfloat16() else "fp32"
    if precision not in (*PRECISIONS, INT8):
        raise unknown_name("precision", precision, ("auto", *PRECISIONS, INT8))
    if precision == INT8 and (reason := int8_unsupported_reason() if device.startswith("cpu") else "is for a CPU"):
        raise UserError(f"precision int8 {reason}; expected one of auto, {', '.join(PRECISIONS)}")
    return precision


def computed_dtype(precision: str) -> torch.dtype:
    """Dtype of computation, except for linear layers in int8."""
    if precision == INT8:
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    return PRECISIONS[precision]


@dataclass(frozen=True)
class Encoded(Generic[T]):
    """Some items of `Encoder.stream`, in their order.

    Attributes:
        items: encoded items.
        embeddings: float32 `[len(items), dim]` on the CPU, of length 1.
        faults: of the items of this part that can't be read.
        waited: seconds in which this thread had no image to encode.
    """

    items: list[T]
    embeddings: Tensor
    faults: list[Fault] = field(default_factory=list)
    waited: float = 0.0


class Encoder:
    """A model for inference. Embeddings are the outputs of `encode_image` and `encode_text`, of length 1.

    On a CPU, linear weights are prepacked (`evakernels.nn.freeze`) unless the tower is compiled, and under Linux the
    process keeps freed memory for the next pass. For a compiled tower, batches are padded to powers of two.

    Args:
        model: what `evaclip eval` takes, `NAME[:WEIGHTS]`, a run or checkpoint folder, `hf-hub:OWNER/NAME`; or a model
            that is loaded already, which then is this object's alone. A NAME alone, without weights, is refused; an
            `Encoder(load_model(NAME))` has random ones.
        device: `auto` for a GPU if there is one, else the CPU.
        precision: of the weights and activations. `auto` is bf16 where the device has instructions for it, with
            embeddings that differ by about 1e-3 from the model's own, else fp32, where they differ by less than 1e-5.
            `int8`, on a CPU with VNNI or AMX, multiplies in 8 bits in linear layers, but for the first block's, and
            does the rest as `auto` does.
        batch_size: images at once; None for 32 on a CPU and 256 on a GPU.
        threads: that decode images while others are computed; None for one a core, 8 at most.
        compile: let torch.compile make the image tower's code, which takes minutes for each size of batch, once.
        max_patches: keep each image's aspect ratio, in at most so many patches, packed without padding; None for the
            model's own preprocessing.

    Raises:
        UserError: for a model, device or number that doesn't exist, and for a model without weights.

    Example:
        ```python
        encoder = evaclip.Encoder("EVA02-CLIP-B-16:merged2b_s8b_b131k")
        scores = encoder.images(["cat.jpg", "dog.jpg"]) @ encoder.texts(["a cat", "a dog"]).T
        ```
    """

    def __init__(
        self,
        model: str | LoadedModel,
        *,
        device: str = "auto",
        precision: str = "auto",
        batch_size: int | None = None,
        threads: int | None = None,
        compile: bool = False,
        max_patches: int | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {batch_size}")
        if threads is not None and threads < 1:
            raise UserError(f"threads must be 1 or more, got {threads}")
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.precision = chosen_precision(precision, device)
        loaded = load_model(model, device=device, random=False) if isinstance(model, str) else model
        self.name, self.origin = loaded.name, loaded.origin
        self.tokenizer, self.transform = loaded.tokenizer, loaded.transform
        if max_patches is not None:
            config = loaded.model.config
            self.transform = image_transform(config.vision, replace(config.preprocess, max_patches=max_patches))
        if compile and self.max_patches is not None:
            raise UserError("compile must be False for packed images, got True")
        self.device = torch.device(device)
        self._dtype = computed_dtype(self.precision)
        self.model = loaded.model.to(self.device, self._dtype).eval().requires_grad_(False)
        int8 = self.precision == INT8
        if int8 and compile:
            raise UserError("precision int8 isn't compiled; expected compile=False")
        self.batch_size = batch_size or (32 if self.device.type == "cpu" else 256)
        self.threads = threads or min(8, torch.get_num_threads())
        self._fills_up = compile
        self._prepare()
        self._tower: Callable[[Any], Tensor] = self.model.visual
        if compile:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"  # CUDA graphs
            self._tower = torch.compile(self.model.visual, mode=mode)

    def __repr__(self) -> str:
        return f"Encoder({self.name!r}, precision={self.precision!r}, device={str(self.device)!r})"

    def _prepare(self) -> None:
        if self.device.type == "cpu":
            keep_freed_memory()
            if not self._fills_up:
                freeze(self.model, int8=_in_8_bits if self.precision == INT8 else False)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # In another process: weights are pickled as they were before they were laid out.
        vars(self).update(state)
        self._prepare()

    @property
    def dim(self) -> int:
        """Elements of an embedding."""
        return self.model.config.embed_dim

    @property
    def max_patches(self) -> int | None:
        """Limit of an image's patches if images keep their aspect ratio; None for images of one size."""
        is_packed = isinstance(self.transform, PackedTransform)
        return self.transform.preprocess.max_patches if is_packed else None

    def images(self, pictures: Iterable[Any]) -> Tensor:
        """Embeddings float32 `[n, dim]` on the CPU, of length 1.

        Args:
            pictures: paths, files as bytes, PIL images, uint8 arrays `[H, W, 3]` or `[H, W]`, or tensors
                `[3, height, width]` or packed images as `transform` gives them; or one of these.

        Raises:
            UserError: for an image that can't be read, which is named.
            TypeError: an item is not an image.
        """
        if isinstance(pictures, str | Path | bytes | Image.Image) or _is_one(pictures):
            pictures = [pictures]
        parts = []
        for part in self.stream(pictures):
            if part.faults:
                raise UserError(str(part.faults[0]))
            parts.append(part.embeddings)
        return torch.cat(parts) if parts else torch.empty(0, self.dim)

    def texts(self, texts: str | Sequence[str]) -> Tensor:
        """Embeddings float32 `[n, dim]` on the CPU, of length 1. Texts of about the same length are computed together.

        Raises:
            TypeError: for anything but a string or a sequence of strings.
        """
        tokens = self.tokenizer(texts)
        features = torch.empty(len(tokens), self.dim)
        for rows in _by_length(self.model.text.end_positions(tokens) + 1):
            with torch.inference_mode():
                features[rows] = F.normalize(self.model.text(tokens[rows].to(self.device)).float(), dim=-1).cpu()
        require_finite(features, range(len(features)), "text")
        return features

    def stream(self, items: Iterable[T], picture: Callable[[T], Any] | None = None) -> Iterator[Encoded[T]]:
        """Encodes images as they come, any number of them, in batches, while the next ones are read and decoded.

        Args:
            items: whatever stands for an image; one thread goes through them.
            picture: called in threads; returns the image of an item in any form that `images` takes, or None to leave
                the item out; BadSample becomes a fault. Without it items are images.

        Raises:
            UserError: if the model gives NaN or infinity.
        """

        def step(item: T) -> tuple[T, Pixels | Fault | None]:
            return item, self._read(item, picture)

        if isinstance(items, Sequence) and len(items) == 1:
            # Nothing can be read ahead, and starting threads takes longer than decoding one image.
            read: Iterator[tuple[T, Pixels | Fault | None]] = map(step, items)
        else:
            read = prefetch(items, step, threads=self.threads, depth=3 * self.batch_size)
        queued: _Batch[T] | None = None
        for batch in _batches(read, self.batch_size):
            # On a GPU this returns at once, and the one before is fetched while it is computed.
            batch.features = self._encode(batch.pixels) if batch.pixels else None
            if queued is not None:
                yield self._finished(queued)
            queued = batch
        if queued is not None:
            yield self._finished(queued)

    def _read(self, item: T, picture: Callable[[T], Any] | None) -> Pixels | Fault | None:
        try:
            if picture is None:
                return self._pixels(item)
            image = picture(item)
            return None if image is None else self._pixels(image)
        except BadSample as exc:
            return exc.fault

    def _pixels(self, image: Any) -> Pixels:
        if self.max_patches is not None:
            if isinstance(image, PackedImages) and len(image) == 1:
                return image
            if isinstance(image, Tensor):
                return pack_images([image.float()], self.model.config.vision.patch_size)
        if isinstance(image, Tensor):
            expected = (3, *self.model.config.vision.image_shape)
            if image.shape != expected or not image.is_floating_point():
                raise TypeError(
                    f"an image tensor must be floating point of shape {list(expected)}, as the model's preprocessing"
                    f" returns it, got {image.dtype} of shape {list(image.shape)}"
                )
            return image.float()
        return self.transform(_decoded(image))

    def _encode(self, pixels: list[Any]) -> Tensor:
        images: Any = torch.stack(pixels) if self.max_patches is None else PackedImages.concatenate(pixels)
        if self._fills_up:
            size = min(self.batch_size, 1 << (len(pixels) - 1).bit_length())
            images = torch.cat((images, images[:1].expand(size - len(pixels), -1, -1, -1)))
        if self.device.type == "cuda":
            images = images.pin_memory()
        images = images.to(self.device, non_blocking=True).to(dtype=self._dtype)
        with torch.inference_mode():
            return F.normalize(self._tower(images)[: len(pixels)].float(), dim=-1)

    def _finished(self, batch: "_Batch[T]") -> Encoded[T]:
        embeddings = torch.empty(0, self.dim) if batch.features is None else batch.features.cpu()
        require_finite(embeddings, batch.items, "image")
        return Encoded(batch.items, embeddings, batch.faults, batch.waited)


def prefetch(items: Iterable[T], function: Callable[[T], U], *, threads: int, depth: int) -> Iterator[U]:
    """Yield `function(item)` of each item in order; threads compute the results in advance.

    A single thread iterates `items`. Its exception is raised after the results of earlier items, an exception of
    `function` in place of its result. Closing the iterator stops the threads.

    Args:
        threads: number of threads that run `function`.
        depth: maximum number of finished and running results.
    """
    queue: Queue[Future[U] | None] = Queue(depth)
    stopped = threading.Event()

    def put(future: Future[U] | None) -> bool:
        while not stopped.is_set():
            try:
                queue.put(future, timeout=0.1)
            except Full:
                continue
            return True
        return False

    def feed() -> None:
        try:
            for item in items:
                if not put(pool.submit(function, item)):
                    return
        except BaseException as exc:
            failed = Future[U]()
            failed.set_exception(exc)
            put(failed)
        put(None)

    with ThreadPoolExecutor(threads, "evaclip-stream") as pool:
        feeder = threading.Thread(target=feed, name="evaclip-feed", daemon=True)
        feeder.start()
        try:
            while (future := queue.get()) is not None:
                yield future.result()
        finally:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            feeder.join()


def _in_8_bits(parameter: str) -> bool:
    """Whether a weight is quantized: in every block except a tower's first, which makes half of the rounding error."""
    return "blocks.0." not in parameter


@dataclass
class _Batch(Generic[T]):
    """Images encoded together."""

    items: list[T] = field(default_factory=list)
    pixels: list[Pixels] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    waited: float = 0.0
    features: Tensor | None = None


def _batches(read: Iterator[tuple[T, Pixels | Fault | None]], size: int) -> Iterator[_Batch[T]]:
    batch, asked = _Batch[T](), time.monotonic()
    for item, result in read:
        batch.waited += time.monotonic() - asked
        if isinstance(result, Fault):
            batch.faults.append(result)
        elif result is not None:
            batch.items.append(item)
            batch.pixels.append(result)
        if len(batch.pixels) == size:
            yield batch
            batch = _Batch[T]()
        asked = time.monotonic()
    if batch.items or batch.faults:
        yield batch


def _by_length(lengths: Tensor) -> Iterator[Tensor]:
    """Rows of texts of these numbers of tokens, in batches of `TEXT_TOKENS` at most, the longest texts first."""
    rows = lengths.argsort(descending=True, stable=True)
    while len(rows):
        count = max(1, int((lengths[rows].cumsum(0) <= TEXT_TOKENS).sum()))
        yield rows[:count]
        rows = rows[count:]


def _is_one(image: Any) -> bool:
    """Whether an array or tensor is an image, and not several."""
    if isinstance(image, PackedImages):
        return True
    if isinstance(image, Tensor):
        return image.ndim == 3
    return isinstance(image, np.ndarray) and (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4)))


def _decoded(image: Any) -> Image.Image:
    if isinstance(image, str | Path):
        # Not a regular one alone, as a shell's <(curl ...) is a pipe.
        return decode_image(read_image_file(Path(image), regular=False), str(image), UPRIGHT)
    if isinstance(image, bytes):
        return decode_image(image, f"an image of {len(image):,} bytes", UPRIGHT)
    if isinstance(image, Image.Image):
        return loaded_image(image, str(getattr(image, "filename", "") or "a PIL image"))
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.size and _is_one(image):
        return Image.fromarray(image)
    kind = f"{image.dtype} array {list(image.shape)}" if isinstance(image, np.ndarray) else type(image).__name__
    raise TypeError(
        "an image must be a path, bytes, a PIL image, a uint8 array [H, W, 3] or [H, W], or a tensor as the model's"
        f" preprocessing returns it, got {kind}"
    )
