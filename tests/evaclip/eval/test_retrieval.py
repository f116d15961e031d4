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
from evaclip.eval.ranking import target_ranks, top_items
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


def test_evaluate_wrong_image_of_text() -> None:
    with pytest.raises(UserError, match="1 of 3 images have no caption"):
        evaluate(torch.eye(3), torch.eye(3), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match=r"\[0, 2\), got 2"):
        evaluate(torch.eye(2, 3), torch.eye(3), torch.tensor([0, 1, 2]))


def random_features(rows: int, dim: int, seed: int) -> torch.Tensor:
    values = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(values, dim=-1)


def brute_force_order(queries: torch.Tensor, items: torch.Tensor) -> list[list[int]]:
    scores = (queries.double() @ items.double().T).float().tolist()
    return [sorted(range(len(row)), key=lambda index: (-row[index], index)) for row in scores]


@pytest.mark.parametrize("block", [7, 64])
def test_target_ranks_match_sort(block: int) -> None:
    """Of distinct items, and of items that occur three times."""
    distinct = random_features(41, 5, 1)
    repeated = random_features(4, 777, 2).repeat_interleave(3, 0)[torch.tensor([0, 3, 6, 9, 1, 4, 7, 10, 2, 5, 8, 11])]
    for queries, items in (
        (random_features(23, 5, 0), distinct),
        (repeated + 0.01 * random_features(12, 777, 3), repeated),
    ):
        targets = torch.arange(len(queries)) * len(items) // len(queries)
        orders = brute_force_order(queries, items)
        expected = [order.index(target) for order, target in zip(orders, targets.tolist(), strict=True)]
        assert target_ranks(queries, items, targets, block=block).tolist() == expected


def test_target_never_beats_itself_by_rounding() -> None:
    for seed in range(20):
        # Large and small numbers that cancel: each order of addition gives another sum.
        half = random_features(1, 150, seed) * 10.0 ** (torch.arange(150) * 37 % 30)
        item = torch.cat([half, -half.flip(1)], 1)
        assert target_ranks(torch.ones(1, 300), item, torch.tensor([0])).tolist() == [0]


@pytest.mark.parametrize(("block", "k"), [(2, 6), (50, 100)])
def test_top_items_match_sort(block: int, k: int) -> None:
    """Scores of both signs, and zeros of both: each twice."""
    queries, items = random_features(11, 4, 4), random_features(30, 4, 5).repeat(2, 1)
    queries[3] = torch.tensor([-1.0, 0.0, 0.0, 0.0])
    items[[1, 31, 8, 38], 0] = torch.tensor([0.0, 0.0, -0.0, -0.0])
    scores, indices = top_items(queries, items, k, block=block)
    assert indices.tolist() == [order[:k] for order in brute_force_order(queries, items)]
    assert torch.equal(scores, (queries.double() @ items.double().T).float().gather(1, indices))
