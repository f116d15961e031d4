"""Wrong arguments of each public op: one line that names the op, the argument, what it is and what is accepted.

Those that every argument of a kind has are made of right calls; what is an op's own is in WRONG.
"""

import copy
import inspect
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import evakernels

X, C = torch.ones(2, 3, 4), torch.ones(4)
HEADS, TABLE, INDEX = torch.ones(2, 5, 3, 8), torch.ones(4, 4), torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]])
PACKED, GRID, ROWS = torch.ones(5, 3, 8), torch.ones(2, 3, 2), torch.arange(5)
PLACES = torch.tensor([[0, 0], [0, 1], [0, 2], [1, 0], [2, 2]])
FEATURES, ONE, HALF = torch.ones(3, 4), torch.ones(()), torch.ones(4).half()
KEPT = torch.tensor([[0], [1]])
STEP = {"params": [C], "grads": [C], "exp_avgs": [C], "exp_avg_sqs": [C], "steps": [ONE], "weight_decays": [0.0]}
OPTIONS = {"betas": (0.9, 0.99), "eps": 1e-8}
NORM = {"residual": X, "branch": X, "weight": C, "layer_scale": C, "row_scale": torch.ones(2)}
CALLS = {
    "adamw_update": STEP | OPTIONS | {"lrs": [1.0], "grad_scale": ONE, "found_inf": ONE},
    "add_layer_norm": NORM | {"bias": C},
    "add_rms_norm": NORM,
    "clip_loss": {"image_features": FEATURES, "text_features": FEATURES, "logit_scale": ONE},
    "contrastive_statistics": {"image": FEATURES, "text": FEATURES, "logit_scale": ONE},
    "gelu": {"x": X, "bias": C},
    "gradient_norm": {"grads": [X, C]},
    "lamb_apply": {name: STEP[name] for name in STEP if name != "grads"}
    | OPTIONS
    | {"squared_norms": torch.ones(1, 2), "lrs": [1.0], "found_inf": ONE},
    "lamb_step": STEP | OPTIONS | {"lrs": [1.0], "grad_scale": ONE, "found_inf": ONE},
    "lamb_update": STEP | OPTIONS | {"grad_scale": ONE, "found_inf": ONE},
    "layer_norm": {"x": X, "weight": C, "bias": C},
    "layer_norm_add": NORM | {"bias": C},
    "packed_attention": {"q": PACKED, "k": PACKED, "v": PACKED, "cu_seqlens": torch.tensor([0, 5]), "max_seqlen": 5}
    | {"cos": GRID, "sin": GRID, "positions": ROWS},
    "rms_norm": {"x": X, "weight": C},
    "rms_norm_add": NORM,
    "rope_attention": {"q": HEADS, "k": HEADS, "v": HEADS, "cos": TABLE, "sin": TABLE}
    | {"token_index": INDEX, "num_prefix": 1},
    "siglip_loss": {"image_features": FEATURES, "text_features": FEATURES, "logit_scale": ONE, "logit_bias": ONE},
    "swiglu": {"gate": X, "up": X, "norm_weight": C, "norm_bias": C},
    "token_dropout": {"patches": X, "token_index": KEPT, "prefix": torch.ones(1, 4), "pos_embed": torch.ones(4, 4)},
}
NO_TENSORS = {"a str": "x", "a list": [1.0, 2.0], "a numpy.ndarray": np.ones(4, np.float32), "a float": 1.0}
OF_ANY_DTYPE = ("grad_scale", "found_inf")
BESIDE_ITS_OWN = {
    "cos": "[P, D/2] = (7, 4)",
    "positions": "[T] or [T, 2] with T = (5,)",
    "prefix": "[P, C] = (7, 4)",
    "text": "[batch, D] with batch > 0",
    "text_features": "[batch, D] with batch > 0",
    "token_dropout token_index": "[B, K] = (2, 7)",
}
"""What is expected in the place of one row, where the message doesn't give the shape of the right call."""


def arguments(*annotations: object) -> list[tuple[str, str]]:
    """Names of public ops, with those of their arguments that are annotated so."""
    return [
        (op, name)
        for op in CALLS
        for name, parameter in inspect.signature(getattr(evakernels, op)).parameters.items()
        if parameter.annotation in annotations
    ]


Wrong = tuple[str, dict[str, Any], type[Exception], str]
"""An op, what is changed in its right call, and the error's type and text behind the name of the op."""


