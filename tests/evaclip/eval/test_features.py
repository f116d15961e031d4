"""Features of images and texts, and their cache."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from eval_fakes import COLORS, ColorModel, ToTensor, tokenize_colors

from evaclip.data import open_source
from evaclip.errors import UserError
from evaclip.eval.features import FeatureOptions, encode_images, encode_texts

OPTIONS = FeatureOptions(batch_size=3, progress=False)


def test_encode_images_and_texts(color_model: ColorModel, color_shard: Path) -> None:
    images = encode_images(color_model, ToTensor(), open_source(str(color_shard)), OPTIONS)
    assert images.captions == list(COLORS)
    assert images.keys == [f"{number:03d}" for number in range(len(COLORS))]
    expected = torch.tensor(list(COLORS.values())).float() / 255 - 0.5
    assert torch.allclose(images.features, expected / expected.norm(dim=1, keepdim=True), atol=1e-6)
    assert torch.allclose(encode_texts(color_model, tokenize_colors, list(COLORS), OPTIONS), images.features)


def test_cache_returns_equal_features(tmp_path, color_model, color_shard):
    options = replace(OPTIONS, cache=tmp_path / "cache")
    source = open_source(str(color_shard))
    first = encode_images(color_model, ToTensor(), source, options)
    texts = encode_texts(color_model, tokenize_colors, ["red", "blue"], options)
    calls = color_model.calls
    again = encode_images(color_model, ToTensor(), source, options)
    assert torch.equal(again.features, first.features)
    assert (again.captions, again.keys) == (first.captions, first.keys)
    assert torch.equal(encode_texts(color_model, tokenize_colors, ["red", "blue"], options), texts)
    assert color_model.calls == calls


def test_cache_is_keyed_by_all_inputs(tmp_path, color_model, color_shard):
    options = replace(OPTIONS, cache=tmp_path / "cache")

    class Other(ToTensor):
        def __repr__(self) -> str:
            return "Other()"

    by_name, by_label = open_source(str(color_shard)), open_source(str(color_shard), caption_key="cls")
    encode_images(color_model, ToTensor(), by_name, options)
    encode_images(color_model, Other(), by_name, options)
    encode_images(color_model, ToTensor(), by_name, replace(options, precision="bf16"))
    assert encode_images(color_model, ToTensor(), by_label, options).captions[:2] == ["0", "1"]
    with torch.no_grad():
        color_model.scale[0] = 2
    encode_images(color_model, ToTensor(), by_name, options)
    encode_images(color_model, ToTensor(), open_source(str(color_shard), exif_orientation=True), options)
    assert len(list((tmp_path / "cache").iterdir())) == 6


def test_damaged_cache_file_is_replaced(tmp_path: Path, color_model: ColorModel) -> None:
    options = replace(OPTIONS, cache=tmp_path)
    expected = encode_texts(color_model, tokenize_colors, ["red"], options)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:20])
    assert torch.equal(encode_texts(color_model, tokenize_colors, ["red"], options), expected)
    assert encode_texts(color_model, tokenize_colors, ["red"], options).shape == (1, 3)


def test_transform_without_repr_is_not_cached(tmp_path, color_model, color_shard):
    source = open_source(str(color_shard))
    assert len(encode_images(color_model, lambda image: ToTensor()(image), source, OPTIONS)) == 8
    with pytest.raises(UserError, match="repr"):
        encode_images(color_model, lambda image: ToTensor()(image), source, replace(OPTIONS, cache=tmp_path))


def test_encode_texts_not_finite(color_model: ColorModel) -> None:
    with torch.no_grad():
        color_model.scale[0] = float("nan")
    with pytest.raises(UserError, match="for 2 of 2 texts, first for 'red'"):
        encode_texts(color_model, tokenize_colors, ["red", "blue"], OPTIONS)
    with pytest.raises(UserError, match="workers"):
        FeatureOptions(workers=-1)
