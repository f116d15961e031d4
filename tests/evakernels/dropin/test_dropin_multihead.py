"""torch's MultiheadAttention, accelerated: of a sequence with itself and with another."""

import copy

import pytest
import torch
from dropin_families import log_ops
from op_checks import freezes_both
from torch import nn

import evakernels
from evakernels.nn import FrozenWeight

WIDTH, HEADS, QUERIES, KEYS = 48, 3, 4, 20


pytestmark = pytest.mark.by_processor


def attention(bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.MultiheadAttention(WIDTH, HEADS, bias=bias, batch_first=True).to(dtype).eval()


def accelerated(untouched, force=True, **options):
    module = copy.deepcopy(untouched)
    assert evakernels.accelerate(module, force=force, **options).replaced[0].name == ""
    return module


def tokens(count, dtype=torch.float32):
    return torch.randn(2, count, WIDTH, generator=torch.Generator().manual_seed(count)).to(dtype)


def causal(tokens):
    return torch.full((tokens, tokens), float("-inf")).triu_(1)


def calls(dtype=torch.float32):
    """Arguments and options by name."""
    keys, queries = tokens(KEYS, dtype), tokens(QUERIES, dtype)
    itself, other = (keys, keys, keys), (queries, keys, keys)
    shape = QUERIES, KEYS
    any_mask = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    of_heads = torch.randn(2 * HEADS, *shape, generator=torch.Generator().manual_seed(8)).to(dtype)
    return {
        "itself": (itself, {"need_weights": False}),
        "itself, causal": (itself, {"need_weights": False, "attn_mask": causal(KEYS).to(dtype)}),
        "other": (other, {"need_weights": False}),
        "other, mask": (other, {"need_weights": False, "attn_mask": any_mask}),
        "other, mask of each head": (other, {"need_weights": False, "attn_mask": of_heads}),
        "other, weights": (other, {"attn_mask": any_mask}),
        "other, weights of heads": (other, {"average_attn_weights": False}),
        "values of their own": ((queries, keys, keys.flip(1)), {"need_weights": False}),
        "padding": (other, {"key_padding_mask": torch.arange(KEYS).expand(2, -1) > 15}),
        "bool mask": (other, {"attn_mask": torch.ones(shape, dtype=torch.bool).triu(9)}),
    }


def assert_same(found, expected, **tolerance):
    assert (found[1] is None) == (expected[1] is None)
    for a, b in zip(found, expected, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("call", calls())
def test_mha_matches_torch(call, bias):
    untouched = attention(bias)
    ours = accelerated(untouched)
    args, options = calls()[call]
    found, expected = ours(*args, **options), untouched(*args, **options)
    assert_same(found, expected, rtol=1e-5, atol=1e-6)
    for module, (out, _) in ((ours, found), (untouched, expected)):
        out.square().sum().backward()
        assert all(parameter.grad is not None for parameter in module.parameters())
    for a, b in zip(ours.parameters(), untouched.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("call", ["itself", "other, mask", "other, weights"])
def test_mha_under_autocast(call):
    untouched = attention()
    args, options = calls()[call]
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = accelerated(untouched)(*args, **options), untouched(*args, **options)
    assert_same(found, expected, rtol=2e-2, atol=2e-2)


@freezes_both
@pytest.mark.parametrize("call", calls())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mha_with_frozen_weights(call, dtype):
    untouched = attention(dtype=dtype)
    ours = accelerated(untouched, freeze=True)
    assert isinstance(ours.in_proj_weight, FrozenWeight)
    assert isinstance(ours.out_proj.weight, FrozenWeight)
    args, options = calls(dtype)[call]
    with torch.inference_mode():
        found, expected = ours(*args, **options), untouched(*args, **options)
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert_same(found, expected, rtol=bound, atol=bound)
    of_both = zip(ours.state_dict().values(), untouched.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in of_both)
    evakernels.restore(ours)
    assert not any(isinstance(parameter, FrozenWeight) for parameter in ours.parameters())


def test_mha_with_sequence_first_is_left():
    report = evakernels.accelerate(nn.MultiheadAttention(WIDTH, HEADS))
    assert "its sequences come first" in {left.reason for left in report.left}


# --- torch's encoder layer -------------------------------------------------------------------------------------------

_PADDING = torch.arange(KEYS).expand(2, -1) > torch.tensor([[KEYS], [KEYS - 3]])


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize(
    ("options", "served"),
    [
        ({}, True),
        ({"mask": causal(KEYS)}, True),
        ({"mask": causal(KEYS), "is_causal": True}, True),
        ({"mask": causal(KEYS) < 0}, True),
        ({"src_key_padding_mask": _PADDING}, False),
    ],
    ids=["no mask", "causal", "hint", "bool", "padding"],
)
def test_encoder_layer_runs_on_the_ops(norm_first, options, served):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 96, activation="gelu", batch_first=True, norm_first=norm_first)
    untouched = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    ours = copy.deepcopy(untouched)
    report = evakernels.accelerate(ours, force=True)
    assert report.headline == "2 of 2 blocks, 14 of 14 modules"
    x, kept = tokens(KEYS), ~options.get("src_key_padding_mask", torch.zeros(2, KEYS, dtype=torch.bool))
    with torch.no_grad(), log_ops() as ops:
        expected = untouched.eval()(x, **options)
        torch.testing.assert_close(ours.eval()(x, **options)[kept], expected[kept])
    assert (ops >= {"add_layer_norm", "rope_attention"}) == served
    outputs = []
    for module in (ours.train(), untouched.train()):
        torch.manual_seed(1)
        outputs.append(module(x, **options)[kept])
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs)
    for parameter, theirs in zip(ours.parameters(), untouched.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, theirs.grad, rtol=1e-4, atol=1e-4)