def wrong_tensors() -> Iterator[Wrong]:
    for op, name in arguments(Tensor, Tensor | None):
        right, first = CALLS[op][name], next(iter(CALLS[op]))
        for kind, value in NO_TENSORS.items():
            yield op, {name: value}, TypeError, rf"{name} is {kind}; accepted: a torch.Tensor"
        yield op, {name: right.to("meta")}, ValueError, rf".*{name} on meta"
        if name not in OF_ANY_DTYPE:
            of_numbers = torch.float32 if name == "cu_seqlens" else torch.int32
            other = right.to(torch.int64 if right.is_floating_point() else of_numbers)
            yield op, {name: other}, TypeError, rf"{name} is {other.dtype}; accepted: "
        if name == first:  # others may be compared with it
            yield op, {name: right.new_ones(7)}, ValueError, r".* \(7,\)"
        elif name != "cu_seqlens":
            own = "one element" if right.dim() == 0 else str(tuple(right.shape))
            expected = re.escape(BESIDE_ITS_OWN.get(f"{op} {name}") or BESIDE_ITS_OWN.get(name, own))
            yield op, {name: right.new_ones(7)}, ValueError, rf"{name} has shape \(7,\); expected .*{expected}"
    for op, name in arguments(Tensor):
        yield op, {name: None}, TypeError, rf"{name} is None; accepted: a torch.Tensor"


def wrong_lists() -> Iterator[Wrong]:
    for op, name in arguments(Sequence[Tensor]):
        for kind, value in NO_TENSORS.items():
            yield op, {name: [value]}, TypeError, rf"{name}\[0\] is {kind}; accepted: a torch.Tensor"
        for value in ("x", np.ones(1), torch.ones(1), None):
            yield op, {name: value}, TypeError, rf"{name} is .*; accepted: a list of tensors"
        yield op, {name: []}, ValueError, rf"{name} (is empty|has 0 entries); expected (at least )?one "
        yield op, {name: [torch.tensor(1)]}, TypeError, rf"{name}\[0\] is torch.int64"
        if name != "steps":
            yield op, {name: [torch.eye(4).to_sparse()]}, TypeError, rf"{name}\[0\] is torch.sparse_coo; accepted"
        if name not in ("params", "steps") and "params" in CALLS[op]:
            shapes = r"shape \(7,\); expected the shape of params\[0\] = \(4,\)"
            yield op, {name: [torch.ones(7)]}, ValueError, rf"{name}\[0\] has {shapes}"
            yield op, {name: [C.to("meta")]}, ValueError, rf".*{name}\[0\] on meta"


def wrong_numbers() -> Iterator[Wrong]:
    values = ((-1e-6, ValueError), (math.nan, ValueError), (math.inf, ValueError), ("1e-6", TypeError))
    for op, name in arguments(float, float | None):
        if name == "eps":
            for value, exception in values:
                yield op, {name: value}, exception, "eps is .*; accepted: a finite number, 0 or more"
    for op in ("layer_norm", "add_layer_norm", "layer_norm_add", "swiglu"):  # RMS norms find one themselves
        yield op, {"eps": None}, TypeError, "eps is None; accepted: a finite number"
    for op, name, value in (
        ("adamw_update", "betas", "ab"),
        ("lamb_step", "betas", 0.9),
        ("clip_loss", "label_smoothing", "0.1"),
        ("clip_loss", "memory_budget", None),
        ("contrastive_statistics", "offset", "0"),
        ("contrastive_statistics", "offset", 1.0),
        ("packed_attention", "max_seqlen", None),
        ("packed_attention", "max_seqlen", 5.0),
        ("packed_attention", "scale", "1"),
        ("rope_attention", "num_prefix", "1"),
        ("rope_attention", "scale", [1.0]),
    ):
        yield op, {name: value}, TypeError, f"{name} is .*; accepted: "


def tables(*shape: int) -> dict[str, Tensor]:
    return dict.fromkeys(("cos", "sin"), torch.ones(shape))


