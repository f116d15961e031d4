"""Memory options: equal embeddings and gradients, fewer FLOPs, less memory."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import NO_ROPE, random_images, random_tokens, small_model
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from evaclip import CLIP, Savings
from evaclip.model.flops import PLAIN, flops_per_sample
from evaclip.model.text import cut_padding
from evakernels import clip_loss, sample_token_index

SAVINGS = {
    "pack_text": replace(PLAIN, pack_text=True),
    "pooled_last_block": replace(PLAIN, pooled_last_block=True),
    "early_drop": replace(PLAIN, early_drop=True),
    "all": Savings(),
    "activations": replace(PLAIN, recompute="activations"),
    "all-activations": Savings(recompute="activations"),
    "all-block": Savings(recompute="block"),
}
POST_NORM = {**NO_ROPE, "post_norm": True}
MODELS: dict[str, dict[str, Any]] = {
    "B": {"layers": 3},
    "B-drop-path": {"layers": 2, "drop_path": 0.5, "layer_scale_init": 0.5},
    "one-block": {"layers": 1},
    "E": {**POST_NORM, "layers": 2, "drop_path": 0.5},
    "8B": {**NO_ROPE, "norm": "rms_norm", "qkv_bias": False, "layers": 2},
    "18B": {**NO_ROPE, "norm": "rms_norm", "qkv_bias": False, "post_norm": True, "layers": 2},
    "g": {**NO_ROPE, "layers": 2, "layer_scale_init": 0.5},
}


def _results(model: CLIP, savings: Savings, *, drop: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    dtype = next(model.parameters()).dtype
    index = sample_token_index(4, 16, 7, generator=torch.Generator().manual_seed(5)) if drop else None
    model.set_savings(savings)
    model.zero_grad()
    torch.manual_seed(3)
    outputs = model(random_images(4).to(dtype), random_tokens(4), token_index=index)
    clip_loss(*outputs).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach() for x in outputs], gradients


@cache
def _plain(name: str, drop: bool, dtype: torch.dtype) -> tuple[CLIP, list[Tensor], dict[str, Tensor]]:
    """The model of this name, and its results without savings."""
    model = small_model(**MODELS[name]).train().to(dtype)
    return model, *_results(model, PLAIN, drop=drop)


def _assert_equal(name: str, savings: Savings, dtype: torch.dtype, *, drop: bool, tolerance: float) -> None:
    model, expected, expected_gradients = _plain(name, drop, dtype)
    actual, gradients = _results(model, savings, drop=drop)
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)
    assert gradients.keys() == expected_gradients.keys() == dict(model.named_parameters()).keys()
    for name, gradient in expected_gradients.items():
        # The temperature's gradient is what is left of a sum of terms around 1.
        scale = 1.0 if name == "logit_scale" else max(gradient.abs().max().item(), 1e-3)
        torch.testing.assert_close(gradients[name], gradient, atol=tolerance * scale, rtol=0, msg=name)


# Each option with each model, with dropped tokens or whole images; every third pair is quick.
EQUAL = [
    pytest.param(saving, name, (row + column) % 2 == 0, marks=[pytest.mark.exhaustive] if (row + column) % 3 else [])
    for row, saving in enumerate(SAVINGS)
    for column, name in enumerate(MODELS)
]


@pytest.mark.parametrize(("saving", "name", "drop"), EQUAL)
def test_options_keep_results(saving: str, name: str, drop: bool) -> None:
    # Rounding in float32 is 6e-8; the longest sums here have some hundred terms.
    _assert_equal(name, SAVINGS[saving], torch.float32, drop=drop, tolerance=2e-5)


@pytest.mark.parametrize("recompute", ["none", "activations", "block"])
def test_options_under_autocast(recompute: Any) -> None:
    model = small_model().train()
    exact, exact_gradients = _results(model, PLAIN, drop=True)
    with torch.autocast("cpu", torch.bfloat16):
        plain, plain_gradients = _results(model, PLAIN, drop=True)
        saving, gradients = _results(model, Savings(recompute=recompute), drop=True)
    for rough, rougher, expected in zip(saving, plain, exact, strict=True):
        assert (rough - expected).norm() <= 2 * (rougher - expected).norm() + 1e-6
    for name, expected in exact_gradients.items():
        error, usual = (g[name] - expected for g in (gradients, plain_gradients))
        assert error.norm() <= 3 * usual.norm() + 1e-2 * expected.norm(), name


def test_encode_text_of_any_tokens() -> None:
    model = small_model()
    tokens = random_tokens(3)
    with torch.no_grad():
        expected = model.encode_text(tokens)
        torch.testing.assert_close(model.encode_text(tokens.int()), expected, atol=0, rtol=0)
        torch.testing.assert_close(model.encode_text(tokens[:1]), expected[:1], atol=1e-5, rtol=0)
        torch.testing.assert_close(model.encode_text(cut_padding(tokens)), expected, atol=0, rtol=0)
        assert model.encode_text(tokens[:0]).shape == (0, 128)
        assert model.to("meta").encode_text(tokens.to("meta")).shape == (3, 128)


@pytest.mark.parametrize("saving", ["nothing", "pack_text", "pooled_last_block", "early_drop", "all"])
@pytest.mark.parametrize("pool", ["token", "mean", "attention"])
def test_flops_match_counter(pool, saving, monkeypatch):
    vision = {**NO_ROPE, "pool": pool, "prefix_tokens": 3} if pool != "token" else {}
    model = small_model(layers=2, **vision).requires_grad_(False)
    savings = {"nothing": PLAIN, **SAVINGS}[saving]
    model.set_savings(savings)
    tokens = torch.zeros(3, 16, dtype=torch.int64)
    tokens[:, 9] = 49407
    for place in ("vision_block.rope_attention", "text.rope_attention"):
        monkeypatch.setattr(f"evaclip.model.{place}", _torch_attention)
    monkeypatch.setattr("evakernels.packing.packed_attention", _torch_packed_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask: q @ k.mT @ v)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(random_images(3), tokens, token_index=sample_token_index(3, 16, 8))
    expected = flops_per_sample(model.config, 0.5, savings, text_tokens=10)
    latent = 2 * model.config.vision.width**2 if pool == "attention" else 0  # its query is the same for all images
    assert counter.get_total_flops() == 3 * expected + latent


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    # The counter supports only torch's matmuls.
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ((q @ k.mT) @ v).transpose(1, 2).contiguous()


def _torch_packed_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, **_: object
) -> Tensor:
    """For captions of one length."""
    grid = (t.unflatten(0, (len(cu_seqlens) - 1, max_seqlen)) for t in (q, k, v))
    return _torch_attention(*grid).flatten(0, 1)
