"""Memory options: equal embeddings and gradients, fewer FLOPs, less memory."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import NO_ROPE, random_images, random_tokens, small_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from evaclip import CLIP, Savings
from evaclip.errors import UserError
from evaclip.model import vision
from evaclip.model.flops import PLAIN, flops_per_sample
from evaclip.model.text import Layout, cut_padding
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


def test_evaluation_is_equal() -> None:
    model = small_model(layers=2)
    images, tokens = random_images(3), random_tokens(3)
    outputs = []
    with torch.no_grad():
        for savings in (PLAIN, Savings(recompute="activations")):
            model.set_savings(savings)
            outputs.append(model(images, tokens))
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


def test_savings_are_given_at_construction() -> None:
    savings = Savings(pack_text=False, recompute="block")
    model = CLIP(small_model().config, savings)
    assert model.visual.savings == model.text.savings == savings
    assert CLIP(small_model().config).text.savings == Savings()
    with pytest.raises(UserError, match="did you mean 'block'"):
        Savings(recompute="blocks")  # type: ignore[arg-type]


def test_packed_layout() -> None:
    tokens = torch.tensor([[9, 5, 99, 0], [9, 99, 0, 0], [9, 5, 5, 99], [0, 0, 0, 0]])
    layout = Layout.packed(tokens)
    assert (layout.batch, layout.length) == (4, 4)
    assert layout.positions().tolist() == [0, 1, 2, 0, 1, 0, 1, 2, 3, 0]
    rows = tokens.flatten()[layout.rows].unsqueeze(1)
    assert layout.at_ends(rows).squeeze(1).tolist() == [99, 99, 99, 0]
    grid = layout.spread(rows)
    assert torch.equal(grid.squeeze(2), tokens)
    assert layout.before_ends().sum(dim=1).tolist() == [3, 2, 4, 1]


@pytest.mark.parametrize("find", [Layout.packed, Layout.padded])
def test_model_with_layout(find: Any) -> None:
    model, tokens = small_model(), random_tokens(4)
    with torch.no_grad():
        expected = model(random_images(4), tokens)
        given = model(random_images(4), tokens, layout=find(tokens))
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)


def test_packed_layout_gradient() -> None:
    layout = Layout.packed(random_tokens(3))
    rows = torch.randn(len(layout.positions()), 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layout.spread, (rows,))


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


def test_cut_padding() -> None:
    tokens = torch.tensor([[9, 5, 99, 0, 0], [9, 99, 0, 0, 0]])
    assert torch.equal(cut_padding(tokens), tokens[:, :3])
    assert cut_padding(tokens[:0]).shape == (0, 5)


def test_dropped_patches_are_not_embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    monkeypatch.setattr(vision.PatchEmbed, "forward", None)
    index = sample_token_index(2, 16, 3)
    assert model.encode_image(random_images(2), token_index=index).shape == (2, 128)


@pytest.mark.parametrize("vision_options", [{"layers": 2}, {**NO_ROPE, "layers": 2}])
@pytest.mark.parametrize("saving", ["nothing", "pack_text", "pooled_last_block", "early_drop", "all"])
def test_flops_match_counter(saving, vision_options, monkeypatch):
    model = small_model(**vision_options)
    savings = {"nothing": PLAIN, **SAVINGS}[saving]
    model.set_savings(savings)
    tokens = torch.zeros(3, 16, dtype=torch.int64)
    tokens[:, 9] = 49407
    for place in ("vision_block.rope_attention", "text.rope_attention"):
        monkeypatch.setattr(f"evaclip.model.{place}", _torch_attention)
    monkeypatch.setattr("evaclip.model.text.packed_attention", _torch_packed_attention)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, attn_mask: q @ k.mT @ v)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(random_images(3), tokens, token_index=sample_token_index(3, 16, 8))
    expected = flops_per_sample(model.config, 0.5, savings, text_tokens=10)
    assert counter.get_total_flops() == 3 * expected


def _torch_attention(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    # The counter supports only torch's matmuls.
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return ((q @ k.mT) @ v).transpose(1, 2).contiguous()


def _torch_packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """For captions of one length."""
    grid = (t.unflatten(0, (len(cu_seqlens) - 1, max_seqlen)) for t in (q, k, v))
    return _torch_attention(*grid).flatten(0, 1)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_compiled_text_of_any_length() -> None:
    model = small_model(layers=1, text={"layers": 2}).train()
    compiled = torch.compile(model.encode_text, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (11, 16, 7):
        tokens = random_tokens(4)[:, :length].clone()
        tokens[:, -1] = 49407
        torch.testing.assert_close(compiled(cut_padding(tokens)), model.encode_text(tokens), atol=1e-5, rtol=0)


def kept_bytes(model: nn.Module, forward: Callable[[], Any]) -> int:
    """Bytes that `forward()` allocates and that are still alive when it has returned, parameters left out."""
    with _Storages() as storages:
        output = forward()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    alive = {pointer: size for pointer, size, weak in storages.seen if not weak.expired()}
    assert output is not None
    return sum(size for pointer, size in alive.items() if pointer not in parameters)


class _Storages(TorchDispatchMode):
    """Records the storages of all results without keeping them alive."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int, StorageWeakRef]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                self.seen.append((storage.data_ptr(), storage.nbytes(), StorageWeakRef(storage)))
        return result


