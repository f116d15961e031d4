"""A sample as it is stored, and what can be wrong with one."""

import io
import warnings
from dataclasses import dataclass
from enum import StrEnum

from PIL import Image


class FaultKind(StrEnum):
    """What was wrong; the values are the words of logs and tables."""

    DAMAGED_SHARD = "damaged shard"
    UNREADABLE = "unreadable file"
    UNREACHABLE = "unreachable shard"
    MISSING_IMAGE = "missing image"
    MISSING_CAPTION = "missing caption"
    CORRUPT_IMAGE = "corrupt image"
    OVERSIZED_IMAGE = "oversized image"


@dataclass(frozen=True)
class Fault:
    """One fault: what, where (shard and key, or path) and the details."""

    kind: FaultKind
    name: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}: {self.name}" + (f" ({self.detail})" if self.detail else "")


class BadSample(Exception):
    """A sample that cannot be used."""

    def __init__(self, kind: FaultKind, name: str, detail: str = "") -> None:
        super().__init__(kind, name, detail)
        self.fault = Fault(kind, name, detail)


@dataclass(frozen=True)
class RawSample:
    """An undecoded sample: its key, the bytes of its image file, and one or more captions, main one first."""

    key: str
    image: bytes
    captions: tuple[str, ...]

    @property
    def caption(self) -> str:
        """The main caption."""
        return self.captions[0]


def decode_image(data: bytes, name: str, at_least: int | None = None) -> Image.Image:
    """Decodes an image file completely, in its own mode; EXIF orientation is not applied.

    With `at_least`, a JPEG may be decoded at 1/2, 1/4 or 1/8 of its size as long as
    both sides keep that many pixels. Raises BadSample for damaged data and for more pixels than
    `PIL.Image.MAX_IMAGE_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data))
        if at_least is not None:
            image.draft(None, (at_least, at_least))
        image.load()
        return image
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as exc:
        raise BadSample(FaultKind.OVERSIZED_IMAGE, name, str(exc)) from exc
    except MemoryError:
        raise
    except Exception as exc:  # the decoders raise almost anything on damaged data: struct.error, IndexError, ...
        raise BadSample(FaultKind.CORRUPT_IMAGE, name, f"{type(exc).__name__}: {exc}") from exc
