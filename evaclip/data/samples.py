"""A sample as it is stored, its decoding, and its faults."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from stat import S_ISREG

from PIL import Image, ImageOps, UnidentifiedImageError

from evaclip.pixels import DEFAULT_MAX_IMAGE_PIXELS, FORMATS, UnknownRangeError, eight_bit, open_image


class FaultKind(StrEnum):
    """Kinds of faults; the values are the words of logs and tables."""

    DAMAGED_SHARD = "damaged shard"
    DUPLICATE_KEY = "duplicate key"
    EMPTY_CLASS = "class without images"
    UNREADABLE = "unreadable file"
    UNREACHABLE = "unreachable shard"
    MISSING_IMAGE = "missing image"
    MISSING_CAPTION = "missing caption"
    CORRUPT_IMAGE = "corrupt image"
    OVERSIZED_IMAGE = "oversized image"
    UNDERSIZED_IMAGE = "undersized image"
    UNKNOWN_RANGE = "unknown range of pixels"


@dataclass(frozen=True)
class Fault:
    """One fault: its kind, its place (shard and key, or path) and details.

    Attributes:
        name: the sample, or the file if it is none of a sample.
        file, key: the parts of the name, where they are known; see `Source.place`.
        index: the sample's index in its source, if known.
    """

    kind: FaultKind
    name: str
    detail: str = ""
    file: str = ""
    key: str = ""
    index: int | None = None

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}" + (f" ({self.detail})" if self.detail else "")


class BadSample(Exception):
    """A sample that cannot be used."""

    def __init__(self, kind: FaultKind, name: str, detail: str = "") -> None:
        super().__init__(kind, name, detail)
        self.fault = Fault(kind, name, detail)


@dataclass(frozen=True)
class RawSample:
    """An undecoded sample: its key, the bytes of its image file, and its captions, main one first.

    There is one at least unless the source's `wants_captions` is off.
    """

    key: str
    image: bytes
    captions: tuple[str, ...]

    @property
    def caption(self) -> str:
        """The main caption; "" without any."""
        return self.captions[0] if self.captions else ""


@dataclass(frozen=True)
class Decoding:
    """How image files are decoded.

    Attributes:
        exif_orientation: rotate images as their EXIF data says.
        min_size: pixels that the shorter side must have.
        at_least: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as both sides keep that many pixels;
            None decodes it whole.
        max_pixels: pixels, width times height, that an image may have.
    """

    exif_orientation: bool = False
    min_size: int = 0
    at_least: int | None = None
    max_pixels: int = DEFAULT_MAX_IMAGE_PIXELS


WHOLE = Decoding()
REDUCTION_MARGIN = 2
"""`at_least` divided by the model's image size, where `jpeg_reduction` is on."""
UPRIGHT = Decoding(exif_orientation=True)
_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "JPEG2000": "jp2"}


def decode_image(data: bytes, name: str, decoding: Decoding = WHOLE) -> Image.Image:
    """Decodes an image file completely, in its own mode, but for pixels that are not bytes: see `eight_bit`.

    Raises BadSample for damaged data, other formats than `FORMATS`, too few pixels, too many, and pixels of an unknown
    range.
    """
    with _faults(name):
        image: Image.Image = open_image(data, decoding.max_pixels)
        if min(image.size) < decoding.min_size:
            detail = f"{image.width} x {image.height} pixels; at least {decoding.min_size} are asked for"
            raise BadSample(FaultKind.UNDERSIZED_IMAGE, name, detail)
        if decoding.at_least is not None:
            image.draft(None, (decoding.at_least, decoding.at_least))
        image.load()
        if decoding.exif_orientation:
            ImageOps.exif_transpose(image, in_place=True)
        return eight_bit(image)


def image_suffix(data: bytes, name: str) -> str:
    """The suffix of files of an image's format, such as 'jpg'. Raises BadSample for other formats than `FORMATS`."""
    with _faults(name):
        image = open_image(data)
    return _SUFFIXES.get(image.format or "", str(image.format).lower())


def loaded_image(image: Image.Image, name: str) -> Image.Image:
    """As `decode_image`, of an open image, without rotation. Raises BadSample."""
    with _faults(name):
        image.load()
        return eight_bit(image)


