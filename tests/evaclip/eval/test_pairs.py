import base64
import io
import json
from pathlib import Path

import pytest
from eval_fakes import COLORS, ColorModel, ToTensor, png, tokenize_colors, write_tar
from PIL import Image

from evaclip.data import open_source
from evaclip.errors import UserError
from evaclip.eval.features import FeatureOptions
from evaclip.eval.gallery import Gallery, build_gallery
from evaclip.eval.pairs import EncodedPairs, encode_pairs

OPTIONS = FeatureOptions(batch_size=3, progress=False)


def pairs_of(path: Path, **keys: str) -> EncodedPairs:
    return encode_pairs(ColorModel(), tokenize_colors, ToTensor(), open_source(str(path), **keys), OPTIONS)


def test_a_table_with_one_row_per_caption(tmp_path: Path) -> None:
    for name in ("red", "blue"):
        (tmp_path / f"{name}.png").write_bytes(png(COLORS[name]))
    table = tmp_path / "captions.csv"
    table.write_text("filepath,title\nred.png,red\nblue.png,a blue\nred.png,some red\nred.png,red\ngone.png,x\n")
    pairs = pairs_of(table)
    assert pairs.indices == [0, 1]
    assert pairs.texts == ["red", "some red", "a blue"]
    assert pairs.image_of_text.tolist() == [0, 0, 1]
    assert pairs.image_features.shape == (2, 3)
    assert pairs.unreadable == 1


def test_a_list_of_captions_per_sample(tmp_path: Path) -> None:
    samples = {
        "a": {"png": png(COLORS["red"]), "json": json.dumps({"captions": ["red", "very red"]}).encode()},
        "b": {"png": b"damaged", "json": json.dumps({"captions": ["green"]}).encode()},
        "c": {"png": png(COLORS["cyan"]), "json": json.dumps({"captions": ["cyan"]}).encode()},
    }
    pairs = pairs_of(write_tar(tmp_path / "x.tar", samples), caption_key="json:captions")
    assert pairs.texts == ["red", "very red", "cyan"]
    assert pairs.image_of_text.tolist() == [0, 0, 1]
    assert [pairs.key(image) for image in range(2)] == ["a", "c"]
    assert pairs.picture(1).getpixel((0, 0)) == COLORS["cyan"]
    assert pairs.unreadable == 1


def test_samples_are_counted_unreadable_not_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "red.png").write_bytes(png(COLORS["red"]))
    (tmp_path / "bad.png").write_bytes(b"damaged")
    table = tmp_path / "captions.csv"
    table.write_text("filepath,title\nred.png,red\nbad.png,a\nbad.png,b\nbad.png,c\nred.png,\n")
    assert pairs_of(table).unreadable == 4
    assert "missing caption" in caplog.text
    assert "corrupt image" in caplog.text


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "x.tar", {"a": {"txt": b"red"}})
    with pytest.raises(UserError, match="none of the 1 samples"):
        pairs_of(shard)


def test_the_gallery_shows_what_was_found(color_shard: Path) -> None:
    gallery = build_gallery("Colours", pairs_of(color_shard), queries=4, per_query=3)
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


def test_the_best_answered_show_each_picture_once(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(png(COLORS["red"]))
    (tmp_path / "blue.png").write_bytes(png(COLORS["blue"]))
    table = tmp_path / "captions.csv"
    table.write_text("filepath,title\nred.png,red\nred.png,very red\nblue.png,grey\n")
    best = build_gallery("x", pairs_of(table)).sections[1]
    assert [query.text for query in best.queries] == ["red"]


def test_a_gallery_survives_its_file(tmp_path: Path, color_shard: Path) -> None:
    gallery = build_gallery("Colours", pairs_of(color_shard), queries=2)
    gallery.save(tmp_path / "g.json")
    assert Gallery.load(tmp_path / "g.json") == gallery
    (tmp_path / "g.json").write_text("[]")
    with pytest.raises(UserError, match="is no gallery"):
        Gallery.load(tmp_path / "g.json")
