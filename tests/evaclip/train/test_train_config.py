"""The configuration tree: what it accepts, what it says about the rest."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from evaclip import Preprocess
from evaclip.errors import UserError
from evaclip.factory import create_model
from evaclip.runs.log import load_yaml
from evaclip.train.config import TrainConfig, training_tree
from evaclip.train.overrides import commented_yaml, dump_yaml, parse_assignment, resolve, validate
from evaclip.train.recipes import RECIPES, get_recipe, with_fitting_nodes, with_own_evaluation
from evaclip.train.tasks.contrastive import MAX_LOG_SCALE
from evaclip.train.tasks.task import training_transform
from evaclip.train.tree import nest

Make = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.lrr=1", "'optim.lrr'; did you mean 'optim.lr'?"),
        ("task={name: masked_image, teacher: {nam: tiny}}", "did you mean 'task.teacher.name'"),
        ("model.savings.recompte=block", "did you mean 'model.savings.recompute'"),
        ("eval.sets.val.data.trian=x", "did you mean 'eval.sets.val.data.train'?"),
        ("data.mixture.a.wieght=1", "did you mean 'data.mixture.a.weight'?"),
        ("qqqqqqqq=1", "the configuration has: name"),
        ("a=[1", "--set"),
        ("optim.lr=.inf", "optim.lr=inf: input should be a finite number"),
        ("model.lock_image_unlocked_groups=2", "lock_image_unlocked_groups=2 needs lock_image=true"),
        ("model.lock_text_unlocked_layers=1", "lock_text_unlocked_layers=1 needs lock_text=true"),
        ("optim.name=sgd", "optim.name='sgd': must be adamw, lamb or timm/NAME"),
        ("optim.options={caution: true}", "options={'caution': True} needs name=timm/NAME, got name=adamw"),
        ("optim={name: timm/lion, stochastic_rounding: true}", "stochastic_rounding needs name=adamw or name=lamb"),
        ("name=../../x", "name='../../x': expected a folder inside of `output`"),
        ("optim.stochastic_rounding=true", "optim.stochastic_rounding needs precision=bf16, got precision=fp32"),
        ("loss={name: siglip, label_smoothing: 0.1}", "label_smoothing=0.1 needs name=clip"),
        ("parallel.offload=cpu", "offload=cpu needs mode=shard or hybrid"),
        ("parallel.mode=hybrid", "hybrid needs a shard_size"),
        ("parallel={mode: shard, shard_size: 2}", "no other mode has one"),
        ("ema_decay=1.0", "ema_decay=1.0: input should be less than 1"),
        ("accumulation_steps=9", "batch_size=8 is less than accumulation_steps=9"),
        ("schedule.epochs=2", "schedule: set either steps or epochs, and the other to null, got steps=6 and epochs=2"),
        ("log.profile_steps=[5, 3]", "log.profile_steps: must be the first and the last step, got [5, 3]"),
        ("eval.sets={a/b: {}}", "string should match pattern"),
        ("data.resize=squash", "data.resize"),
        ("data.max_patches=64", "max_patches=64 needs resize=native"),
    ],
)
def test_wrong_assignments_name_the_key(run_config, assignment, message):
    with pytest.raises(UserError) as caught:
        resolve(run_config(), [parse_assignment(assignment)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "argument"),
    [
        ("task.name=classification", "data.resize"),
        ("task.name=masked_image", "data.resize"),
        ("schedule.resolutions=[{image_size: 8, steps: 1}]", "data.max_patches"),
    ],
)
def test_native_resize_refuses_other_options(run_config: Make, assignment: str, argument: str) -> None:
    native = "data={resize: native, max_patches: 9}"
    assert run_config(native).data.max_patches == 9
    with pytest.raises(UserError, match=argument):
        run_config(native, assignment)


def test_values_are_read_as_yaml(run_config: Make) -> None:
    config = run_config("optim.lr=1e-3", "optim.visual.lr=null", "name=123")
    assert (config.optim.lr, config.optim.visual.lr, config.name) == (1e-3, None, "123")


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_survive_yaml(name: str, tmp_path: Path) -> None:
    config = get_recipe(name)
    assert config.batch_size % config.data.canonical_nodes == 0
    if config.batch_size > 10_000:
        assert config.data.canonical_nodes * config.data.shuffle_window == 8 * config.batch_size
    config = resolve(config, [nest("eval.sets.val.data.train", "a: b # c " * 30)])
    path = tmp_path / "config.yaml"
    for text in (dump_yaml(config), commented_yaml(config)):
        path.write_text(text)
        assert validate(load_yaml(path)) == config


@pytest.mark.parametrize(
    ("name", "batch", "samples", "visual", "text", "dropout"),
    [
        ("eva01-g-14-plus", 114_688, 11e9, (4e-4, 0.85), (4e-5, 0.75), 0.5),
        ("eva02-b-16", 131_072, 8.39e9, (2e-4, 0.75), (2e-5, 0.75), 0.0),
        ("eva02-l-14", 131_072, 4.19e9, (4e-4, 0.85), (4e-5, 0.75), 0.0),
        ("eva02-l-14-336", 61_440, 2.02e9, (4e-4, 0.75), (4e-5, 0.65), 0.0),
        ("eva02-e-14", 115_200, 4.06e9, (4e-4, 0.9), (4e-5, 0.75), 0.5),
        ("eva02-e-14-plus", 144_000, 9e9, (4e-4, 0.9), (4e-5, 0.75), 0.5),
        ("eva01-g-14", 40_960, 11e9, (4e-4, 0.85), (4e-5, 0.75), 0.0),
        ("eva-clip-8b", 178_176, 9e9, (4e-4, 0.9), (4e-5, 0.75), 0.5),
        ("eva-clip-18b", 108_000, 6e9, (4e-4, 0.9), (4e-5, 0.75), 0.5),
    ],
)
def test_published_numbers(name, batch, samples, visual, text, dropout):
    config = get_recipe(name)
    optim = config.optim
    assert config.batch_size == batch
    assert config.schedule.steps * batch == pytest.approx(samples, rel=5e-3)
    assert (optim.visual.lr, optim.visual.layer_decay) == visual
    assert (optim.text.lr, optim.text.layer_decay) == text
    lr, beta2, decay = (0.0, 0.95, 0.0) if name.endswith("8b") else (5e-4, 0.98, 0.05)
    kind = "adamw" if name == "eva01-g-14" else "lamb"
    assert (optim.name, optim.lr, optim.beta1, optim.beta2, optim.eps) == (kind, lr, 0.9, beta2, 1e-6)
    assert (optim.weight_decay, optim.grad_clip_norm, config.schedule.warmup_steps) == (decay, 5.0, 2000)
    assert config.model.patch_dropout == dropout
    assert config.model.savings.recompute == "block"
    bf16 = name in ("eva02-e-14-plus", "eva-clip-8b", "eva-clip-18b")
    assert config.precision == ("amp_bf16" if bf16 else "amp_fp16")
    model = create_model(config.model.name, device="meta", **config.model.options)
    assert (model.config.init_logit_scale == MAX_LOG_SCALE) == name.endswith("8b")


def test_training_tree_has_what_changes_the_weights(run_config: Make) -> None:
    same = run_config("log.every_steps=3", "name=other", "checkpoint.keep=9")
    assert training_tree(same) == training_tree(run_config())
    assert training_tree(run_config("optim.lr=2e-3")) != training_tree(run_config())
    plain = training_tree(run_config(task="masked_image"))
    for irrelevant in ("cache=elsewhere", "cache_leaves_gb=1.0", "shard=true"):
        assert training_tree(run_config(f"task.teacher.{irrelevant}", task="masked_image")) == plain
    assert training_tree(run_config("task.teacher.precision=bf16", task="masked_image")) != plain


def test_own_data_drops_the_recipes_evaluation() -> None:
    tiny = get_recipe("tiny")
    mine = resolve(tiny, [nest("data.train", "mine")])
    found = with_own_evaluation(mine, tiny)
    assert (found.eval.sets, found.validation_split) == (None, 0.05)
    assert with_own_evaluation(resolve(mine, [{"validation_split": 0}]), tiny).validation_split == 0
    other = with_own_evaluation(resolve(mine, [nest("eval.sets.val.data.train", "other")]), tiny)
    assert (list(other.eval.sets or {}), other.validation_split) == (["val"], None)
    for kept in (tiny, resolve(mine, [nest("eval.sets.shapes.data.train", "other")]), get_recipe("finetune")):
        assert with_own_evaluation(kept, tiny) == kept


def test_own_batch_size_keeps_fitting_parts() -> None:
    recipe = get_recipe("eva02-b-16")
    assert recipe.data.canonical_nodes == 64
    for batch, nodes in ((131_072, 64), (1_000, 8), (7, 1)):
        data = with_fitting_nodes(resolve(recipe, [{"batch_size": batch}]), recipe).data
        assert data.canonical_nodes == nodes
        if nodes < 64:
            assert data.shuffle_window == 8 * batch // nodes
    own = resolve(recipe, [nest("data.canonical_nodes", 3), {"batch_size": 7}])
    assert with_fitting_nodes(own, recipe) == own


def test_a_recipe_may_be_called_by_its_model() -> None:
    expected = get_recipe("eva02-e-14-plus")
    for name in ("EVA02-CLIP-bigE-14-plus", "eva02_clip_bigE_14_plus", "EVA02_E_14_plus"):
        assert get_recipe(name) == expected


def test_own_transform_is_named_by_its_module(tmp_path, monkeypatch, run_config):
    (tmp_path / "my_pictures.py").write_text(
        "from evaclip.transforms import TrainTransform\n"
        "class OnBlack(TrainTransform):\n"
        "    def background(self, draws):\n"
        "        return (0, 0, 0)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    data = run_config("data.transform=my_pictures:OnBlack").data
    preprocess = Preprocess(mean=(0, 0, 0), std=(1, 1, 1))
    image = Image.new("RGBA", (8, 8), (255, 255, 255, 0))
    assert not training_transform(data, 4, preprocess)(image, 0).any()
    assert training_transform(run_config().data, 4, preprocess)(image, 0).all()

    for name in ("nowhere:Transform", "evaclip.transforms:Nothing", "no name", "evaclip.transforms"):
        with pytest.raises(UserError, match=f"data.transform must be .*, got '{name}'"):
            training_transform(run_config(f"data.transform={name}").data, 4, preprocess)