@contextmanager
def _faults(name: str) -> Iterator[None]:
    """Raises BadSample for errors of Pillow and its decoders in a sample's file."""
    try:
        yield
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as exc:
        raise BadSample(FaultKind.OVERSIZED_IMAGE, name, str(exc)) from exc
    except (BadSample, MemoryError):
        raise
    except UnidentifiedImageError as exc:
        raise BadSample(FaultKind.CORRUPT_IMAGE, name, f"the format must be {', '.join(FORMATS)}") from exc
    except UnknownRangeError as exc:
        raise BadSample(FaultKind.UNKNOWN_RANGE, name, str(exc)) from exc
    except Exception as exc:  # the decoders raise almost anything on damaged data: struct.error, IndexError, ...
        raise BadSample(FaultKind.CORRUPT_IMAGE, name, f"{type(exc).__name__}: {exc}") from exc


def read_image_file(path: Path, *, regular: bool = True) -> bytes:
    """The bytes of an image file.

    Raises BadSample if it is missing, empty, unreadable or, if `regular`, a pipe or device, which could block forever.
    """
    try:
        if regular and not S_ISREG(path.stat().st_mode):
            raise BadSample(FaultKind.UNREADABLE, str(path), "not a regular file")
        data = path.read_bytes()
    except FileNotFoundError as exc:
        raise BadSample(FaultKind.MISSING_IMAGE, str(path), "no such file") from exc
    except (OSError, ValueError) as exc:
        raise BadSample(FaultKind.UNREADABLE, str(path), getattr(exc, "strerror", None) or str(exc)) from exc
    if not data:
        raise BadSample(FaultKind.MISSING_IMAGE, str(path), "the file has 0 bytes")
    return data


def texts_of(value: object) -> tuple[str, ...]:
    """The captions in a value of a JSON file or a table: one, or a list. Values that are not text are left out."""
    listed: Sequence[object] = value if isinstance(value, list) else [value]
    # A number is a caption too: class labels often are.
    return tuple(sound(str(item)) for item in listed if isinstance(item, str | int) and not isinstance(item, bool))


def sound(text: str) -> str:
    """The text with '?' for halves of a character, which JSON can hold ("\\ud83d") and no encoding and tokenizer."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def not_blank(captions: Sequence[str]) -> tuple[str, ...]:
    """The captions without surrounding spaces, without empty ones."""
    return tuple(filter(None, (caption.strip() for caption in captions)))


_LOG = logging.getLogger("evaclip.data")
_NAMED_PER_KIND = 20
_SUMMARY_EVERY = 1000
_MIN_WINDOW, _MAX_WINDOW = 1_000, 10_000_000


class FaultLog:
    """Names the first faults of each kind in the log "evaclip.data"; from then on it only counts them."""

    def __init__(self) -> None:
        self.counts: Counter[FaultKind] = Counter()

    def add(self, faults: Iterable[Fault]) -> None:
        """Counts and logs faults."""
        for fault in faults:
            self.counts[fault.kind] += 1
            count = self.counts[fault.kind]
            if count < _NAMED_PER_KIND:
                _LOG.warning("%s", fault)
            elif count == _NAMED_PER_KIND:
                _LOG.warning("%s; more of this kind are only counted, `evaclip data check` lists them", fault)
            elif count % _SUMMARY_EVERY == 0:
                _LOG.warning("%d samples with %s so far, the last: %s", count, fault.kind, fault.name)


class BadShare:
    """The share of bad samples that a training reads, in windows of one epoch each.

    The windows follow one another from where counting begins. One has 1,000 to 10,000,000 samples, so that neither a
    handful of samples nor one bad shard of many is taken for the whole data set.

    Args:
        epoch: samples of the data set.
        allowed: share of bad samples among all that are read.
        samples, bad: where counting begins: the samples used so far, and the bad ones that were replaced.
    """

    def __init__(self, epoch: int, allowed: float, samples: int, bad: int) -> None:
        self._window = min(max(epoch, _MIN_WINDOW), _MAX_WINDOW)
        self._allowed = allowed
        self._samples, self._bad = samples, bad

    def excess(self, samples: int, bad: int) -> tuple[int, int] | None:
        """The window's bad samples and all that it read, if more are bad than a whole window may have; else None."""
        used, faults = samples - self._samples, bad - self._bad
        if faults > self._allowed * (max(used, self._window) + faults):
            return faults, used + faults
        if used >= self._window:
            self._samples, self._bad = samples, bad
        return None
