"""Memory and matmuls of each policy of activation checkpointing."""

from collections import Counter
from typing import Any

import pytest
from live_memory import kept_bytes
from small_models import NO_ROPE, random_images, small_model
from torch.utils._python_dispatch import TorchDispatchMode

from evaclip import Savings

E = {**NO_ROPE, "post_norm": True}


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


@pytest.mark.parametrize(("vision", "activations", "block"), [({}, 0.6, 0.15), (E, 0.7, 0.2)])
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


@pytest.mark.parametrize("vision", [{"layers": 3}, {**E, "layers": 3}, {**NO_ROPE, "layers": 3}])
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
