"""Names of shapes, and sizes alone."""

import pytest
from bench_case_checks import assert_exact, draw

import benchmarks.cases  # noqa: F401  registers the operations
from benchmarks.operation import get_operation, operations
from benchmarks.shapes import parse_shape, short_names
from evaclip import create_model
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


SMALL = {"batch": 2, "captions": 3, "channels": 8, "elements": 5, "head_dim": 8, "heads": 3, "hidden": 16, "images": 2}
SMALL |= {"kept": 4, "pairs": 6, "patches": 9, "rows": 4, "tensors": 3, "tokens": 5, "width": 8}
SIZES = {op.name: "x".join(str(SMALL[name]) for name in op.raw_sizes) for op in operations().values() if op.raw_sizes}
OF_MODELS = {"encode_image", "encode_text", "clip_step", "dropin", "dropin_frozen"}


@pytest.mark.parametrize("name", SIZES)
def test_every_op_takes_sizes_alone(name: str) -> None:
    op = get_operation(name)
    shape = op.shape(SIZES[name])
    assert shape.name == SIZES[name]
    assert op.work(shape, 4).forward.bytes > 0
    assert_exact(op, op.ours, shape, training=bool(op.gradients))  # type: ignore[arg-type]


def test_only_whole_models_need_a_name() -> None:
    assert {op.name for op in operations().values() if not op.raw_sizes} == OF_MODELS
    assert set(SIZES) | OF_MODELS == set(operations())


def test_sizes_alone_are_those_that_the_op_says() -> None:
    op = get_operation("token_dropout")
    assert op.raw_sizes == ("images", "patches", "kept", "channels")
    with pytest.raises(UserError, match="token_dropout can't keep 10 of 9 patches"):
        op.shape("2x9x10x8")
    with pytest.raises(UserError, match="shape '4x8' is that of no model"):
        _ = get_operation("layer_norm").shape("4x8").config  # type: ignore[attr-defined]


def test_lamb_steps_over_every_parameter() -> None:
    shapes = [parameter.shape for parameter in create_model("tiny", device="meta").parameters()]
    assert [values.shape for values in draw(get_operation("lamb_step"), parse_shape("tiny b1"))["grads"]] == shapes
