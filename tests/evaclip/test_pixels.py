"""Pictures whose pixels are not bytes."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from evaclip import eval_transform, train_transform
from evaclip.data import BadSample, FaultKind
from evaclip.data.samples import decode_image
from evaclip.pixels import eight_bit, pixel_kind

RAMP = np.linspace(0, 65535, 64 * 64).reshape(64, 64)
UNIT = {"mean": (0, 0, 0), "std": (1, 1, 1)}


def stored(values: np.ndarray, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("values", "kind", "name"),
    [
        (RAMP.astype(np.uint16), "png", "16-bit"),
        (RAMP.astype(np.uint16), "tiff", "16-bit"),
        (RAMP.astype(">u2"), "tiff", "16-bit"),
        (RAMP.astype(np.int32), "tiff", "integer"),
        ((RAMP / 65535).astype(np.float32), "tiff", "float"),
        ((RAMP / 257).astype(np.float32), "tiff", "float"),
        (RAMP.astype(np.float32), "tiff", "float"),
    ],
)
def test_a_ramp_stays_a_ramp(values: np.ndarray, kind: str, name: str) -> None:
    data = stored(values, kind)
    raw = Image.open(io.BytesIO(data))
    assert pixel_kind(raw) == name
    decoded = decode_image(data, "x")
    assert decoded.mode == "L"
    assert np.abs(np.asarray(decoded) - RAMP / 257).max() <= 1
    for tensor in (eval_transform(64, **UNIT)(raw), train_transform(64, **UNIT, scale=(1, 1))(raw, 0)):
        assert tensor.mean().item() == pytest.approx(0.5, abs=0.02)
        assert tensor[:, -1, -1].min() > 0.97
        assert tensor[:, 0, 0].max() < 0.03


def test_the_ends_of_a_range_are_black_and_white() -> None:
    exact = np.array([[0, 257, 65535]], np.uint16)
    assert np.asarray(eight_bit(Image.fromarray(exact))).tolist() == [[0, 1, 255]]


def test_a_crop_takes_the_range_of_the_whole_picture() -> None:
    """A float picture of 0..255, of which a part lies within 0..1."""
    values = np.zeros((64, 64), np.float32)
    values[0, 0] = 255
    values[32:] = 1
    tensor = train_transform(64, **UNIT, scale=(0.5, 0.5))(Image.fromarray(values), 1)
    assert tensor[:, -1].max() < 0.01


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (np.array([[-1, 5]], np.int32), r"integer pixels from -1 to 5; accepted: 0..65535"),
        (np.array([[0, 70000]], np.int32), "integer pixels from 0 to 70000"),
        (np.array([[-0.5, 0.5]], np.float32), "float pixels from -0.5 to 0.5; accepted: 0..1 or 0..255 or 0..65535"),
        (np.array([[0.5, np.nan]], np.float32), "float pixels from nan to nan"),
        (np.array([[0.5, np.inf]], np.float32), "float pixels from 0.5 to inf"),
    ],
)
def test_other_ranges_are_bad_samples(values: np.ndarray, reason: str) -> None:
    with pytest.raises(BadSample, match=reason) as caught:
        decode_image(stored(values, "tiff"), "shard:key")
    assert caught.value.fault.kind is FaultKind.UNKNOWN_RANGE
    assert caught.value.fault.name == "shard:key"


def test_a_transparent_value_stays_transparent() -> None:
    values = np.full((8, 8), 30000, np.uint16)
    values[2:6, 2:6] = 514
    image = Image.open(io.BytesIO(stored(values, "png", transparency=30000)))
    tensor = eval_transform(8, **UNIT)(image)
    assert tensor[:, 0, 0].tolist() == [1, 1, 1]
    assert torch.equal(tensor[:, 4, 4], torch.full((3,), np.float32(2 / 255).item()))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1", "CMYK"])
def test_bytes_stay_as_they_are(mode: str) -> None:
    image = Image.new(mode, (4, 4))
    assert eight_bit(image) is image
    assert pixel_kind(image) == ""
