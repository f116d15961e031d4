"""The spellings of other trainers."""

import ast
from functools import reduce
from importlib import metadata
from pathlib import Path

import pytest

from evaclip import create_model
from evaclip.commands.main import build_parser, main
from evaclip.errors import UserError
from evaclip.train import aliases
from evaclip.train.config import TrainConfig
from evaclip.train.overrides import in_layers, resolve
from evaclip.train.recipes import get_recipe
from evaclip.train.tree import Tree, merge


def apply(*arguments: str, accumulation: int = 1, processes: int = 1) -> TrainConfig:
    given = vars(build_parser().parse_args(["train", "tiny", *arguments]))
    changes = aliases.changes(given, accumulation, processes)
    recipe = get_recipe("tiny")
    return resolve(recipe, in_layers([changes], recipe))


def test_an_open_clip_command_line() -> None:
    config = apply(
        *("--train-data", "shards/{000..009}.tar", "--dataset-type", "webdataset", "--train-num-samples", "1000000"),
        *("--epochs", "32", "--warmup", "2000", "--lr", "1e-3", "--wd", "0.2", "--beta1", "0.8", "--beta2", "0.95"),
        *("--eps", "1e-8", "--grad-clip-norm", "1.0", "--precision", "amp_bfloat16", "--workers", "6"),
        *("--model", "EVA02-B-16", "--pretrained", "w.pt", "--force-patch-dropout", "0.5", "--grad-checkpointing"),
        *("--name", "n", "--logs", "out", "--seed", "3", "--save-frequency", "2", "--siglip"),
        *("--lr-scheduler", "const"),
        *("--csv-img-key", "i", "--csv-caption-key", "c", "--csv-separator", ",", "--log-every-n-steps", "7"),
        *("--max-image-pixels", "1000000", "--opt", "lamb", "--visual-lr", "4e-4", "--text-ld", "0.75"),
    )
    assert config.data.train == "shards/{000..009}.tar"
    assert (config.data.kind, config.data.workers) == ("webdataset", 6)
    assert config.data.max_image_pixels == 1_000_000
    assert (config.data.image_key, config.data.caption_key, config.data.csv_separator) == ("i", "c", ",")
    schedule = config.schedule
    assert (schedule.epochs, schedule.steps, schedule.epoch_samples) == (32, None, 1_000_000)
    assert (schedule.warmup_steps, schedule.name) == (2000, "constant")
    optim = config.optim
    assert (optim.lr, optim.weight_decay, optim.beta1, optim.beta2, optim.eps) == (1e-3, 0.2, 0.8, 0.95, 1e-8)
    assert (optim.name, optim.visual.lr, optim.text.layer_decay, optim.grad_clip_norm) == ("lamb", 4e-4, 0.75, 1.0)
    assert (config.precision, config.loss.name, config.seed) == ("amp_bf16", "siglip", 3)
    model = config.model
    assert (model.name, model.pretrained, model.patch_dropout) == ("EVA02-B-16", "w.pt", 0.5)
    assert model.savings.recompute == "block"
    assert (config.name, config.output) == ("n", "out")
    assert (config.checkpoint.every_epochs, config.log.every_steps) == (2, 7)


def test_batch_size_counts_one_chunk_of_one_process() -> None:
    assert apply("--batch-size", "64", processes=8).batch_size == 512
    assert apply("--batch-size", "64", "--accum-freq", "4", processes=2).batch_size == 512
    assert apply("--batch-size", "64", accumulation=2).batch_size == 128


def changed(*arguments: str) -> Tree:
    """All that flags change, as one tree."""
    given = vars(build_parser().parse_args(["train", "tiny", *arguments]))
    return reduce(merge, aliases.changes(given, 1, 1), {})


@pytest.mark.parametrize("flag", aliases.FLAGS)
def test_flags_set_known_keys(flag: str) -> None:
    value = {"--opt-kwargs": "caution=true", "--report-to": "wandb"}.get(flag, "1")
    tree = changed(flag, *([value] if "{}" in aliases.FLAGS[flag] else []))
    assert bool(tree) == bool(aliases.FLAGS[flag])
    try:
        resolve(get_recipe("tiny"), [tree])
        problem = ""
    except UserError as exc:  # of a value, such as a schedule of the name "1"
        problem = str(exc)
    assert "unknown configuration key" not in problem


