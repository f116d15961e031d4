"""Parameter groups against the published numbers, and the optimizers on top."""

import pytest
from contrastive_step import groups_of

from evaclip.factory import create_model
from evaclip.train.config import OptimConfig, TowerConfig
from evaclip.train.optimizer import build_optimizer, set_lr_factor
from evaclip.train.recipes import get_recipe


@pytest.mark.parametrize(
    ("recipe", "groups", "visual_embedding", "visual_first", "text_embedding"),
    [
        ("eva02-b-16", 57, 0.02376, 0.03168, 0.02376),
        ("eva02-l-14", 81, 0.01720, 0.02023, 0.02376),
        ("eva01-g-14-plus", 137, 0.001277, 0.001502, 0.000753),
        ("eva02-e-14-plus", 201, 0.001061, 0.001179, 7.53e-5),
    ],
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


def test_a_tower_without_layer_decay_has_two_groups() -> None:
    config = OptimConfig(lr=1.0, visual=TowerConfig(lr=0.5, weight_decay=0.2), text=TowerConfig(lr=0.25))
    groups = {group["name"]: group for group in groups_of(create_model("tiny", device="meta"), config)}
    assert set(groups) == {
        "visual.decay", "visual.no_decay", "text.decay", "text.no_decay", "logit_scale.no_decay",
    }  # fmt: skip
    assert groups["visual.decay"]["lr"] == 0.5
    assert groups["visual.decay"]["weight_decay"] == 0.2
    assert groups["text.decay"]["weight_decay"] == 0.05
    assert groups["logit_scale.no_decay"]["lr"] == 1.0


def test_set_lr_factor_scales_each_peak() -> None:
    config = OptimConfig(lr=1.0, visual=TowerConfig(lr=0.5))
    model = create_model("tiny", device="meta")
    optimizer = build_optimizer(groups_of(model, config), config)
    set_lr_factor(optimizer, 0.5, 0)
    set_lr_factor(optimizer, 0.1, 1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.05, 0.05, 0.1, 0.1])


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_stochastic_rounding_of_bf16_parameters_only(name: str) -> None:
    """SigLIP's bias is in float32."""
    model = create_model("tiny", precision="bf16", init_logit_bias=-10.0)
    model.logit_bias.data = model.logit_bias.data.float()
    config = OptimConfig(name=name, stochastic_rounding=True)
    groups = groups_of(model, config)
    optimizer = build_optimizer(groups, config, seed=(1 << 31) + 5)
    found = {group["name"]: group["stochastic_rounding"] for group in optimizer.param_groups}
    assert not found.pop("logit_bias.no_decay")
    assert all(found.values())
    assert {group["seed"] for group in optimizer.param_groups} == {5}
