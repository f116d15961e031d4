"""Training: dropout of patches and branches, recomputation, independent models, compilation."""

import dataclasses
from typing import Any

import pytest
import torch
from small_models import NO_ROPE, random_images, random_tokens, small_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from evaclip import CLIP, Savings
from evaclip.model.config import Recompute
from evaclip.model.norm import Norm, Stream
from evakernels import clip_loss, sample_token_index


def _gradients(model: CLIP, token_index: Tensor | None = None) -> dict[str, Tensor]:
    model.zero_grad()
    clip_loss(*model(random_images(4), random_tokens(4), token_index=token_index)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def _assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert all(torch.equal(gradient, second[name]) for name, gradient in first.items())


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


@pytest.mark.parametrize(("rate", "kept"), [(0.0, 16), (0.3, 11), (0.99, 1)])
def test_number_of_kept_patches(rate: float, kept: int) -> None:
    assert small_model(patch_dropout=rate).visual.num_kept_patches() == kept


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


def test_recomputation_after_second_forward() -> None:
    model = small_model().train()
    model.set_savings(Savings(recompute="block"))
    indices = [sample_token_index(4, 16, 6, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
    alone = [_gradients(model, index) for index in indices]
    model.zero_grad()
    losses = [clip_loss(*model(random_images(4), random_tokens(4), token_index=index)) for index in indices]
    losses[0].backward()
    _assert_same(alone[0], {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    model.zero_grad()
    losses[1].backward()
    _assert_same(alone[1], {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})


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


def _loss(model: nn.Module, images: Tensor, tokens: Tensor) -> Tensor:
    return clip_loss(*model(images, tokens))


def _gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_close_to_float32(dtype: torch.dtype) -> None:
    model = small_model(patch_dropout=0.5, drop_path=0.2, layer_scale_init=1.0).train()
    index = sample_token_index(4, 16, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    exact = model.encode_image(random_images(4), normalize=True, token_index=index)
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype):
        rough = model.encode_image(random_images(4), normalize=True, token_index=index)
    assert (exact - rough.float()).abs().max() < 0.03
    rough.float().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.visual.parameters())


class _Casts(TorchDispatchMode):
    """Shapes of tensors that are cast from float32 to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and kwargs["dtype"] == torch.bfloat16:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("recompute", ["none", "activations", "block"])
def test_norms_add_branches(recompute: Recompute, monkeypatch: pytest.MonkeyPatch) -> None:
    """With recomputation each block adds its branch: otherwise two tensors would be saved."""
    model = small_model(layer_scale_init=1.0).train()
    model.set_savings(dataclasses.replace(model.visual.savings, recompute=recompute))
    total, summed = Stream.total, []

    def count(stream: Stream) -> Tensor:
        summed.append(stream.branch is not None)
        return total(stream)

    monkeypatch.setattr(Stream, "total", count)
    out = model.encode_image(random_images(2)), model.encode_text(random_tokens(2))
    layers = model.config.vision.layers + model.config.text.layers
    assert sum(summed) == (2 if recompute == "none" else layers)
    (out[0].sum() + out[1].sum()).backward()


def test_16_bit_norms_save_casts_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model(layer_scale_init=1.0).train()

    def results() -> tuple[Tensor, Tensor, dict[str, Tensor], int]:
        with _Casts() as casts, torch.autocast("cpu", torch.bfloat16):
            images, texts = model.encode_image(random_images(2)), model.encode_text(random_tokens(2))
        gradients = _gradients_of(model, (images.float().square().sum() + texts.float().square().sum()))
        return images, texts, gradients, len(casts.shapes)

    images, texts, gradients, casts = results()
    forward, of_sum = Norm.forward, Norm.of_sum
    monkeypatch.setattr(Norm, "forward", lambda norm, x, out_dtype=None: forward(norm, x))
    monkeypatch.setattr(Norm, "of_sum", lambda norm, *args, out_dtype=None: of_sum(norm, *args[:4]))
    in_float32 = results()
    assert torch.equal(images, in_float32[0])
    assert torch.equal(texts, in_float32[1])
    assert all(torch.equal(gradient, in_float32[2][name]) for name, gradient in gradients.items())
    assert casts < in_float32[3]
