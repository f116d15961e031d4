"""Evaluation while training and at its end, also on several ranks; it never ends a run."""

import json
import math
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from image_files import as_file
from PIL import Image
from processes import in_processes
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from trained_runs import assert_equal, checkpoint, evaluations, steps, weights

from evaclip.data import open_source
from evaclip.data.shard_writer import write_shard
from evaclip.data.validation import hold_out
from evaclip.errors import UserError
from evaclip.eval import probes
from evaclip.eval.retrieval import encode_pairs
from evaclip.eval.runs import Setting, run_retrieval, run_zero_shot
from evaclip.loading import load_model
from evaclip.model.clip import CLIP
from evaclip.runs.files import EVENTS_FILE
from evaclip.runs.log import read_log
from evaclip.train import evaluation
from evaclip.train.config import TrainConfig
from evaclip.train.distributed import connect
from evaclip.train.evaluation import DistributedEncoder
from evaclip.train.saver import Saver
from evaclip.train.tasks import contrastive
from evaclip.train.trainer import train
from evaclip.transforms import PackedTransform

Make = Callable[..., TrainConfig]
EVAL = "eval={sets: {val: {data: {num_samples: 40, workers: 0}}}, every_steps: 3, batch_size: 4}"


def picture(number: int) -> bytes:
    return as_file(Image.new("RGB", (16 + 16 * (number % 3), 16), (20 * number, 250 - 20 * number, 7)))


def test_validation_split_survives_a_resume(run_config, capsys):
    """40 samples, 10 of which are held out: an epoch is 30 samples, and the third step of 8 ends none."""
    config = ("validation_split=0.25", "eval.every_epochs=1", "schedule.steps=8")
    outcome = train(run_config(*config, "checkpoint.every_steps=3"))
    assert "validation_split=0.25 of 40 samples: 10 are never trained on" in capsys.readouterr().out
    assert list(evaluations(outcome.folder)) == [4, 8]
    assert outcome.metrics["held_out/samples"] == 10
    recalls = {f"held_out/{way}_r{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5)}
    assert {"held_out/loss", *recalls} < outcome.metrics.keys()
    (checkpoint(outcome.folder, 8) / "state.pt").unlink()
    resumed = train(run_config(*config), resume="auto")
    assert resumed.metrics == outcome.metrics
    with pytest.raises(UserError, match="not what the checkpoint was trained on"):
        train(run_config(*config, "validation_split=0.3"), resume="auto")


def test_finished_run_evaluates_new_sets_only(run_config: Make, capsys: Any) -> None:
    config = run_config("validation_split=0.25", "name=a run")
    outcome = train(config)
    before = {path: path.stat().st_mtime_ns for path in outcome.folder.rglob("*")}
    capsys.readouterr()
    assert train(config, resume="auto") == outcome
    assert f"the run is finished: the model is {checkpoint(outcome.folder)}" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in outcome.folder.rglob("*")} == before
    more = train(run_config("validation_split=0.25", "name=a run", "eval.sets.few={samples: 4}"), resume="auto")
    assert {name.partition("/")[0] for name in more.metrics} == {"held_out", "few"}


@pytest.mark.parametrize("resize", ["null", "native"])
def test_a_run_measures_what_the_command_measures(run_config: Make, tmp_path: Path, resize: str) -> None:
    """Two captions a picture, a picture in two samples, and one that can't be read."""
    samples = [
        (
            f"{number:03d}",
            {"png": picture(number), "json": json.dumps({"text": [f"a {number}", f"b {number}"]}).encode()},
        )
        for number in range(12)
    ]
    samples += [
        ("x", {"png": picture(3), "json": b'{"text": ["c 3"]}'}),
        ("y", {"png": b"?", "json": b'{"text": "d"}'}),
    ]
    write_shard(tmp_path / "eval.tar", samples)
    data = {"train": str(tmp_path / "eval.tar"), "caption_key": "json:text", "workers": 0}
    outcome = train(run_config(f"data.resize={resize}", f"eval.sets.val.data={json.dumps(data)}"))
    source = open_source(data["train"], caption_key="json:text")
    loaded = load_model(str(outcome.folder))
    assert isinstance(loaded.transform, PackedTransform) == (resize == "native")
    setting = Setting(loaded, data["train"], source, "title")
    measured, _ = run_retrieval(setting)
    zero_shot = run_zero_shot(setting, None, ("{}",))
    for direction in ("image_to_text", "text_to_image"):
        for k in (1, 5):
            assert outcome.metrics[f"val/{direction}_r{k}"] == measured.metrics[direction]["recall"][str(k)]
    assert outcome.metrics["val/zero_shot_top1"] == zero_shot.metrics["top1"]
    assert (outcome.metrics["val/samples"], outcome.metrics["val/unreadable"]) == (13, 1)
    assert (measured.metrics["images"], measured.metrics["captions"]) == (12, 25)


