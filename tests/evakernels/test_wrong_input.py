"""What isn't a tensor or a number, in the place of each argument of each public op: one line that names it."""

import inspect
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

import evakernels

X, C = torch.ones(2, 3, 4), torch.ones(4)
HEADS, PACKED = torch.ones(1, 2, 1, 4), torch.ones(2, 1, 4)
TABLE, ONE = torch.ones(2, 2), torch.ones(())
STEP = {"params": [C], "grads": [C], "exp_avgs": [C], "exp_avg_sqs": [C], "steps": [ONE], "weight_decays": [0.0]}
OPTIONS = {"betas": (0.9, 0.99), "eps": 1e-8}
NORM = {"residual": X, "branch": X, "weight": C, "layer_scale": C, "row_scale": torch.ones(2)}
CALLS = {
    "adamw_update": STEP | OPTIONS | {"lrs": [1.0], "grad_scale": ONE, "found_inf": ONE},
    "add_layer_norm": NORM | {"bias": C},
    "add_rms_norm": NORM,
    "clip_loss": {"image_features": TABLE, "text_features": TABLE, "logit_scale": ONE},
    "contrastive_statistics": {"image": TABLE, "text": TABLE, "logit_scale": ONE},
    "gelu": {"x": X, "bias": C},
    "gradient_norm": {"grads": [X, C]},
    "lamb_apply": {name: STEP[name] for name in STEP if name != "grads"}
    | OPTIONS
    | {"squared_norms": torch.ones(1, 2), "lrs": [1.0], "found_inf": ONE},
    "lamb_step": STEP | OPTIONS | {"lrs": [1.0], "grad_scale": ONE, "found_inf": ONE},
    "lamb_update": STEP | OPTIONS | {"grad_scale": ONE, "found_inf": ONE},
    "layer_norm": {"x": X, "weight": C, "bias": C},
    "layer_norm_add": NORM | {"bias": C},
    "packed_attention": {"q": PACKED, "k": PACKED, "v": PACKED, "cu_seqlens": torch.tensor([0, 2]), "max_seqlen": 2}
    | {"cos": TABLE, "sin": TABLE, "positions": torch.tensor([1, 0])},
    "rms_norm": {"x": X, "weight": C},
    "rms_norm_add": NORM,
    "rope_attention": {"q": HEADS, "k": HEADS, "v": HEADS, "cos": TABLE, "sin": TABLE}
    | {"token_index": torch.tensor([[1, 0]])},
    "siglip_loss": {"image_features": TABLE, "text_features": TABLE, "logit_scale": ONE, "logit_bias": ONE},
    "swiglu": {"gate": X, "up": X, "norm_weight": C, "norm_bias": C},
    "token_dropout": {"patches": X, "token_index": torch.tensor([[0], [1]]), "prefix": torch.ones(1, 4)}
    | {"pos_embed": torch.ones(4, 4)},
}
NO_TENSORS = {"a str": "x", "a list": [1.0, 2.0], "a numpy.ndarray": np.ones(4, np.float32), "a float": 1.0}


def arguments(*annotations: object) -> list[tuple[str, str]]:
    """Names of public ops, with those of their arguments that are annotated so."""
    return [
        (op, name)
        for op in CALLS
        for name, parameter in inspect.signature(getattr(evakernels, op)).parameters.items()
        if parameter.annotation in annotations
    ]


def test_all_tensors_of_all_ops_are_asked():
    public = {name for name, op in vars(evakernels.ops).items() if name in evakernels.ops.__all__ and callable(op)}
    assert set(CALLS) == public - {"as_torch_operators", "sample_token_index"}
    for op, name in arguments(Tensor, Tensor | None, Sequence[Tensor]):
        assert name in CALLS[op], (op, name)


@pytest.mark.parametrize("op", CALLS)
def test_the_calls_are_right(op):
    getattr(evakernels, op)(**CALLS[op])


@pytest.mark.parametrize("kind", NO_TENSORS)
@pytest.mark.parametrize(("op", "name"), arguments(Tensor, Tensor | None))
def test_no_tensor(op, name, kind):
    with pytest.raises(TypeError, match=rf"^{op}: {name} is {kind}; accepted: a torch.Tensor"):
        getattr(evakernels, op)(**CALLS[op] | {name: NO_TENSORS[kind]})


@pytest.mark.parametrize(("op", "name"), arguments(Tensor))
def test_none_for_what_is_needed(op, name):
    with pytest.raises(TypeError, match=rf"^{op}: {name} is None; accepted: a torch.Tensor"):
        getattr(evakernels, op)(**CALLS[op] | {name: None})


@pytest.mark.parametrize("kind", NO_TENSORS)
@pytest.mark.parametrize(("op", "name"), arguments(Sequence[Tensor]))
def test_no_tensor_in_a_list(op, name, kind):
    with pytest.raises(TypeError, match=rf"^{op}: {name}\[0\] is {kind}; accepted: a torch.Tensor"):
        getattr(evakernels, op)(**CALLS[op] | {name: [NO_TENSORS[kind]]})


@pytest.mark.parametrize("value", ["x", np.ones(1), torch.ones(1), None], ids=lambda value: type(value).__name__)
@pytest.mark.parametrize(("op", "name"), arguments(Sequence[Tensor]))
def test_no_list(op, name, value):
    with pytest.raises(TypeError, match=rf"^{op}: {name} is .*; accepted: a list of tensors"):
        getattr(evakernels, op)(**CALLS[op] | {name: value})


@pytest.mark.parametrize(("op", "name"), arguments(Tensor, Tensor | None))
def test_another_device(op, name):
    elsewhere = CALLS[op][name].to("meta")
    with pytest.raises(ValueError, match=rf"^{op}: .*{name} on meta"):
        getattr(evakernels, op)(**CALLS[op] | {name: elsewhere})


@pytest.mark.parametrize(
    ("value", "exception"), [(-1e-6, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("1e-6", TypeError)]
)
@pytest.mark.parametrize(("op", "name"), [entry for entry in arguments(float, float | None) if entry[1] == "eps"])
def test_eps(op, name, value, exception):
    with pytest.raises(exception, match=rf"^{op}: eps is .*; accepted: a finite number, 0 or more"):
        getattr(evakernels, op)(**CALLS[op] | {name: value})


@pytest.mark.parametrize("op", ["layer_norm", "add_layer_norm", "layer_norm_add", "swiglu"])
def test_only_rms_norms_find_an_eps_themselves(op):
    with pytest.raises(TypeError, match=f"^{op}: eps is None; accepted: a finite number"):
        getattr(evakernels, op)(**CALLS[op] | {"eps": None})


@pytest.mark.parametrize(
    ("op", "name", "value"),
    [
        ("adamw_update", "betas", "ab"),
        ("lamb_step", "betas", 0.9),
        ("clip_loss", "label_smoothing", "0.1"),
        ("clip_loss", "memory_budget", None),
        ("contrastive_statistics", "offset", "0"),
        ("packed_attention", "max_seqlen", None),
        ("packed_attention", "scale", "1"),
        ("rope_attention", "num_prefix", "1"),
        ("rope_attention", "scale", [1.0]),
    ],
)
def test_other_numbers(op, name, value):
    with pytest.raises(TypeError, match=rf"^{op}: {name} is .*; accepted: "):
        getattr(evakernels, op)(**CALLS[op] | {name: value})