NO_TABLES, NO_INDEX = dict.fromkeys(("cos", "sin", "token_index")), {"token_index": None}
TO_PLACES, IN_ORDER = {"positions": PLACES}, {"positions": None}
FIRST, ONE_HEAD = {"q": HEADS[:, :1]}, dict.fromkeys("kv", PACKED[:, :1])
TRAINED = {"cos": TABLE.clone().requires_grad_()}
WRONG = {
    "adamw_update": [
        ({"lrs": [0.1, 0.2]}, ValueError, "lrs has 2 entries; expected one for each of the 1 params"),
        ({"lrs": 0.1}, TypeError, "lrs is a float; accepted: a list, a number for each of params"),
        ({"weight_decays": [0.0, 0.0]}, ValueError, "weight_decays has 2 entries"),
        ({name: 2 * STEP[name] for name in STEP}, ValueError, "steps holds a tensor twice; expected one of its own"),
        ({"seeds": [1]}, TypeError, r"params\[0\] is torch.float32; accepted with seeds: torch"),
        ({"params": [HALF], "seeds": [1, 2]}, ValueError, "seeds has 2 entries; expected one for each of the 1 params"),
        ({"seeds": [1], "first_elements": [1, 2]}, ValueError, "first_elements has 2 entries"),
        ({"first_elements": [1]}, ValueError, "first_elements are given without seeds"),
        ({"seeds": [-1]}, ValueError, r"seeds are \[-1\]; expected numbers from 0 to below 2\^63"),
    ],
    "layer_norm": [
        ({"weight": None}, ValueError, "bias without weight"),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype is torch.int8; accepted: .*bfloat16, torch.float16, or None"),
    ],
    "rms_norm": [
        ({"weight": HALF}, TypeError, "weight is torch.float16"),
        ({"weight": HALF, "out_dtype": torch.bfloat16}, TypeError, r".*float16; .* or torch.bfloat16 \(as out_dtype\)"),
    ],
    "add_rms_norm": [({"out_dtype": "bfloat16"}, TypeError, "out_dtype is 'bfloat16', a str; accepted")],
    "gelu": [
        ({"x": ONE}, ValueError, r"x is a scalar; expected \[..., F\]"),
        ({"bias": HALF}, TypeError, "bias is torch.float16; accepted: torch.float32"),
        ({"approximate": "erf"}, ValueError, "approximate is 'erf'; accepted: 'none', 'tanh', 'sigmoid'"),
    ],
    "gradient_norm": [
        ({"grads": [C, C.long()]}, TypeError, r"grads\[1\] is torch.int64"),
    ],
    "swiglu": [
        ({"gate": ONE, "up": ONE}, ValueError, r"gate is a scalar; expected \[..., F\]"),
        ({"up": X.half()}, TypeError, r"up is torch.float16; accepted: torch.float32 \(as gate\)"),
        ({"norm_weight": HALF}, TypeError, "norm_weight is torch.float16"),
        ({"norm_weight": None}, ValueError, "norm_bias without norm_weight"),
    ],
    "clip_loss": [
        ({"text_features": FEATURES.half()}, TypeError, "text_features is torch.float16; accepted"),
        ({"text_features": TABLE}, ValueError, r".*\(4, 4\); expected the shape of image_features = \(3, 4\)"),
        (dict.fromkeys(("image_features", "text_features"), FEATURES[:0]), ValueError, ".*batch > 0"),
        ({"label_smoothing": 2}, ValueError, ".*accepted: 0 to 1"),
        ({"memory_budget": -1}, ValueError, ".*accepted: at least 0"),
        ({"group": object()}, ValueError, ".*call init_process_group first"),
    ],
    "contrastive_statistics": [
        ({"text": torch.ones(5, 3)}, ValueError, r"text has shape \(5, 3\); expected \[batch, D of image\] = \(5, 4\)"),
        ({"offset": 1}, ValueError, "offset is 1; accepted: 0 to"),
        ({"text": FEATURES[:2]}, ValueError, "image has 3 rows and text 2"),
    ],
    "token_dropout": [
        ({"token_index": KEPT[:1]}, ValueError, r"token_index has shape \(1, 1\); expected \[B, K\] = \(2, 1\)"),
        ({"token_index": KEPT + 2}, IndexError, "token_index has values from 2 to 3; accepted: 0 to 2"),
        ({"token_index": KEPT - 1}, IndexError, "token_index has values from -1 to 0; accepted: 0 to 2"),
        ({"token_index": torch.tensor([[0, 1], [2, 2]])}, IndexError, ".*names a token twice in sample 1"),
        ({"prefix": torch.ones(1, 5)}, ValueError, r"prefix has shape \(1, 5\)"),
    ],
    "rope_attention": [
        ({"k": HEADS[..., :4]}, ValueError, r"k has shape \(2, 5, 3, 4\); expected \[B, M, Hkv, D\] with q"),
        ({"q": HEADS[..., :0]}, ValueError, r"q has shape \(2, 5, 3, 0\); expected \[B, N, H, D\] with D > 0"),
        ({"v": HEADS.half()}, TypeError, "v is torch.float16; accepted: torch.float32"),
        ({"k": HEADS[:, :, :2]}, ValueError, "k has 2 heads and q has 3; accepted: a number that divides 3"),
        ({"k": HEADS[:, :, :0]}, ValueError, "k has 0 heads and q has 3"),
        ({"v": HEADS[:, :4]}, ValueError, r"v has shape \(2, 4, 3, 8\); expected the shape of k"),
        (
            dict.fromkeys("kv", HEADS[:, [0, 0, 1, 2, 3, 4]]) | NO_INDEX,
            ValueError,
            "cos and sin with 5 queries and 6 keys; accepted: as many of each, or queries of the num_prefix = 1 first",
        ),
        (dict.fromkeys("kv", HEADS[:, :, :1]) | tables(3, 4, 4), ValueError, "cos has a table for each of 3 heads"),
        (dict.fromkeys("qkv", HEADS[..., :7]), ValueError, "head_dim 7 is odd"),
        (NO_TABLES | {"num_prefix": 17}, ValueError, "num_prefix is 17; accepted: 0 to 16"),
        (NO_INDEX | {"num_prefix": 6}, ValueError, "num_prefix is 6; .* at most M = 5"),
        (NO_TABLES | {"token_index": INDEX}, ValueError, "token_index without cos and sin"),
        ({"sin": None}, ValueError, "cos without sin"),
        ({"cos": None}, ValueError, "sin without cos"),
        (NO_INDEX | {"num_prefix": 0}, ValueError, r"cos has shape \(4, 4\); expected \[P, D/2\] = \(5, 4\)"),
        ({"sin": TABLE[:3]}, ValueError, r"sin has shape \(3, 4\)"),
        ({"cos": TABLE.expand(2, 4, 4)}, ValueError, r".*expected \[H, P, D/2\] = \(3, 4, 4\)"),
        ({"cos": torch.ones(4, 8)}, ValueError, r".*expected \[P, D/2\] = \(4, 4\)"),
        (TRAINED, ValueError, ".*the tables get none"),
        ({"token_index": INDEX + 1}, IndexError, "token_index has values from 1 to 4; accepted: -1 to 3"),
        ({"token_index": INDEX - 2}, IndexError, "token_index has values from -2 to 1; accepted: -1 to 3"),
        (tables(2, 3, 2) | NO_INDEX, ValueError, "the compact table is of 3 x 3 patches; given: N - num_prefix = 4"),
        (tables(3, 2, 2) | NO_INDEX, ValueError, r"cos .* \(3, 2, 2\); expected \[2, G, D/4\] = \(2, 2, 2\)"),
        (
            tables(2, 3, 2) | {"token_index": INDEX + 6},
            IndexError,
            "token_index has values from 6 to 9; accepted: -1 to 8",
        ),
        # Queries of the first tokens alone, which no kernel rotates.
        (FIRST | NO_INDEX | {"causal": True}, ValueError, "cos and sin with 1 queries and 5 keys, causal; accepted"),
        (FIRST | {"num_prefix": 0}, ValueError, ".*accepted: as many of each, or queries of the num_prefix = 0 first"),
        (FIRST | TRAINED, ValueError, ".*the tables get none"),
        (FIRST | {"token_index": INDEX - 2}, IndexError, ".*values from -2 to 1; accepted: -1 to 3"),
        (FIRST | {"token_index": INDEX + 1}, IndexError, ".*values from 1 to 4; accepted: -1 to 3"),
    ],
    "packed_attention": [
        ({"k": PACKED[..., :4]}, ValueError, r"k has shape \(5, 3, 4\); expected \[T, Hkv, D\] with q"),
        ({"v": PACKED.half()}, TypeError, "v is torch.float16; accepted: torch.float32"),
        ({"cu_seqlens": torch.tensor([[0, 5]])}, ValueError, r"cu_seqlens has shape \(1, 2\); expected \[B \+ 1\]"),
        ({"cu_seqlens": torch.tensor([0, 4])}, ValueError, "cu_seqlens go from 0 to 4; expected 0 to T = 5"),
        ({"cu_seqlens": torch.tensor([1, 5])}, ValueError, "cu_seqlens go from 1 to 5; expected 0 to T = 5"),
        ({"cu_seqlens": torch.tensor([0, 6, 5])}, ValueError, ".*lengths from -1 to 6; accepted: 0 to max_seqlen = 5"),
        ({"cu_seqlens": torch.tensor([0, 5, 5]), "max_seqlen": 4}, ValueError, ".*lengths from 0 to 5; accepted: 0 to"),
        ({"max_seqlen": 4}, ValueError, "5 tokens in 1 sequences; accepted: at most max_seqlen = 4 in each"),
        ({"max_seqlen": -1}, ValueError, "max_seqlen is -1; accepted: at least 0"),
        (dict.fromkeys("kv", PACKED[:, :2]), ValueError, "k has 2 heads and q has 3; accepted: a number that"),
        ({"cos": None, "sin": None}, ValueError, "positions without cos and sin; they select rows of these tables"),
        ({"cos": None, "sin": None, "positions": PLACES}, ValueError, "positions without cos and sin"),
        ({"sin": None}, ValueError, "cos without sin; give both or neither"),
        ({"positions": PLACES.repeat(1, 2)}, ValueError, r"positions has shape \(5, 4\); expected \[T\] or \[T, 2\]"),
        ({"positions": PLACES.int()}, TypeError, "positions is torch.int32; accepted: torch.int64"),
        ({"positions": ROWS + 5}, IndexError, "positions has values from 5 to 9; accepted: -1 to 8"),
        ({"positions": ROWS - 2}, IndexError, "positions has values from -2 to 2; accepted: -1 to 8"),
        ({"positions": PLACES + 1}, IndexError, "positions has values from 4 to 9; accepted: -1 to 8"),
        ({"positions": PLACES - 2}, IndexError, "positions has values from 0 to 9; accepted: -1 to 8"),
        (tables(9, 4) | TO_PLACES, ValueError, r"positions \[T, 2\] .* shape \(9, 4\); they are for the compact table"),
        (
            dict.fromkeys("qkv", PACKED[:, :2]) | tables(2, 5, 4) | TO_PLACES,
            ValueError,
            r".*\(2, 5, 4\); they are for the",
        ),
        (tables(4, 4) | IN_ORDER, ValueError, "cos has 4 rows and max_seqlen is 5; accepted: as many rows, or more"),
        (ONE_HEAD | tables(3, 5, 4) | IN_ORDER, ValueError, "cos has a table for each of 3 heads and k has 1; heads"),
    ],
}
GENERAL = [*wrong_tensors(), *wrong_lists(), *wrong_numbers()]
OWN = [
    pytest.param(op, *wrong, marks=pytest.mark.cpu_only("elsewhere a wrong index ends the process"))
    for op, entries in WRONG.items()
    for wrong in entries
]


