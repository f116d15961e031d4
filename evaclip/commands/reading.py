"""What commands share that read data: the options that say how, and what opens it."""

import argparse
from typing import TYPE_CHECKING, Any

from evaclip.data.kinds import KINDS

if TYPE_CHECKING:
    from evaclip.data import Source

_PASSED_ON = ("image_key", "caption_key", "csv_separator", "exif_orientation", "min_size", "max_image_pixels")


def add_reading(parser: Any, *, decoding: bool = True) -> None:
    """Adds `--kind`, `--image-key` and `--caption-key`, and with `decoding` how pictures are looked at."""
    add = parser.add_argument
    add("--kind", choices=KINDS, default="auto", help="what the data is (default: auto)")
    add("--image-key", metavar="KEY", help="member suffixes ('jpg;png') of shards, or the column, of the pictures")
    add("--caption-key", metavar="KEY", help="'txt', 'cls', 'json:FIELD', or the column, of captions or labels")
    if decoding:
        add("--exif-orientation", action="store_true", help="turn pictures as their EXIF data says")
        add("--min-size", type=int, default=0, metavar="N", help="pixels that a picture's shorter side must have")
        add("--max-image-pixels", type=int, metavar="N", help="width times height at most (default: Pillow's limit)")


def open_data(path: str, args: argparse.Namespace, **more: Any) -> "Source":
    """Opens it as these options say."""
    from evaclip.data import open_source

    told = {name: value for name in _PASSED_ON if (value := getattr(args, name, None)) is not None}
    return open_source(path, args.kind, **told, **more)
