"""Names of shapes."""

import pytest

from benchmarks.shapes import Shape, parse_shape, short_names
from evaclip.errors import UserError


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("eva02-l14@224 b256", {"tokens": 257, "width": 1024, "heads": 16, "head_dim": 64, "hidden": 2730}),
        ("eva02-l14@336 b8", {"tokens": 577, "patches": 576}),
        ("eva02-l14@224 b256 drop50", {"tokens": 129, "patches": 256, "kept_patches": 128}),
        ("eva02-b16@224 b1", {"tokens": 197, "width": 768, "hidden": 2048}),
        ("eva02-bige14@224 b1", {"tokens": 257, "head_dim": 112}),
        ("eva01-g14@224 b1", {"head_dim": 88}),
        ("eva-clip-18b@224 b1".replace("-clip", ""), {"head_dim": 128}),
        ("eva02-l14:text b256", {"tokens": 77, "width": 768, "heads": 12, "patches": 0}),
    ],
)
def test_sizes_of_a_name(name: str, expected: dict[str, int]) -> None:
    shape = parse_shape(name)
    assert {key: getattr(shape, key) for key in expected} == expected
    assert shape.name == name


def test_without_pixels_it_is_the_trained_resolution() -> None:
    assert parse_shape("eva02-l14-336 b2").pixels == 336
    assert parse_shape("EVA02-B16 b2").name == "eva02-b16@224 b2"


def test_another_batch_is_the_same_shape_otherwise() -> None:
    assert Shape("tiny", "vision", 32, 4).with_batch(8) == Shape("tiny", "vision", 32, 8)


def test_every_model_has_one_short_name() -> None:
    names = short_names()
    assert len(set(names.values())) == len(names)
    assert all(parse_shape(f"{short} b1").model == short for short in names)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("eva02-l14", "expected a name such as"),
        ("eva02-l15@224 b1", "did you mean 'eva02-l14'"),
        ("eva02-l14@225 b1", "225 pixels can't be cut into patches of 14"),
        ("eva02-l14@224 b0", "batches start at 1"),
        ("eva02-l14@224 b1 drop100", "drop at 0 to 99"),
        ("eva02-l14:text b1 drop50", "text drops nothing"),
    ],
)
def test_wrong_names_are_told(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_shape(name)
