"""Text queries with the pictures that a model finds for them, as small pictures that a report can show."""

import base64
import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from evaclip.atomic import write_json
from evaclip.errors import UserError

if TYPE_CHECKING:  # who shows a gallery shall not wait for torch
    from torch import Tensor

    from evaclip.eval.pairs import EncodedPairs

THUMBNAIL = 80


@dataclass(frozen=True)
class Found:
    """One picture that a query found: its sample, whether it is the right one, and a WebP data URI."""

    key: str
    correct: bool
    image: str


@dataclass(frozen=True)
class Query:
    """A text, the place (from 1) of its own picture among all, and the pictures found, best first."""

    text: str
    rank: int
    found: tuple[Found, ...]


@dataclass(frozen=True)
class Section:
    """Queries chosen by one rule, which `note` tells."""

    title: str
    note: str
    queries: tuple[Query, ...]


@dataclass(frozen=True)
class Gallery:
    """What is shown of one retrieval; `pictures` is how many were searched."""

    title: str
    pictures: int
    sections: tuple[Section, ...]

    def save(self, path: Path) -> None:
        """Writes the JSON file, atomically."""
        write_json(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "Gallery":
        """Reads what `save` wrote; UserError for a file that it did not write."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return cls(content["title"], content["pictures"], tuple(map(_section, content["sections"])))
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise UserError(f"{path} is no gallery ({type(exc).__name__}: {exc})") from exc


def build_gallery(title: str, pairs: "EncodedPairs", *, queries: int = 8, per_query: int = 8, seed: int = 0) -> Gallery:
    """Two sections: queries drawn at random, and those answered best."""
    import torch

    from evaclip.eval.ranking import target_ranks, top_items

    ranks = target_ranks(pairs.text_features, pairs.image_features, pairs.image_of_text)
    drawn = torch.randperm(len(ranks), generator=torch.Generator().manual_seed(seed))[:queries].tolist()
    best = _answered_best(pairs, ranks)[:queries]

    def answer(index: int) -> Query:
        found = top_items(pairs.text_features[index : index + 1], pairs.image_features, per_query)[1][0].tolist()
        own = int(pairs.image_of_text[index])
        shown = tuple(Found(pairs.key(item), item == own, thumbnail(pairs.picture(item))) for item in found)
        return Query(pairs.texts[index], int(ranks[index]) + 1, shown)

    sections = [Section("Drawn at random", f"Queries drawn with seed {seed}, not selected.", tuple(map(answer, drawn)))]
    if best:
        note = "The right picture first, and by the widest margin."
        sections.append(Section("Answered best", note, tuple(map(answer, best))))
    return Gallery(title, len(pairs.image_features), tuple(sections))


def thumbnail(image: Image.Image, size: int = THUMBNAIL) -> str:
    """A small copy on white, as a data URI."""
    picture = image.convert("RGBA")
    picture.thumbnail((size, size))
    canvas = Image.new("RGB", (size, size), "white")
    canvas.paste(picture, ((size - picture.width) // 2, (size - picture.height) // 2), picture)
    buffer = io.BytesIO()
    canvas.save(buffer, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _answered_best(pairs: "EncodedPairs", ranks: "Tensor") -> list[int]:
    """Texts whose picture comes first, by the distance to the second; of each picture's texts the best."""
    from evaclip.eval.ranking import top_items

    scores = top_items(pairs.text_features, pairs.image_features, 2)[0]
    order = (scores[:, 0] - scores[:, -1]).argsort(descending=True, stable=True)
    best: dict[int, int] = {}
    for text in order[ranks[order] == 0].tolist():
        best.setdefault(int(pairs.image_of_text[text]), text)
    return list(best.values())


def _section(content: dict[str, Any]) -> Section:
    queries = (Query(q["text"], q["rank"], tuple(Found(**found) for found in q["found"])) for q in content["queries"])
    return Section(content["title"], content["note"], tuple(queries))
