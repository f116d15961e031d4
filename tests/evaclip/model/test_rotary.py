"""The rotary table: its values, and that no conversion of a model rounds or loses it."""

from collections.abc import Callable

import pytest
import torch
from plain_vision import plain_angles
from small_models import random_images, small_model

from evaclip import CLIP, create_model, get_config
from evaclip.model.rotary import RotaryTable


@pytest.mark.parametrize("name", ["EVA02-CLIP-B-16", "EVA02-CLIP-L-14-336", "emoji"])
def test_values(name: str) -> None:
    config = get_config(name).vision
    table = RotaryTable(config)
    angles = plain_angles(config)[:, ::2]
    assert table.cos.dtype == torch.float32
    torch.testing.assert_close(table.cos, angles.cos().float(), atol=2e-7, rtol=0)
    torch.testing.assert_close(table.sin, angles.sin().float(), atol=2e-7, rtol=0)


CONVERSIONS: dict[str, Callable[[CLIP], CLIP]] = {
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "there and back": lambda model: model.half().float(),
    "double": lambda model: model.double(),
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "through meta": lambda model: model.to("meta").to_empty(device="cpu"),
    "cast on meta": lambda model: model.to("meta").half().to_empty(device="cpu"),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_table_survives(name: str) -> None:
    model = CONVERSIONS[name](small_model())
    exact = RotaryTable(model.config.vision)
    for actual, expected in ((model.visual.rope.cos, exact.cos), (model.visual.rope.sin, exact.sin)):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)


def test_table_follows_the_model_to_the_meta_device() -> None:
    rope = small_model().to("meta").visual.rope
    assert rope.cos.is_meta


def test_the_table_on_the_meta_device_is_like_any_other() -> None:
    config = get_config("EVA02-CLIP-L-14").vision
    with torch.device("meta"):
        meta = RotaryTable(config)
    table = RotaryTable(config)
    for values, expected in ((meta.cos, table.cos), (meta.sin, table.sin)):
        assert (values.shape, values.dtype, values.device.type) == (expected.shape, expected.dtype, "meta")


def test_assigned_weights_bring_the_table_along() -> None:
    source = small_model()
    model = create_model("tiny", device="meta").eval()
    model.load_state_dict(source.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(model.encode_image(random_images(1)), source.encode_image(random_images(1)))
    model.to("cpu")


def test_table_is_not_part_of_the_state() -> None:
    assert not any("rope" in name for name in small_model().state_dict())
