import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from eval_fakes import COLORS, ColorModel, ToTensor, png, tokenize_colors, write_tar
from PIL import Image
from torch import Tensor, nn

from evaclip import create_model, data
from evaclip.data import open_source
from evaclip.errors import UserError
from evaclip.eval import features
from evaclip.eval.features import FeatureOptions, encode_images, encode_texts, weights_hash
from evaclip.transforms import EvalTransform

OPTIONS = FeatureOptions(batch_size=3, progress=False)


def test_encode_images_and_texts(color_model: ColorModel, color_shard: Path) -> None:
    images = encode_images(color_model, ToTensor(), open_source(str(color_shard)), OPTIONS)
    assert images.captions == list(COLORS)
    assert images.keys == [f"{number:03d}" for number in range(len(COLORS))]
    expected = torch.tensor(list(COLORS.values())).float() / 255 - 0.5
    assert torch.allclose(images.features, expected / expected.norm(dim=1, keepdim=True), atol=1e-6)
    assert torch.allclose(encode_texts(color_model, tokenize_colors, list(COLORS), OPTIONS), images.features)


def test_encode_images_with_workers_sends_uint8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Floats(EvalTransform):
        def __call__(self, image: Image.Image) -> torch.Tensor:
            return super().__call__(image)

    sent: list[torch.dtype] = []

    def iterate(*args: Any, **options: Any) -> Iterator[Any]:
        for batch in data.iterate(*args, **options):
            sent.append(batch.images.dtype)
            yield batch

    monkeypatch.setattr(features, "iterate", iterate)
    samples = {f"{number}": {"png": noise(number), "txt": b"noise"} for number in range(5)}
    source, options = open_source(str(write_tar(tmp_path / "x.tar", samples))), replace(OPTIONS, workers=1)
    model = create_model("tiny")
    found = [
        encode_images(model, make(model.config.vision.image_size, model.config.preprocess), source, options).features
        for make in (Floats, EvalTransform)
    ]
    assert torch.equal(*found)
    assert sent == [torch.float32] * 2 + [torch.uint8] * 2


def noise(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (50, 70, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_encode_texts_restores_mode(color_model: ColorModel) -> None:
    color_model.train()
    features = encode_texts(color_model, tokenize_colors, ["red"], OPTIONS)
    assert color_model.modes == [False]
    assert color_model.training
    assert not features.requires_grad


def test_encode_images_without_unreadable_samples(tmp_path: Path, color_model: ColorModel) -> None:
    samples = {
        "a": {"png": png((255, 0, 0)), "txt": b"red"},
        "b": {"png": b"no picture", "txt": b"green"},
        "c": {"png": png((0, 0, 255)), "txt": b"blue"},
    }
    source = open_source(str(write_tar(tmp_path / "x.tar", samples)))
    images = encode_images(color_model, ToTensor(), source, OPTIONS)
    assert images.keys == ["a", "c"]
    assert images.features.shape == (2, 3)
    shard = write_tar(tmp_path / "y.tar", {"b": {"png": b"no picture", "txt": b"green"}})
    with pytest.raises(UserError, match="none of the 1 samples could be read"):
        encode_images(color_model, ToTensor(), open_source(str(shard)), OPTIONS)
    with pytest.raises(UserError, match="no texts"):
        encode_texts(color_model, tokenize_colors, [], OPTIONS)


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


def test_encode_texts_under_autocast() -> None:
    model = ColorModel()
    model.linear = torch.nn.Linear(3, 3)
    seen = []
    model._features = lambda color, normalized: seen.append(model.linear(color).dtype) or color
    features = encode_texts(model, tokenize_colors, ["red"], replace(OPTIONS, precision="bf16"))
    assert seen == [torch.bfloat16]
    assert features.dtype == torch.float32


def test_encode_texts_not_finite(color_model: ColorModel) -> None:
    with torch.no_grad():
        color_model.scale[0] = float("nan")
    with pytest.raises(UserError, match="for 2 of 2 texts, first for 'red'"):
        encode_texts(color_model, tokenize_colors, ["red", "blue"], OPTIONS)


def test_weights_hash_depends_on_all_weights() -> None:
    def made(change: Callable[[Tensor], Tensor] = lambda weight: weight, name: str = "a") -> nn.Module:
        weights = torch.randn(3, 7, generator=torch.Generator().manual_seed(0))
        return nn.ParameterDict({name: nn.Parameter(change(weights)), "empty": nn.Parameter(torch.empty(0))})

    def one_bit(weight: Tensor) -> Tensor:
        weight[2, 6] = torch.nextafter(weight[2, 6], torch.tensor(9.0))
        return weight

    changes = [one_bit, lambda w: w.roll(4), lambda w: w.reshape(7, 3), Tensor.half, Tensor.double, Tensor.neg]
    found = [weights_hash(made()), weights_hash(made(name="b")), *(weights_hash(made(change)) for change in changes)]
    assert len(set(found)) == 8
    assert weights_hash(made()) == found[0]


def test_feature_options_out_of_range() -> None:
    with pytest.raises(UserError, match="batch_size"):
        FeatureOptions(batch_size=0)
    with pytest.raises(UserError, match="workers"):
        FeatureOptions(workers=-1)
