"""The configuration tree: what it accepts, what it says about the rest."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from evaclip import Preprocess
from evaclip.errors import UserError
from evaclip.factory import create_model
from evaclip.train.comments import commented_yaml
from evaclip.train.config import TrainConfig, config_hash
from evaclip.train.overrides import dump_yaml, load_yaml, parse_assignment, resolve, validate
from evaclip.train.recipes import RECIPES, get_recipe, with_fitting_parts, with_own_evaluation
from evaclip.train.tasks.contrastive import MAX_LOG_SCALE
from evaclip.train.transform import training_transform
from evaclip.train.tree import differences, merge, nest

Make = Callable[..., TrainConfig]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.lrr=1", "'optim.lrr'; did you mean 'optim.lr'?"),
        ("optim.visual.layerdecay=1", "did you mean 'optim.visual.layer_decay'?"),
        ("bathc_size=8", "did you mean 'batch_size'?"),
        ("data.augmentation.sacle=1", "did you mean 'data.augmentation.scale'?"),
        ("eval.sets.val.data.trian=x", "did you mean 'eval.sets.val.data.train'?"),
        ("data.mixture.a.wieght=1", "did you mean 'data.mixture.a.weight'?"),
        ("checkpoint.qqqq=1", "checkpoint has: every_steps"),
        ("qqqqqqqq=1", "the configuration has: name"),
    ],
)
def test_unknown_keys_are_errors_with_the_nearest(run_config: Make, assignment: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(run_config(), [parse_assignment(assignment)])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("batch_size=-8", "batch_size=-8: input should be greater than 0"),
        ("optim.lr=fast", "optim.lr='fast': input should be a valid number"),
        ("optim.lr=.inf", "optim.lr=inf: input should be a finite number"),
        ("data.remote.cache_gb=.inf", "cache_gb=inf: input should be a finite number"),
        ("model.lock_image_unlocked_groups=2", "lock_image_unlocked_groups=2 needs lock_image=true"),
        ("model.lock_text_unlocked_layers=1", "lock_text_unlocked_layers=1 needs lock_text=true"),
        ("optim.name=sgd", "optim.name='sgd': must be adamw, lamb or timm/NAME"),
        ("optim.options={caution: true}", "options={'caution': True} needs name=timm/NAME, got name=adamw"),
        ("optim={name: timm/lion, stochastic_rounding: true}", "stochastic_rounding needs name=adamw or name=lamb"),
        ("name=../../x", "name='../../x': expected a folder inside of `output`; output=FOLDER puts runs elsewhere"),
        ("name=/tmp/x", "name='/tmp/x': expected a folder inside"),
        ("name=.", "name='.': expected a folder inside"),
        ("precision=fp8", "precision='fp8': input should be 'fp32', 'amp_bf16'"),
        ("optim.stochastic_rounding=true", "optim.stochastic_rounding needs precision=bf16, got precision=fp32"),
        ("loss={name: siglip, label_smoothing: 0.1}", "label_smoothing=0.1 needs name=clip"),
        ("parallel.offload=cpu", "offload=cpu needs mode=shard or hybrid"),
        ("parallel.mode=hybrid", "hybrid needs a shard_size"),
        ("parallel={mode: shard, shard_size: 2}", "no other mode has one"),
        ("ema_decay=1.0", "ema_decay=1.0: input should be less than 1"),
        ("accumulation=9", "batch_size=8 is less than accumulation=9"),
        ("schedule.epochs=2", "schedule: set either steps or epochs, and the other to null, got steps=6 and epochs=2"),
        ("schedule={steps: 9, warmup_steps: 2, warmup_share: 0.1}", "set either warmup_steps or warmup_share"),
        ("optim=5", "optim=5"),
        (
            "eval.sets.val.measure=[accuracy]",
            "input should be 'classify', 'retrieval', 'loss', 'linear_probe' or 'knn'",
        ),
        ("eval.sets={a/b: {}}", "string should match pattern"),
        ("data.train=null", "data.train=None: input should be a valid string"),
    ],
)
def test_wrong_values_name_key_and_accepted_values(run_config, assignment, message):
    with pytest.raises(UserError) as caught:
        resolve(run_config(), [parse_assignment(assignment)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named() -> None:
    with pytest.raises(UserError, match="batch_size is not set"):
        validate({"name": "x", "data": {}, "schedule": {"steps": 1}})


def test_later_changes_win_and_the_rest_stays(run_config: Make) -> None:
    config = resolve(run_config(), [nest("optim.lr", 1e-2), {"optim": {"lr": "5e-3", "eps": 1e-7}}])
    assert (config.optim.lr, config.optim.eps, config.batch_size) == (5e-3, 1e-7, 8)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.lr=1e-3", 1e-3),
        ("optim.lr=0.001", 1e-3),
        ("optim.visual.lr=null", None),
        ("name=123", "123"),
        ("log.every_steps=10", 10),
        ("checkpoint.allow_data_change=true", True),
    ],
)
def test_values_are_read_as_yaml(run_config: Make, text: str, expected: Any) -> None:
    value: Any = resolve(run_config(), [parse_assignment(text)])
    for key in text.partition("=")[0].split("."):
        value = getattr(value, key)
    assert value == expected


@pytest.mark.parametrize("text", ["optim.lr", "=3", "a=[1"])
def test_assignments_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UserError, match="--set"):
        parse_assignment(text)


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipe_batches_divide_by_their_parts(name):
    config = get_recipe(name)
    assert config.batch_size % config.data.canonical_nodes == 0
    if config.batch_size > 10_000:
        assert config.data.canonical_nodes * config.data.shuffle_window == 8 * config.batch_size


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_survive_yaml(name: str, tmp_path: Path) -> None:
    config = resolve(get_recipe(name), [nest("eval.sets.val.data.train", "a: b # c " * 30)])
    path = tmp_path / "config.yaml"
    for text in (dump_yaml(config), commented_yaml(config)):
        path.write_text(text)
        assert validate(load_yaml(path)) == config
    assert max(len(line) for line in text.splitlines() if line.lstrip().startswith("#")) <= 120


def test_comments_say_what_keys_mean_once(run_config: Make) -> None:
    text = commented_yaml(run_config("eval.sets.val.data={train: x}"))
    lines = text.splitlines()
    # Of what comes twice the first one.
    above = {line.strip(): before.strip() for before, line in reversed(list(pairwise(lines)))}
    assert above["batch_size: 8"] == "# Samples of one optimizer step, over all processes: the contrastive batch."
    assert above["optim:"] == "# The optimizer; the moments' defaults are those of the released EVA-CLIP models."
    assert above["hue: 0.0"].startswith("# largest shift of the hue")
    assert "# compute the last block of each tower only for the pooled token." in text
    assert text.count("# Batches that wait ready, over all workers; of small ones as many a worker.") == 1


def test_a_file_may_hold_some_keys(run_config: Make, tmp_path: Path) -> None:
    path = tmp_path / "part.yaml"
    path.write_text("optim:\n  lr: 0.5\n")
    assert resolve(run_config(), [load_yaml(path)]).optim.lr == 0.5
    path.write_text("")
    assert load_yaml(path) == {}


@pytest.mark.parametrize(
    ("content", "message"), [("- 1\n", "must hold keys and values"), ("a: [", "is not YAML"), (None, "No such file")]
)
def test_files_that_are_no_configuration(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message):
        load_yaml(path)


def test_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"unknown recipe 'eva02-b16'.*'eva02-b-16'"):
        get_recipe("eva02-b16")


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


def test_hash_tells_what_changes_the_weights(run_config: Make) -> None:
    same = run_config("log.every_steps=3", "name=other", "checkpoint.keep=9")
    assert config_hash(same) == config_hash(run_config())
    assert config_hash(run_config("optim.lr=2e-3")) != config_hash(run_config())
    assert config_hash(run_config("data.augmentation.hue=0.1")) != config_hash(run_config())
    assert config_hash(run_config("loss.products=tf32x3")) != config_hash(run_config())


def test_config_hash_ignores_the_feature_folder(run_config: Make) -> None:
    plain = config_hash(run_config(task="masked_image"))
    for same in ("cache=elsewhere", "cache_leaves_gb=1.0", "shard=true"):
        assert config_hash(run_config(f"task.teacher.{same}", task="masked_image")) == plain
    assert config_hash(run_config("task.teacher.precision=bf16", task="masked_image")) != plain


def test_own_data_drops_the_recipes_evaluation() -> None:
    tiny = get_recipe("tiny")
    mine = resolve(tiny, [nest("data.train", "mine")])
    found = with_own_evaluation(mine, tiny)
    assert (found.eval.sets, found.held_out) == (None, 0.05)
    assert with_own_evaluation(resolve(mine, [{"held_out": 0}]), tiny).held_out == 0
    other = with_own_evaluation(resolve(mine, [nest("eval.sets.val.data.train", "other")]), tiny)
    assert (list(other.eval.sets or {}), other.held_out) == (["val"], None)
    for kept in (tiny, resolve(mine, [nest("eval.sets.shapes.data.train", "other")]), get_recipe("finetune")):
        assert with_own_evaluation(kept, tiny) == kept


def test_own_batch_size_keeps_fitting_parts() -> None:
    recipe = get_recipe("eva02-b-16")
    assert recipe.data.canonical_nodes == 64
    for batch, nodes in ((131_072, 64), (1_000, 8), (7, 1)):
        mine = resolve(recipe, [{"batch_size": batch}])
        assert with_fitting_parts(mine, recipe).data.canonical_nodes == nodes
    own = resolve(recipe, [nest("data.canonical_nodes", 3), {"batch_size": 7}])
    assert with_fitting_parts(own, recipe) == own


def test_trees() -> None:
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": {"e": 4}}) == {"a": {"b": 3, "c": 2}, "d": {"e": 4}}
    assert merge({"a": None}, {"a": {"b": 1}}) == {"a": {"b": 1}}
    lines = differences({"a": {"b": 1}, "c": 1}, {"a": {"b": 2}, "c": 1, "d": 0})
    assert lines == ["a.b: 1 -> 2", "d: None -> 0"]


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


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "nowhere:Transform",
            r"data.transform='nowhere:Transform' isn't there: No module named 'nowhere'; expected MOD",
        ),
        ("evaclip.transforms:Nothing", r"isn't there: .*Nothing.*; expected MODULE:NAME.* in a folder of PYTHONPATH"),
        ("no name", r"data.transform='no name' isn't there: invalid format"),
        ("evaclip.transforms", r"data.transform='evaclip.transforms' is a module; expected MODULE:CLASS"),
    ],
)
def test_a_transform_that_is_not_there(name: str, message: str, run_config: Make) -> None:
    data = run_config(f"data.transform={name}").data
    with pytest.raises(UserError, match=message):
        training_transform(data, 4, Preprocess())