@pytest.mark.parametrize("readable", [0, 6])
def test_what_cannot_be_read_is_no_result_and_no_end(run_config, tmp_path, capsys, readable):
    """Of 8 samples all are damaged, or 2."""
    pictures = [picture(number) if number < readable else b"?" for number in range(8)]
    samples = [(f"{n}", {"png": data, "txt": f"a {n}".encode()}) for n, data in enumerate(pictures)]
    write_shard(tmp_path / "eval.tar", samples)
    evaluation = f"eval={{every_steps: 3, sets: {{val: {{data: {{train: {tmp_path}/eval.tar, workers: 0}}}}}}}}"
    outcome = train(run_config(evaluation))
    assert outcome.steps == 6
    assert all(math.isnan(value) for value in outcome.metrics.values())
    assert [found["val/zero_shot_top1"] for found in evaluations(outcome.folder).values()] == [None, None]
    told = capsys.readouterr().out
    assert told.count(f"not evaluated on val: {8 - readable} of the 8 samples of ") == 2
    assert "eval.sets.val.allow_unreadable=true measures the rest all the same" in told
    allowed = train(run_config(evaluation, "eval.sets.val.allow_unreadable=true"), overwrite=True)
    if readable:
        assert (allowed.metrics["val/samples"], allowed.metrics["val/unreadable"]) == (6, 2)
    else:
        assert math.isnan(allowed.metrics["val/zero_shot_top1"])
        assert "not evaluated on val: none of the 8 samples of" in capsys.readouterr().out


def class_folders(folder: Path) -> str:
    """Two pictures in each of three folders, whose names are no class names."""
    for number in range(6):
        path = folder / f"n0{number // 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(2 * number))
    return str(folder)


def test_set_of_other_classes_is_refused_before_training(run_config: Make, tmp_path: Path) -> None:
    sets = {"val": {"data": {"train": class_folders(tmp_path / "folders"), "workers": 0}, "classes": ["red", "blue"]}}
    config = run_config(f"eval.sets={json.dumps(sets)}")
    with pytest.raises(UserError, match=r"eval\.sets\.val\.classes: .*2 class names for 3 folders"):
        train(config)
    assert not list(Path(config.output).rglob("checkpoints"))


