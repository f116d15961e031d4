"""Distinct images with all their captions, retrieval against brute force, and the gallery of examples."""

import base64
import io
import json
from math import comb
from pathlib import Path

import pytest
import torch
from eval_fakes import COLORS, ColorModel, ToTensor, png, tokenize_colors, write_tar
from PIL import Image

from evaclip.data import open_source
from evaclip.errors import UserError
from evaclip.eval.features import FeatureOptions
from evaclip.eval.results import Gallery
from evaclip.eval.retrieval import EncodedPairs, encode_pairs, evaluate
from evaclip.eval.runs import build_gallery


def encode(path: Path, **keys: str) -> EncodedPairs:
    options = FeatureOptions(batch_size=3, progress=False)
    return encode_pairs(ColorModel(), tokenize_colors, ToTensor(), open_source(str(path), **keys), options)


def write_table(folder: Path, rows: str) -> Path:
    """A table with these rows, and images called by their colours."""
    for name in ("red", "blue"):
        (folder / f"{name}.png").write_bytes(png(COLORS[name]))
    (folder / "captions.csv").write_text(f"filepath,title\n{rows}")
    return folder / "captions.csv"


def test_pairs_of_table_row_per_caption(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "bad.png").write_bytes(b"damaged")
    rows = "red.png,red\nblue.png,a blue\nred.png,some red\nred.png,red\nbad.png,x\nbad.png,y\nred.png,\n"
    pairs = encode(write_table(tmp_path, rows))
    assert pairs.indices == [0, 1]
    assert pairs.texts == ["red", "some red", "a blue"]
    assert pairs.image_of_text.tolist() == [0, 0, 1]
    assert pairs.image_features.shape == (2, 3)
    assert pairs.unreadable == 3
    assert "missing caption" in caplog.text
    assert "corrupt image" in caplog.text


def test_pairs_of_captions_per_sample(tmp_path: Path) -> None:
    samples = {
        "a": {"png": png(COLORS["red"]), "json": json.dumps({"captions": ["red", "very red"]}).encode()},
        "b": {"png": b"damaged", "json": json.dumps({"captions": ["green"]}).encode()},
        "c": {"png": png(COLORS["cyan"]), "json": json.dumps({"captions": ["cyan"]}).encode()},
    }
    pairs = encode(write_tar(tmp_path / "x.tar", samples), caption_key="json:captions")
    assert pairs.texts == ["red", "very red", "cyan"]
    assert pairs.image_of_text.tolist() == [0, 0, 1]
    assert [pairs.key(image) for image in range(2)] == ["a", "c"]
    assert pairs.picture(1).getpixel((0, 0)) == COLORS["cyan"]
    assert pairs.unreadable == 1
    with pytest.raises(UserError, match="none of the 1 samples"):
        encode(write_tar(tmp_path / "y.tar", {"a": {"txt": b"red"}}))


def test_gallery_shows_retrieved_images(color_shard: Path, tmp_path: Path) -> None:
    gallery = build_gallery("Colours", encode(color_shard), queries=4, per_query=3)
    drawn, best = gallery.sections
    assert len(drawn.queries) == len(best.queries) == 4
    assert gallery.pictures == 8
    for query in (*drawn.queries, *best.queries):
        assert query.rank == 1
        assert [found.correct for found in query.found] == [True, False, False]
        assert query.found[0].key == f"{list(COLORS).index(query.text):03d}"
        webp = base64.b64decode(query.found[0].image.partition(",")[2])
        pixel = Image.open(io.BytesIO(webp)).getpixel((40, 40))
        assert all(abs(a - b) < 12 for a, b in zip(pixel, COLORS[query.text], strict=True))
    gallery.save(tmp_path / "g.json")
    assert Gallery.load(tmp_path / "g.json") == gallery
    (tmp_path / "g.json").write_text("[]")
    with pytest.raises(UserError, match="is no gallery"):
        Gallery.load(tmp_path / "g.json")


def test_gallery_shows_best_caption_of_image(tmp_path: Path) -> None:
    table = write_table(tmp_path, "red.png,red\nred.png,very red\nblue.png,grey\n")
    best = build_gallery("x", encode(table)).sections[1]
    assert [query.text for query in best.queries] == ["red"]


def random_case(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """20 images with 1 to 5 captions each, in mixed order; captions resemble their image a little."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(20, 6, generator=generator)
    owner = torch.arange(20).repeat_interleave(torch.randint(1, 6, (20,), generator=generator))
    owner = owner[torch.randperm(len(owner), generator=generator)]
    texts = images[owner] + 1.5 * torch.randn(len(owner), 6, generator=generator)
    return torch.nn.functional.normalize(images, dim=-1), torch.nn.functional.normalize(texts, dim=-1), owner


def brute_force(images: torch.Tensor, texts: torch.Tensor, owner: torch.Tensor) -> dict[str, list[int]]:
    scores = images.double() @ texts.double().T
    texts_of = [[text for text, image in enumerate(owner.tolist()) if image == i] for i in range(len(images))]
    rows = [row.argsort(descending=True).tolist() for row in scores]
    columns = [column.argsort(descending=True).tolist() for column in scores.T]
    return {
        "image_to_text": [min(map(row.index, own)) for row, own in zip(rows, texts_of, strict=True)],
        "text_to_image": [column.index(own) for column, own in zip(columns, owner.tolist(), strict=True)],
    }


@pytest.mark.parametrize(("seed", "block"), [(0, 3), (1, 1000)])
def test_evaluate_matches_brute_force(seed: int, block: int) -> None:
    images, texts, owner = random_case(seed)
    result = evaluate(images, texts, owner, block=block)
    recalls = []
    for name, ranks in brute_force(images, texts, owner).items():
        direction = getattr(result, name)
        for k in (1, 5, 10):
            expected = sum(rank < k for rank in ranks) / len(ranks)
            assert direction.recall[k] == pytest.approx(expected)
            recalls.append(expected)
        assert direction.mean_rank == pytest.approx(sum(ranks) / len(ranks) + 1)
        assert direction.median_rank == pytest.approx(float(torch.tensor(ranks).double().quantile(0.5)) + 1)
        assert direction.queries == len(ranks)
    assert result.mean_recall == pytest.approx(sum(recalls) / 6)
    own, total = torch.bincount(owner).tolist(), len(texts)
    chance = sum(1 - comb(total - n, 5) / comb(total, 5) for n in own) / len(own)
    assert result.image_to_text.chance[5] == pytest.approx(chance)
    assert result.text_to_image.chance[5] == 5 / 20


def test_evaluate_few_images() -> None:
    result = evaluate(torch.eye(3), torch.eye(3), torch.arange(3))
    assert result.text_to_image.chance[10] == result.image_to_text.chance[10] == 1.0
    assert result.to_dict()["text_to_image"]["recall"] == {"1": 1.0, "5": 1.0, "10": 1.0}


def test_evaluate_wrong_image_of_text() -> None:
    with pytest.raises(UserError, match="1 of 3 images have no caption"):
        evaluate(torch.eye(3), torch.eye(3), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match=r"\[0, 2\), got 2"):
        evaluate(torch.eye(2, 3), torch.eye(3), torch.tensor([0, 1, 2]))