def open_clip_options() -> dict[str, ast.Call]:
    """All options of open_clip's trainer, as its file tells them: to run it takes packages that nothing else needs."""
    path = metadata.distribution("open_clip_torch").locate_file("open_clip_train/params.py")
    calls = [node for node in ast.walk(ast.parse(Path(str(path)).read_text("utf-8"))) if isinstance(node, ast.Call)]
    added = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"]
    return {ast.literal_eval(call.args[0]): call for call in added}


def test_open_clip_options_are_accepted_or_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    options, parser = open_clip_options(), build_parser()
    assert len(options) > 80
    for flag, call in options.items():
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        is_switch = "action" in keywords and ast.unparse(keywords["action"]) == "'store_true'"
        # There a switch that fetches weights of ImageNet, in the authors' scripts and here the weights themselves.
        value = [] if is_switch and flag != "--pretrained-image" else ["1"]
        if flag in aliases.INSTEAD:
            with pytest.raises(SystemExit):
                main(["train", "tiny", flag, *value])
            assert f"unrecognized arguments: {flag}; instead: " in capsys.readouterr().err
        else:
            assert parser.parse_args(["train", "tiny", flag, *value]).recipe == "tiny", flag


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--val-data", "v.csv", "--csv-img-key", "i", "--val-num-samples", "9"],
            {
                "data": {"image_key": "i"},
                "validation_split": None,
                "eval": {"sets": {"val": {"data": {"train": "v.csv", "image_key": "i"}, "samples": "9"}}},
            },
        ),
        (["--imagenet-val", "a"], {"eval": {"sets": {"imagenet": {"data": {"train": "a"}, "classes": "imagenet"}}}}),
        (["--zeroshot-frequency", "0"], {"eval": {"every_epochs": None}}),
        (
            ["--report-to", "wandb", "--wandb-project-name", "mine"],
            {"log": {"tensorboard": False, "wandb": {"project": "mine"}}},
        ),
        (["--pretrained", "EVA02-B-16:w.pt"], {"model": {"name": "EVA02-B-16", "pretrained": "w.pt"}}),
        (["--pretrained", ""], {"model": {"pretrained": None}}),
        (["--force-image-size", "64", "96"], {"model": {"options": {"vision": {"image_size": [64, 96]}}}}),
        (["--torchcompile"], {"compile": "blocks"}),
        (
            ["--opt", "timm/adopt", "--momentum", "0.8", "--opt-kwargs", "caution=true", "clip_exp=0.25"],
            {"optim": {"name": "timm/adopt", "options": {"momentum": 0.8, "caution": True, "clip_exp": 0.25}}},
        ),
        (["--delete-previous-checkpoint"], {"checkpoint": {"keep": 1}}),
    ],
)
def test_what_flags_change(arguments: list[str], expected: Tree) -> None:
    assert changed(*arguments) == expected


def test_values_reach_the_model() -> None:
    options = apply(
        "--force-image-size", "64", "--force-context-length", "9", "--image-mean", "0", "0.5", "1"
    ).model.options
    model = create_model("tiny", device="meta", **options)
    assert model.config.vision.image_size == 64
    assert model.context_length == 9
    assert model.config.preprocess.mean == (0.0, 0.5, 1.0)


def test_a_tracker_that_does_not_exist_is_named() -> None:
    with pytest.raises(UserError, match="unknown --report-to 'wandbb'; did you mean 'wandb'"):
        changed("--report-to", "wandbb")


def test_two_spellings_of_one_key_have_one_value() -> None:
    assert apply("--val-frequency", "2", "--zeroshot-frequency", "2").eval.every_epochs == 2
    with pytest.raises(
        UserError, match=r"eval\.every_epochs must have one value, got 1 and, by --zeroshot-frequency, 0"
    ):
        apply("--val-frequency", "1", "--zeroshot-frequency", "0")
