"""The rotary table: values, and exact after every conversion of a model."""

from collections.abc import Callable

import pytest
import torch
from plain_vision import plain_angles
from small_models import random_images, small_model

from evaclip import CLIP, create_model, get_config
from evaclip.model.vision import RotaryTable


@pytest.mark.parametrize("name", ["EVA02-CLIP-B-16", "EVA02-CLIP-L-14-336", "emoji"])
def test_table_values(name: str) -> None:
    config = get_config(name).vision
    table = RotaryTable(config)
    angles = plain_angles(config)[:, ::2]
    assert table.cos.dtype == torch.float32
    torch.testing.assert_close(table.cos, angles.cos().float(), atol=2e-7, rtol=0)
    torch.testing.assert_close(table.sin, angles.sin().float(), atol=2e-7, rtol=0)


CONVERSIONS: dict[str, Callable[[CLIP], CLIP]] = {
    "half and back": lambda model: model.half().float(),
    "double": lambda model: model.double(),
    "through meta": lambda model: model.to("meta").to_empty(device="cpu"),
    "cast on meta": lambda model: model.to("meta").half().to_empty(device="cpu"),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_table_after_conversion(name: str) -> None:
    model = CONVERSIONS[name](small_model())
    exact = RotaryTable(model.config.vision)
    for actual, expected in ((model.visual.rope.cos, exact.cos), (model.visual.rope.sin, exact.sin)):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)


def test_table_on_meta_device() -> None:
    config = get_config("EVA02-CLIP-L-14").vision
    table = RotaryTable(config)
    with torch.device("meta"):
        made = RotaryTable(config)
    for meta in (made, RotaryTable(config).to("meta")):
        for values, expected in ((meta.cos, table.cos), (meta.sin, table.sin)):
            assert (values.shape, values.dtype, values.device.type) == (expected.shape, expected.dtype, "meta")


def test_table_after_assigning_weights() -> None:
    source = small_model()
    model = create_model("tiny", device="meta").eval()
    model.load_state_dict(source.state_dict(), assign=True)
    with torch.no_grad():
        assert torch.equal(model.encode_image(random_images(1)), source.encode_image(random_images(1)))
    model.to("cpu")


def test_table_is_not_in_state_dict() -> None:
    assert not any("rope" in name for name in small_model().state_dict())