def test_any_number_of_sets_by_name(run_config: Make, tmp_path: Path) -> None:
    """Class folders, the same in a shard by number, a held-out part by its loss alone, and one that is no set of it."""
    folder, shard = class_folders(tmp_path / "folders"), tmp_path / "labels.tar"
    write_shard(shard, [(f"{n}", {"png": picture(2 * n), "cls": b"%d" % (n // 2)}) for n in range(6)])
    prompts = {"classes": ["red", "green", "blue"], "templates": ["a {} thing", "the {}"]}
    sets: dict[str, Any] = {
        "folders": {"data": {"train": folder, "workers": 0}, **prompts},
        "shard": {"data": {"train": str(shard), "caption_key": "cls", "workers": 0}, **prompts},
        "named": {"data": {"train": folder, "caption_template": "one {}", "workers": 0}},
        "held_out": {"metrics": ["loss"]},
        "wrong": {"data": {"train": str(shard), "caption_key": "cls", "workers": 0}, "classes": ["red"]},
        "left-out": None,
    }
    outcome = train(run_config(f"eval.sets={json.dumps(sets)}", "validation_split=0.2", "loss.label_smoothing=0.2"))
    metrics = outcome.metrics
    setting = Setting(load_model(str(outcome.folder)), folder, open_source(folder, caption_template="{}"), "title")
    for name, classes, templates in (
        ("folders", prompts["classes"], prompts["templates"]),
        ("shard", prompts["classes"], prompts["templates"]),
        ("named", None, ["one {}"]),
    ):
        expected = run_zero_shot(setting, classes, templates).metrics
        assert metrics[f"{name}/zero_shot_top1"] == expected["top1"]
        assert metrics[f"{name}/classes"] == 3
    loaded = setting.loaded
    _, held_out = hold_out(open_source("synthetic", num_samples=40), 0.2, 0)
    pairs = encode_pairs(loaded.model, loaded.tokenizer, loaded.transform, held_out)
    logits = loaded.model.logit_scale.exp() * pairs.image_features @ pairs.text_features.T
    pair = torch.arange(len(logits))
    loss = (cross_entropy(logits, pair) + cross_entropy(logits.T, pair)) / 2
    assert metrics["held_out/loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert {key for key in metrics if "held" in key} == {f"held_out/{k}" for k in ("samples", "unreadable", "loss")}
    assert math.isnan(metrics["wrong/zero_shot_top1"])
    assert not any("left-out" in key for key in metrics)


@pytest.mark.parametrize("parallel", ["replicate", "{mode: shard, offload: cpu}"])
def test_evaluation_with_nan_features_is_one_line(run_config, monkeypatch, capsys, parallel):
    original = CLIP.encode_image

    def encode_image(self: CLIP, *args: Any, **options: Any) -> Tensor:
        features = original(self, *args, **options)
        return features if self.training else features.where(torch.arange(len(features))[:, None] > 0, math.nan)

    mode = f"parallel={parallel}" if "{" in parallel else f"parallel.mode={parallel}"
    straight = train(run_config("name=straight", mode, "ema_decay=0.9"))
    monkeypatch.setattr(CLIP, "encode_image", encode_image)
    outcome = train(run_config(EVAL, mode, "ema_decay=0.9"))
    assert [found["val/zero_shot_top1"] for found in evaluations(outcome.folder).values()] == [None, None]
    told = [event.get("message", "") for event in read_log(outcome.folder / EVENTS_FILE)]
    assert [line for line in told if "NaN or infinity for 10 of 40 images" in line] == told[1:3]
    assert_equal(weights(outcome.folder), weights(straight.folder))


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("fault", ["worker", "disk"])
@pytest.mark.parametrize("mode", ["replicate", pytest.param("shard", marks=pytest.mark.exhaustive)])
def test_a_failure_of_one_process_costs_a_line_in_all(run_config: Make, fault: str, mode: str) -> None:
    """The second one loses a data worker in the midst of a batch, or can't read, in the first of two evaluations."""
    config = run_config(EVAL.replace("workers: 0", "workers: 1"), f"parallel.mode={mode}")
    in_processes(2, train_with_a_fault, config, fault)
    folder = Path(config.output) / config.name
    assert [found["val/zero_shot_top1"] is None for found in evaluations(folder).values()] == [True, False]
    told = [event.get("message", "") for event in read_log(folder / EVENTS_FILE)]
    (line,) = (text for text in told if text.startswith("not evaluated on val: "))
    assert re.search("data worker 0 .* was killed by SIGKILL" if fault == "worker" else "OSError: .*no such disk", line)


@pytest.mark.xdist_group("processes")
def test_ranks_share_the_ranking(run_config: Make, tmp_path: Path) -> None:
    still = ("optim={lr: 0, weight_decay: 0}", "schedule.steps=1", EVAL)
    write_scores(run_config(*still, "name=one"), tmp_path)
    in_processes(2, write_scores, run_config(*still, "name=two"), tmp_path)
    (scores, metrics), *ranks = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one-0", "two-0", "two-1")
    )
    assert sum(count for count, _ in ranks) == scores
    assert all(0.3 < count / scores < 0.7 for count, _ in ranks)
    assert {"val/zero_shot_top1", "val/image_to_text_r1"} < metrics.keys()
    assert [found for _, found in ranks] == [metrics, metrics]


@pytest.mark.parametrize("step", [3, 6])
def test_a_signal_stops_an_evaluation_between_batches(run_config: Make, trained: Path, step: int) -> None:
    """During an evaluation in between, and that of the end; what is to be saved is saved before."""
    due = EVAL.replace("every_steps: 3", f"every_steps: {step}")
    saving = f"checkpoint.every_steps={'3' if step == 3 else 'null'}"
    config = run_config(due, saving, "ema_decay=0.9", "name=stopped")

    def stop() -> None:
        assert start.call_count == 1
        os.kill(os.getpid(), signal.SIGTERM)

    with (
        patch.object(Saver, "start", autospec=True, side_effect=Saver.start) as start,
        counting_batches(stop) as batches,
    ):
        outcome = train(config)
    assert (outcome.stopped_by, outcome.steps, batches) == (143, step, [4])
    assert (steps(outcome.folder), evaluations(outcome.folder)) == ([step], {})
    resumed = train(config, resume="auto")
    assert (resumed.stopped_by, resumed.steps) == (None, 6)
    for file in ("model", "ema"):
        assert_equal(weights(resumed.folder, file=file), weights(trained, file=file))


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("mode", ["replicate", pytest.param("shard", marks=pytest.mark.exhaustive)])
def test_processes_stop_an_evaluation_together(run_config: Make, mode: str) -> None:
    """Two have 5 and 6 batches each; the signal reaches the second alone, in its last one."""
    config = run_config(EVAL.replace("40", "11").replace("batch_size: 4", "batch_size: 1"), f"parallel.mode={mode}")
    in_processes(2, train_and_stop, config)
    folder = Path(config.output) / config.name
    assert (steps(folder), evaluations(folder)) == ([3], {})


@contextmanager
def counting_batches(act: Callable[[], None], at: int = 1) -> Iterator[list[int]]:
    """Yields the sizes of the pictures' batches of evaluations, and acts in the one of this number."""
    original, sizes = CLIP.encode_image, list[int]()

    def encode_image(self: CLIP, images: Tensor, *args: Any, **options: Any) -> Tensor:
        if not self.training:
            sizes.append(len(images))
            if len(sizes) == at:
                act()
        return original(self, images, *args, **options)

    with patch.object(CLIP, "encode_image", encode_image):
        yield sizes


class _Scores(TorchDispatchMode):
    """Counts the scores in float64, in which evaluations rank."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.mm.default and args[0].dtype == torch.float64:
            self.count += len(args[0]) * args[1].shape[1]
        return func(*args, **(kwargs or {}))


def write_scores(config: TrainConfig, folder: Path) -> None:
    """The number of scores that this rank computes in one evaluation, and the metrics."""
    scores, original = _Scores(), contrastive.measured

    def call(*args: Any) -> Any:
        with scores:
            return original(*args)

    with patch.object(contrastive, "measured", call), patch.object(evaluation, "_BLOCK", 8, create=True):
        metrics = train(config).metrics
    (folder / f"{config.name}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps([scores.count, metrics]))


def train_and_stop(config: TrainConfig) -> None:
    """Train on one of two ranks; the second gets SIGTERM in its last batch of the first evaluation."""
    is_second = os.environ["RANK"] == "1"
    with counting_batches(lambda: os.kill(os.getpid(), signal.SIGTERM), at=6 if is_second else -1):
        outcome = train(config)
    assert (outcome.stopped_by, outcome.steps) == (143, 3)


def train_with_a_fault(config: TrainConfig, fault: str) -> None:
    """One of two processes, of which the second loses its data worker or disk after the first evaluation's first read.

    Not within the model: where that is cut up, the others would wait there.
    """
    original, calls = DistributedEncoder.encode_image, list[int]()

    def encode_image(self: DistributedEncoder, images: Tensor, normalize: bool = False) -> Tensor:
        calls.append(len(images))
        if len(calls) == 1 and os.environ["RANK"] == "1":
            if fault == "disk":
                raise OSError("no such disk")
            for worker in active_children():
                worker.kill()
        return original(self, images, normalize)

    with patch.object(DistributedEncoder, "encode_image", encode_image):
        assert train(config).steps == 6


CLASSES = 4


class NoModel(nn.Module):
    """Is asked for nothing."""

    config = SimpleNamespace(image_shape=(8, 8))


def drawn(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of few directions, so that many neighbours are equally near."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    return torch.eye(CLASSES)[labels] + torch.randint(-1, 2, (samples, CLASSES), generator=generator), labels


def measured(**how: Any) -> list[dict[str, Any]]:
    train, test = drawn(150, 0), drawn(77, 1)
    both = [measure(train, test, classes=CLASSES, **how) for measure in (probes.knn, probes.linear_probe)]
    return [result.to_dict() for result in both]


def write_measured(path: Path) -> None:
    """What a process finds, and how many blocks of queries and fits it had, in all of them."""
    places = patch.object(probes, "top_items", wraps=probes.top_items)
    fit = patch.object(probes, "_fit", wraps=probes._fit)
    with closing(connect("cpu")) as world, patch.object(probes, "_QUERIES", 16), places as votes, fit as fits:
        found = measured(over=DistributedEncoder(NoModel(), world, None, lambda: False).over)
        everywhere = world.gather_everywhere((found, votes.call_count, fits.call_count))
        if world.is_main:
            path.write_text(json.dumps(everywhere))


@pytest.mark.xdist_group("processes")
def test_probes_on_ranks_equal_one_process(tmp_path: Path) -> None:
    in_processes(3, write_measured, tmp_path / "found.json")
    found, votes, fits = zip(*json.loads((tmp_path / "found.json").read_text()), strict=True)
    assert all(each == measured() for each in found)
    # Five blocks of queries; seven strengths, and the best of them once more.
    assert (sum(votes), sum(fits)) == (5, 8)
    assert max(votes) - min(votes) <= 1
    assert max(fits) <= 5
