"""Packed images of several sizes have the embeddings and gradients of each image alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from small_models import NO_ROPE, random_images, small_model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from evaclip import CLIP, Savings, pack_images
from evaclip.model.config import Recompute
from evaclip.packing import PackedImages, drop_patches
from evakernels import sample_token_index

MODELS: dict[str, dict[str, Any]] = {
    "rope": {"layers": 2},
    "one-block": {"layers": 1},
    "post-norm": {**NO_ROPE, "post_norm": True, "layers": 2},
    "attention": {
        **NO_ROPE,
        "mlp": "gelu_tanh",
        "pool": "attention",
        "prefix_tokens": 0,
        "layers": 1,
        "pos_interpolation": "bilinear",
        "pos_antialias": True,
    },
    "registers": {"prefix_tokens": 3, "pos_antialias": True, "pos_square": True, "layers": 2},
    "mean": {"sub_norm": False, "pool": "mean", "qkv_bias": False, "norm": "rms_norm", "layer_scale_init": 0.5},
}
SIZES = ((32, 32), (16, 48), (64, 24), (8, 40), (16, 48))
Gradients = dict[str, Tensor]


def _images(sizes: tuple[tuple[int, int], ...] = SIZES) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, *size, generator=generator) for size in sizes]


def _alone(model: CLIP, images: list[Tensor]) -> Tensor:
    """Embeddings of the images one by one, each of the size of the model."""
    features = []
    for image in images:
        model.visual.set_image_size((image.shape[1], image.shape[2]))
        features.append(model.encode_image(image.unsqueeze(0)))
    model.visual.set_image_size(model.config.vision.image_size)
    return torch.cat(features)


def _with_gradients(model: CLIP, encode: Callable[[], Tensor]) -> tuple[Tensor, Gradients]:
    model.zero_grad()
    torch.manual_seed(3)
    features = encode()
    features.float().square().sum().backward()
    return features.detach(), {
        name: p.grad.detach().clone() for name, p in model.visual.named_parameters() if p.grad is not None
    }


def _assert_same(actual: tuple[Tensor, Gradients], expected: tuple[Tensor, Gradients], tolerance: float) -> None:
    torch.testing.assert_close(actual[0], expected[0], atol=tolerance, rtol=tolerance)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(actual[1][name], gradient, atol=tolerance * scale, rtol=0, msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_packed_images_match_each_alone(name: str) -> None:
    """Features differ by at most 1e-5; errors of gradients are at most three times as large, against float64."""
    model, images = small_model(**MODELS[name]).train(), _images()
    packed = pack_images(images, 8)
    features, gradients = _with_gradients(model, lambda: model.encode_image(packed))
    expected, usual = _with_gradients(model, lambda: _alone(model, images))
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)
    model.double()
    _, exact = _with_gradients(model, lambda: _alone(model, [image.double() for image in images]))
    assert gradients.keys() == exact.keys() == dict(model.visual.named_parameters()).keys()
    for parameter, gradient in exact.items():
        errors = [(found[parameter] - gradient).abs().max().item() for found in (gradients, usual)]
        assert errors[0] <= 3 * errors[1] + 2e-7 * gradient.abs().max().item(), parameter


def test_dropped_patches_match_token_index() -> None:
    model, images = small_model(layers=2), random_images(3)
    draws = [torch.Generator().manual_seed(4) for _ in range(2)]
    dropped = drop_patches(pack_images([*images], 8), 0.5, draws[0])
    index = torch.cat([sample_token_index(1, 16, 8, generator=draws[1]) for _ in images])
    with torch.no_grad():
        expected = model.encode_image(images, token_index=index)
        torch.testing.assert_close(model.encode_image(dropped), expected, atol=2e-6, rtol=1e-6)
    assert dropped.lengths.tolist() == [8, 8, 8]
    mixed = drop_patches(pack_images(_images(), 8), 0.9)
    assert mixed.lengths.tolist() == [1, 1, 2, 1, 1]
    assert (mixed.max_length, len(mixed.patches)) == (2, 6)
    assert (mixed.positions < mixed.sizes.repeat_interleave(mixed.lengths, 0)).all()


@pytest.mark.parametrize("recompute", ["none", "activations", "block"])
@pytest.mark.parametrize("post_norm", [False, True])
def test_packed_savings_match_square(recompute: Recompute, post_norm: bool) -> None:
    vision = {**NO_ROPE, "post_norm": True} if post_norm else {"layer_scale_init": 0.5}
    model, images = small_model(**vision, layers=3, drop_path=0.5).train(), random_images(8)
    packed, mixed = pack_images([*images], 8), pack_images(_images(), 8)
    for given, same in ((images, packed), (mixed, mixed)):
        model.set_savings(Savings(pooled_last_block=False))
        expected = _with_gradients(model, lambda given=given: model.encode_image(given))
        model.set_savings(Savings(recompute=recompute))
        _assert_same(_with_gradients(model, lambda same=same: model.encode_image(same)), expected, 2e-5)


@pytest.mark.parametrize("name", ["rope", "mean"])
@pytest.mark.parametrize("autocast", [True, False])
def test_packed_images_in_bf16(autocast: bool, name: str) -> None:
    """Under autocast, or with weights in bfloat16."""
    model, images = small_model(**MODELS[name]).train(), _images()
    exact, exact_gradients = _with_gradients(model, lambda: _alone(model, images))
    model = model if autocast else model.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        usual, usual_gradients = _with_gradients(model, lambda: _alone(model, images))
        found, gradients = _with_gradients(model, lambda: model.encode_image(pack_images(images, 8)))
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() <= 2 * (usual - exact).norm()
    for name, expected in exact_gradients.items():
        error, rough = ((each[name] - expected).norm() for each in (gradients, usual_gradients))
        assert error <= 3 * rough + 1e-2 * expected.norm(), name


def test_packed_mean_in_fp16() -> None:
    """The sum of the patches overflows in float16."""
    model, images = small_model(**MODELS["mean"]), _images(((136, 136), (16, 48)))
    with torch.no_grad():
        model.visual.pos_embed += 300
        exact = _alone(model, images)
        found = model.half().encode_image(pack_images(images, 8))
    torch.testing.assert_close(found.float(), exact, atol=0.02, rtol=0.02)


@pytest.mark.slow
def test_packed_images_compile_once() -> None:
    """One graph serves any mix of sizes, forward and backward."""
    torch._dynamo.reset()
    model, counter = small_model(layers=2).train(), CompileCounterWithBackend("aot_eager")
    compiled, graphs = torch.compile(model.visual, fullgraph=True, dynamic=True, backend=counter), set()
    for count in range(5):
        packed = pack_images(_images(((32, 32), (8 * count + 16, 24), (16, 16), (24, 8 * count + 8))), 8)
        expected = _with_gradients(model, lambda packed=packed: model.visual(packed))
        _assert_same(_with_gradients(model, lambda packed=packed: compiled(packed)), expected, 2e-5)
        graphs.add(counter.frame_count)
    assert len(graphs) == 1


def test_slices_and_parts_of_packed_images() -> None:
    packed = pack_images([image.to(torch.uint8) for image in _images()], 8)
    assert (len(packed), packed.max_length, packed.patches.dtype) == (5, 24, torch.uint8)
    assert packed.sizes.tolist() == [[4, 4], [2, 6], [8, 3], [1, 5], [2, 6]]
    parts = [packed[:2], packed[2:2], packed[2:]]
    assert [(len(part), part.max_length, len(part.patches)) for part in parts] == [(2, 16, 28), (0, 0, 0), (3, 24, 41)]
    joined = PackedImages.concatenate(parts)
    for name in ("patches", "positions", "sizes", "lengths"):
        assert torch.equal(getattr(joined, name), getattr(packed, name))
    assert joined.max_length == 24
    with torch.no_grad():
        assert small_model().encode_image(packed.to(dtype=torch.float32)[:0]).shape == (0, 128)


@pytest.mark.parametrize(
    ("call", "error", "name"),
    [
        (lambda model: pack_images([], 8), ValueError, "images"),
        (lambda model: pack_images([torch.zeros(3, 16, 12)], 8), ValueError, "images"),
        (lambda model: pack_images([torch.zeros(1, 16, 16)], 8), ValueError, "images"),
        (lambda model: pack_images(_images(), 8)[0], TypeError, "images"),
        (lambda model: model(pack_images(_images(), 4)), ValueError, "images.patches"),
        (lambda model: model(pack_images([torch.zeros(3, 8, 8, dtype=torch.uint8)], 8)), TypeError, "images"),
        (lambda model: model(pack_images(_images(), 8), torch.zeros(5, 2).long()), ValueError, "token_index"),
        (lambda model: model.patch_features(pack_images(_images(), 8)), TypeError, "images"),
    ],
)
def test_packed_images_refused(call: Callable[[Any], Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        call(small_model().visual)
