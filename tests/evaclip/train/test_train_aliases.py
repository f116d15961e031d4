"""The spellings of other trainers."""

import operator
from functools import reduce

import pytest

from evaclip.commands.main import build_parser
from evaclip.errors import UserError
from evaclip.train import aliases
from evaclip.train.config import TrainConfig, to_tree
from evaclip.train.overrides import resolve
from evaclip.train.recipes import get_recipe


def apply(*arguments: str, accumulation: int = 1, processes: int = 1) -> TrainConfig:
    given = vars(build_parser().parse_args(["train", "tiny", *arguments]))
    changes = aliases.changes(given, accumulation, processes)
    return resolve(get_recipe("tiny"), changes)


def test_an_open_clip_command_line() -> None:
    config = apply(
        *("--train-data", "shards/{000..009}.tar", "--dataset-type", "webdataset", "--train-num-samples", "1000000"),
        *("--epochs", "32", "--warmup", "2000", "--lr", "1e-3", "--wd", "0.2", "--beta1", "0.8", "--beta2", "0.95"),
        *("--eps", "1e-8", "--grad-clip-norm", "1.0", "--precision", "amp_bfloat16", "--workers", "6"),
        *("--model", "EVA02-B-16", "--pretrained", "w.pt", "--force-patch-dropout", "0.5", "--grad-checkpointing"),
        *("--name", "n", "--logs", "out", "--seed", "3", "--save-frequency", "2", "--siglip"),
        *("--lr-scheduler", "const"),
        *("--csv-img-key", "i", "--csv-caption-key", "c", "--csv-separator", ",", "--log-every-n-steps", "7"),
    )
    assert config.data.train == "shards/{000..009}.tar"
    assert (config.data.kind, config.data.workers) == ("webdataset", 6)
    assert (config.data.image_key, config.data.caption_key, config.data.csv_separator) == ("i", "c", ",")
    schedule = config.schedule
    assert (schedule.epochs, schedule.steps, schedule.epoch_samples) == (32, None, 1_000_000)
    assert (schedule.warmup_steps, schedule.name) == (2000, "constant")
    optim = config.optim
    assert (optim.lr, optim.weight_decay, optim.beta1, optim.beta2, optim.eps) == (1e-3, 0.2, 0.8, 0.95, 1e-8)
    assert optim.grad_clip_norm == 1.0
    assert (config.precision, config.loss.name, config.seed) == ("amp_bf16", "siglip", 3)
    model = config.model
    assert (model.name, model.pretrained, model.patch_dropout) == ("EVA02-B-16", "w.pt", 0.5)
    assert model.savings.recompute == "block"
    assert (config.name, config.output) == ("n", "out")
    assert (config.checkpoint.every_epochs, config.log.every_steps) == (2, 7)


def test_tower_rates() -> None:
    optim = apply(
        "--opt", "lamb", "--visual-lr", "4e-4", "--text-lr", "4e-5", "--visual-ld", "0.85", "--text-ld", "0.75"
    ).optim  # fmt: skip
    assert (optim.name, optim.visual.lr, optim.text.lr) == ("lamb", 4e-4, 4e-5)
    assert (optim.visual.layer_decay, optim.text.layer_decay) == (0.85, 0.75)


@pytest.mark.parametrize(
    ("arguments", "accumulation", "processes", "expected"),
    [
        (["--batch-size", "64"], 1, 1, 64),
        (["--batch-size", "64"], 1, 8, 512),
        (["--batch-size", "64", "--accum-freq", "4"], 1, 2, 512),
        (["--batch-size", "64"], 2, 1, 128),
    ],
)
def test_batch_size_counts_one_chunk_of_one_process(
    arguments: list[str], accumulation: int, processes: int, expected: int
) -> None:
    assert apply(*arguments, accumulation=accumulation, processes=processes).batch_size == expected


@pytest.mark.parametrize("value", ["-1", "many", "0"])
def test_a_bad_batch_size_is_refused(value: str) -> None:
    with pytest.raises(UserError, match=f"batch_size='?{value}"):
        apply("--batch-size", value)


def test_what_is_always_so_is_accepted_and_explained() -> None:
    assert apply("--local-loss", "--gather-with-grad") == get_recipe("tiny")
    notes = aliases.notes({"--local-loss": True})
    assert len(notes) == 1
    assert notes[0].startswith("--local-loss: the loss here is always")


def test_every_alias_names_an_existing_key() -> None:
    tree = to_tree(get_recipe("tiny"))
    for alias in aliases.ALIASES:
        if alias.key is not None:
            *parents, key = alias.key.split(".")
            assert key in reduce(operator.getitem, parents, tree), alias.flag
