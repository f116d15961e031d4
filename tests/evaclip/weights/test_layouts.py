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


def _state(**vision: Any) -> State:
    return create_model("tiny", vision={"layers": 2, **vision}, text={"layers": 1}).state_dict()


def _flat_text(state: State) -> State:
    return {name.removeprefix("text."): tensor for name, tensor in state.items()}


def _with_rotary(state: State) -> State:
    tables = {
        f"visual.{place}rope.freqs_{kind}": torch.zeros(16, 64)
        for place in ("", "blocks.0.attn.")
        for kind in ("cos", "sin")
    }
    return {**state, **tables}


LAYOUTS: dict[str, Callable[[State], dict[str, Any]]] = {
    "original": lambda state: state,
    "open_clip": to_open_clip,
    "flat text": _flat_text,
    "rotary tables": _with_rotary,
    "parallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "compiled": lambda state: {f"module._orig_mod.{name}": tensor for name, tensor in to_open_clip(state).items()},
    "compiled blocks": lambda state: {re.sub(r"(blocks\.\d+\.)", r"\1_orig_mod.", name): state[name] for name in state},
    "model": lambda state: {"model": state, "epoch": 3},
    "module": lambda state: {"module": state, "optimizer": {"lr": 0.1}},
    "open_clip checkpoint": lambda state: {
        "epoch": 1,
        "state_dict": {f"module.{name}": tensor for name, tensor in to_open_clip(state).items()},
    },
    "all at once": lambda state: {
        "module": {f"module.{name}": tensor for name, tensor in _flat_text(_with_rotary(state)).items()}
    },
}


@pytest.mark.parametrize("vision", [{}, GELU, {"sub_norm": False}, {**GELU, "layer_scale_init": 0.1}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_equal(layout: str, vision: dict[str, Any]) -> None:
    state = _state(**vision)
    found = to_original(LAYOUTS[layout](state))
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "the weights hold nothing"),
        ({"model": {}}, "the weights hold nothing"),
        ({"epoch": 3, "a": torch.zeros(1)}, "other things under epoch"),
        ({0: torch.zeros(1)}, "other things under 0"),
    ],
)
def test_what_is_no_state_dict(state: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        to_original(state)