def _kept(policy: Any, **vision: Any) -> int:
    model = small_model(layers=4, **vision).train()
    model.set_savings(Savings(pooled_last_block=False, recompute=policy))
    images = random_images(4)
    return kept_bytes(model.visual, lambda: model.visual(images))


def test_saved_bytes_of_block() -> None:
    # Per token and block, in channels: the block's input, the attention's output and branch, gate and up. The
    # tolerance covers two numbers for each head and norm, and the embeddings (3 %).
    tokens, layers, width, hidden, item = 4 * 17, 4, 128, 384, 4
    expected = tokens * layers * (3 * width + 2 * hidden) * item
    assert _kept("activations") == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize(("vision", "activations", "block"), [({}, 0.6, 0.15), (POST_NORM, 0.7, 0.2)])
def test_policies_save_less(vision: dict[str, Any], activations: float, block: float) -> None:
    everything = _kept("none", **vision)
    assert _kept("activations", **vision) < activations * everything
    assert _kept("block", **vision) < block * everything


class _Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("vision", [{"layers": 3}, {**POST_NORM, "layers": 3}, {**NO_ROPE, "layers": 3}])
def test_activations_recomputes_only_projections(vision: dict[str, Any]) -> None:
    """Only matmuls before attention run twice; attention does not."""
    counts = {}
    for policy in ("none", "activations"):
        model = small_model(**vision).train()
        model.set_savings(Savings(pooled_last_block=False, recompute=policy))  # type: ignore[arg-type]
        with _Calls() as calls:
            model.visual(random_images(2)).sum().backward()
        counts[policy] = calls.counts
    products = {policy: count["aten::mm"] + count["aten::addmm"] for policy, count in counts.items()}
    projections = 3 if model.config.vision.sub_norm else 1
    assert products["activations"] - products["none"] == 3 * projections
    forward = "evakernels::rope_attention_forward"
    assert counts["activations"][forward] == counts["none"][forward] == 3


@pytest.mark.parametrize("policy", ["none", "activations", "block"])
def test_blocks_are_called_as_modules(policy: Any) -> None:
    """Sharding needs the hooks of blocks, which gather the weights."""
    model = small_model(layers=3).train()
    model.set_savings(Savings(recompute=policy))
    called: list[int] = []
    for index, block in enumerate(model.visual.blocks):
        block.register_forward_hook(lambda *_, index=index: called.append(index))
    model.visual(random_images(2))
    assert called == [0, 1, 2]