def test_all_tensors_of_all_ops_are_asked():
    public = {name for name, op in vars(evakernels.ops).items() if name in evakernels.ops.__all__ and callable(op)}
    assert set(CALLS) == public - {"as_torch_operators", "sample_token_index"}
    for op, name in arguments(Tensor, Tensor | None, Sequence[Tensor]):
        assert name in CALLS[op], (op, name)


@pytest.mark.parametrize("op", CALLS)
def test_the_calls_are_right(op):
    getattr(evakernels, op)(**CALLS[op])


@pytest.mark.parametrize("op", sorted(CALLS.keys() - {"gradient_norm"}))  # no backend: torch's own operators
def test_explain_takes_the_public_call(op):
    before = copy.deepcopy(CALLS[op])
    told = evakernels.explain(op, **CALLS[op])
    assert told.count("serves the call") == 1
    torch.testing.assert_close(CALLS[op], before, rtol=0, atol=0)
    call = inspect.signature(getattr(evakernels, op)).bind(**CALLS[op])
    assert evakernels.explain(getattr(evakernels, op), *call.args, **call.kwargs) == told
    with pytest.raises(TypeError, match="no_such_argument"):
        evakernels.explain(op, *call.args, **call.kwargs, no_such_argument=1)


@pytest.mark.parametrize(("op", "changes", "exception", "message"), [*GENERAL, *OWN])
def test_wrong_input_says_what_is_accepted(op, changes, exception, message):
    with pytest.raises(exception, match=f"^{op}: {message}"):
        getattr(evakernels, op)(**CALLS[op] | changes)
