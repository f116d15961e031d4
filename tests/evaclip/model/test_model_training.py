"""Training: dropout of patches and branches, recomputation, independent models, compilation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import NO_ROPE, random_images, random_tokens, small_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from evaclip import CLIP, Savings
from evaclip.model.norm import Stream
from evaclip.model.vision import RotaryTable
from evakernels import clip_loss, sample_token_index


def test_patch_dropout_in_training_only() -> None:
    model = small_model(patch_dropout=0.5)
    images = random_images(4)
    assert (model.visual.num_patches, model.visual.num_kept_patches()) == (16, 8)
    with torch.no_grad():
        full = model.encode_image(images)
        model.train()
        torch.manual_seed(5)
        dropped = model.encode_image(images)
        torch.manual_seed(5)
        index = sample_token_index(4, 16, 8)
        model.eval()
        assert torch.equal(model.encode_image(images, token_index=index), dropped)
        assert not torch.allclose(full, dropped, atol=1e-4)
        model.train()
        model.visual.patch_dropout = 0.0
        assert torch.equal(model.encode_image(images), full)


def test_drop_path_drops_or_scales_branches() -> None:
    model = small_model(drop_path=0.5, layers=2).train()
    rates = [block.drop_path for block in model.visual.blocks]
    assert rates == [0.0, 0.5]
    block = model.visual.blocks[1]
    x = torch.randn(64, 5, 128, generator=torch.Generator().manual_seed(0))
    model.eval()
    with torch.no_grad():
        branch = block.attn(block.norm1(x))
        outcomes = [x + factor * branch for factor in (0.0, 2.0)]
        outcomes = [y + factor * block.mlp(block.norm2(y)) for y in outcomes for factor in (0.0, 2.0)]
        model.train()
        torch.manual_seed(0)
        out = block(Stream(x)).total()
    close = torch.stack([(out - y).abs().amax(dim=(1, 2)) < 1e-4 for y in outcomes])
    assert (close.sum(dim=0) == 1).all()
    assert (close.sum(dim=1) > 6).all()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vision", "recompute"),
    [
        ({"patch_dropout": 0.5}, "none"),
        *(
            pytest.param(vision, recompute, marks=pytest.mark.exhaustive)
            for vision, recompute in (
                ({**NO_ROPE, "post_norm": True, "drop_path": 0.2}, "none"),
                ({"patch_dropout": 0.5}, "activations"),
                ({**NO_ROPE, "post_norm": True, "drop_path": 0.2}, "activations"),
                ({}, "block"),
            )
        ),
    ],
)
def test_compiles_without_graph_break(vision: dict[str, object], recompute: Any) -> None:
    torch._dynamo.reset()  # otherwise differences from the last model become dynamic
    model = small_model(**vision, layers=2, text={"layers": 1}).train()
    model.set_savings(Savings(recompute=recompute))
    images, tokens = random_images(2), random_tokens(2)
    compiled = torch.compile(_loss, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    expected = _gradients_of(model, _loss(model, images, tokens))
    torch.manual_seed(2)
    actual = _gradients_of(model, compiled(model, images, tokens))
    for name, gradient in expected.items():
        # Captions are packed in eager mode and padded in a graph: the same sums in another order.
        slack = 2e-5 * float(gradient.abs().max())
        torch.testing.assert_close(actual[name], gradient, atol=slack, rtol=0, msg=name)


@pytest.mark.slow
def test_compiled_text_tower_packs_any_lengths() -> None:
    """One graph serves captions of any lengths, if graphs may have sizes that depend on the data."""
    torch._dynamo.reset()
    tower, counter = small_model().text.train(), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(tower, fullgraph=True, backend=counter)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        for seed in range(5):
            tokens = random_tokens(6, seed=seed)
            features = tower(tokens), compiled(tokens)
            torch.testing.assert_close(features[1], features[0], atol=1e-6, rtol=1e-6)
            expected, actual = (_gradients_of(tower, each.square().sum()) for each in features)
            for name, gradient in expected.items():
                slack = 1e-6 * float(gradient.abs().max())
                torch.testing.assert_close(actual[name], gradient, atol=slack, rtol=0, msg=name)
    assert counter.frame_count == 1
    assert any("packed_attention" in str(node.target) for node in counter.graphs[0].graph.nodes)


def _loss(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    return clip_loss(*model(images, tokens))


def _gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


CONVERSIONS: dict[str, Callable[[CLIP], CLIP]] = {
    "half and back": lambda model: model.half().float(),
    "cast on meta": lambda model: model.to("meta").half().to_empty(device="cpu"),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_rotary_table_after_conversion(name: str) -> None:
    model = CONVERSIONS[name](small_model())
    exact = RotaryTable(model.config.vision)
    for actual, expected in ((model.visual.rope.cos, exact.cos), (model.visual.rope.sin, exact.sin)):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)
