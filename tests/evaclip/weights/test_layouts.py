"""Every layout of a state dict leads to the same names."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from evaclip import create_model
from evaclip.errors import UserError
from evaclip.weights import to_open_clip, to_original

State = dict[str, Tensor]
GELU = {"mlp": "gelu", "sub_norm": False, "rope": False}


def _flat_text(state: State) -> State:
    tables = {f"visual.{place}rope.freqs_cos": torch.zeros(16, 64) for place in ("", "blocks.0.attn.")}
    return {name.removeprefix("text."): tensor for name, tensor in {**state, **tables}.items()}


LAYOUTS: dict[str, Callable[[State], dict[str, Any]]] = {
    "open_clip": to_open_clip,
    "compiled": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in to_open_clip(state).items()},
    "compiled blocks": lambda state: {re.sub(r"(blocks\.\d+\.)", r"\1_orig_mod.", name): state[name] for name in state},
    "model": lambda state: {"model": state, "epoch": 3},
    "open_clip checkpoint": lambda state: {
        "epoch": 1,
        "state_dict": {f"module.{name}": tensor for name, tensor in to_open_clip(state).items()},
    },
    "flat text and rotary tables in wrappers": lambda state: {
        "module": {f"module.{name}": tensor for name, tensor in _flat_text(state).items()}
    },
}


@pytest.mark.parametrize("vision", [{}, {"sub_norm": False}, {**GELU, "layer_scale_init": 0.1}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_to_original_of_layout(layout: str, vision: dict[str, Any]) -> None:
    state = create_model("tiny", vision={"layers": 2, **vision}, text={"layers": 1}).state_dict()
    original = to_original(LAYOUTS[layout](state))
    assert original.keys() == state.keys()
    assert all(torch.equal(original[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"model": {}}, "the weights hold nothing"),
        ({"epoch": 3, "a": torch.zeros(1)}, "other things under epoch"),
        ({0: torch.zeros(1)}, "other things under 0"),
    ],
)
def test_to_original_wrong_contents(state: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_original(state)
