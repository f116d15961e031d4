"""Parameter groups against the published numbers, optimizers, their saved moments, averaged weights."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from contrastive_step import groups_of
from torch import nn

from evaclip.factory import create_model
from evaclip.model.clip import CLIP
from evaclip.train.build import cast_matrices
from evaclip.train.checkpoint import write_shards
from evaclip.train.config import OptimConfig, TowerConfig
from evaclip.train.ema import Ema
from evaclip.train.optimizer import build_optimizer
from evaclip.train.recipes import get_recipe
from evaclip.train.snapshot import restore_moments, take_moments


@pytest.mark.parametrize(
    ("recipe", "groups", "visual_embedding", "visual_first", "text_embedding"),
    [("eva02-b-16", 57, 0.02376, 0.03168, 0.02376), ("eva02-e-14-plus", 201, 0.001061, 0.001179, 7.53e-5)],
)
def test_published_models(recipe, groups, visual_embedding, visual_first, text_embedding):
    config = get_recipe(recipe)
    model = create_model(config.model.name, device="meta")
    found = {group["name"]: group for group in groups_of(model, config.optim)}
    assert len(found) == groups
    visual, text = config.optim.visual, config.optim.text

    def scale(name: str, tower: TowerConfig) -> float:
        return float(found[name]["lr"] / tower.lr)

    last = model.visual.num_layer_ids - 1
    assert scale("visual.layer00.decay", visual) == pytest.approx(visual_embedding, rel=1e-3)
    assert scale("visual.layer01.decay", visual) == pytest.approx(visual_first, rel=1e-3)
    assert scale(f"visual.layer{last - 1:02d}.decay", visual) == pytest.approx(visual.layer_decay)
    assert scale(f"visual.layer{last:02d}.decay", visual) == 1.0
    assert scale("text.layer00.decay", text) == pytest.approx(text_embedding, rel=1e-3)
    assert found["logit_scale.no_decay"]["lr"] == 5e-4


def test_parameter_groups_decay_matrices_only() -> None:
    model = create_model("EVA02-CLIP-B-16", device="meta")
    groups = groups_of(model, OptimConfig(weight_decay=0.1))
    members = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(members) == sorted(map(id, model.parameters()))
    decayed = {id(parameter) for group in groups if group["weight_decay"] for parameter in group["params"]}
    names = {name: id(parameter) in decayed for name, parameter in model.named_parameters()}
    for name in ("visual.pos_embed", "visual.cls_token", "text.positional_embedding", "logit_scale"):
        assert not names[name]
    for name in ("text.token_embedding.weight", "text.text_projection", "visual.patch_embed.proj.weight"):
        assert names[name]
    assert not any(wrong for name, wrong in names.items() if name.endswith((".bias", "q_bias", "v_bias")))
    assert {group["weight_decay"] for group in groups} == {0.0, 0.1}


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_stochastic_rounding_of_bf16_parameters_only(name: str) -> None:
    model = create_model("tiny", init_logit_bias=-10.0)
    cast_matrices(model, "bf16")
    config = OptimConfig(name=name, stochastic_rounding=True)
    groups = groups_of(model, config)
    optimizer = build_optimizer(groups, config, seed=(1 << 31) + 5)
    for group in optimizer.param_groups:
        matrices = [parameter.ndim > 1 for parameter in group["params"]]
        assert set(matrices) == {group["stochastic_rounding"]}
    assert {group["seed"] for group in optimizer.param_groups} == {5}


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_moments_come_back_and_rates_stay(small_model: CLIP, name: Any, tmp_path: Path) -> None:
    first = build_optimizer(groups_of(small_model, OptimConfig(name=name)), OptimConfig(name=name, lr=1e-2))
    for parameter in small_model.parameters():
        parameter.grad = torch.ones_like(parameter)
    first.step()
    tensors, scalars = take_moments(small_model, first)
    write_shards(tensors, tmp_path, 0, 1)
    # Other groups, in another order.
    config = OptimConfig(name=name, lr=2e-2, weight_decay=0.3, visual={"layer_decay": 0.5})  # type: ignore[arg-type]
    second = build_optimizer(groups_of(small_model, config), config)
    restore_moments(small_model, second, tmp_path, scalars)
    for parameter in small_model.parameters():
        for kind, value in first.state[parameter].items():
            assert torch.equal(second.state[parameter][kind], value)
            assert second.state[parameter][kind].dtype == value.dtype
    assert max(group["peak_lr"] for group in second.param_groups) == 2e-2


def test_follows_its_formula_and_warms_up() -> None:
    model = nn.Linear(3, 2).double()
    ema = Ema(model, decay=0.5)
    expected = model.weight.detach().clone()
    for step in range(1, 12):
        with torch.no_grad():
            model.weight.add_(step)
        ema.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model.weight.detach()
    torch.testing.assert_close(ema.state_dict()["weight"], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_applied_restores_weights_on_errors(dtype: torch.dtype) -> None:
    model = nn.Linear(3, 2).to(dtype)
    ema = Ema(model, decay=0.9)
    nn.init.ones_(model.weight)
    ema.update(1)
    average = ema.state_dict()["weight"].clone()
    assert not torch.equal(average, average.to(torch.bfloat16))
    own = copy.deepcopy(model.state_dict())

    def use() -> None:
        with ema.applied():
            assert torch.equal(model.weight, average.to(dtype))
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        use()
    assert torch.equal(model.weight, own["weight"])
    assert torch.equal(ema.state_dict()["weight"], average)
