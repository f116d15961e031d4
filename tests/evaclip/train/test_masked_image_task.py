"""Masked image modelling in the trainer: its teacher, the cache, what is measured, and where the weights go."""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from image_files import write_class_folders
from PIL import Image
from processes import in_processes
from safetensors.torch import load_file, save_file
from sharded_run import train_all
from small_tasks import OPTIONS
from torch import Tensor
from trained_runs import assert_equal, checkpoint, column, evaluations, weights

from evaclip import create_model, create_vision_model
from evaclip.data.shard_writer import write_shard
from evaclip.data.synthetic import SyntheticSource
from evaclip.errors import UserError
from evaclip.factory import create_masked_image_model
from evaclip.loading import load_features
from evaclip.model.config import Preprocess
from evaclip.model.flops import masked_image_flops, vision_flops
from evaclip.model.vision_names import vision_config
from evaclip.train.config import MaskedImageTask, TeacherConfig, TrainConfig
from evaclip.train.tasks.teacher import FeatureCache, Teacher
from evaclip.train.trainer import train
from evaclip.weights.convert import convert

Make = Callable[..., TrainConfig]
SAME = Preprocess()


def small_teacher(own: Preprocess = SAME, students: Preprocess = SAME, **how: Any) -> Teacher:
    torch.manual_seed(0)
    tower = create_model("tiny", **OPTIONS).visual
    return Teacher(tower, own, students, **how)


def test_the_teacher_sees_its_own_normalisation() -> None:
    levels = torch.randint(256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0)) / 255
    other = Preprocess(mean=(0.2, 0.3, 0.4), std=(0.5, 0.6, 0.7))

    def normalised(kind: Preprocess) -> Tensor:
        mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (kind.mean, kind.std))
        return (levels - mean) / std

    expected = small_teacher()(normalised(SAME), (4, 4))
    found = small_teacher(SAME, other)(normalised(other), (4, 4))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-8)
    assert not torch.allclose(small_teacher()(normalised(other), (4, 4)), expected, rtol=1e-2)


def test_the_teacher_sees_images_of_its_own_size() -> None:
    """Whose patches are as many as the student's; resized as Pillow resizes pictures."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    resized = [
        [torch.from_numpy(np.array(Image.fromarray(plane.numpy()).resize((16, 16), Image.BICUBIC))) for plane in image]
        for image in images
    ]
    expected = small_teacher()(torch.stack([torch.stack(planes) for planes in resized]), (4, 4))
    torch.testing.assert_close(small_teacher()(images, (4, 4)), expected, rtol=1e-3, atol=1e-7)


def test_teacher_has_its_own_precision() -> None:
    teacher = small_teacher()
    teacher.tower.bfloat16()
    with torch.autocast("cpu", dtype=torch.float16):
        features = teacher(torch.rand(1, 3, 16, 16), (4, 4))
    assert features.dtype == torch.bfloat16
    assert not features.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.tower.parameters())


class Counting:
    """Computes features of a kind, and counts how many."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        self.images += len(images)
        return (images.mean((1, 2, 3), keepdim=True).flatten(2) * torch.arange(12.0).reshape(4, 3)).bfloat16()


def test_the_cache_knows_pixels_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images = torch.rand(3, 3, 8, 8)
    cache, compute = FeatureCache(tmp_path, 0.0), Counting()
    first = cache(images, (2, 2), compute)
    again = FeatureCache(tmp_path, 0.0)(images.flip(0), (2, 2), compute)
    assert torch.equal(again.flip(0), first)
    assert compute.images == 3
    # One pixel, in its last bit. Where one is missing all are computed.
    changed = images.clone()
    changed[1, 2, 7, 7] = torch.nextafter(changed[1, 2, 7, 7], torch.tensor(2.0))
    cache(changed, (2, 2), compute)
    assert compute.images == 6
    damaged = next(tmp_path.rglob("*2x2.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:50])
    assert torch.equal(cache(images, (2, 2), compute), first)
    full, before = FeatureCache(tmp_path, 1e9), len(list(tmp_path.rglob("*")))
    with caplog.at_level(logging.WARNING):
        full(torch.rand(3, 3, 8, 8), (2, 2), compute)
    assert caplog.text.count("no more features are cached") == 1
    assert len(list(tmp_path.rglob("*"))) == before


def test_another_teacher_is_refused_unless_allowed(run_config: Make, tmp_path: Path, capsys: Any) -> None:
    """Whether its file was replaced or another one is named; the same weights may lie elsewhere."""
    file, state = tmp_path / "teacher.safetensors", create_model("tiny", **OPTIONS).state_dict()
    save_file(state, file)

    def go_on(*changes: str, resume: str = "auto") -> dict[str, Tensor]:
        given = ["schedule.steps=4", "checkpoint.every_steps=2", f"task.teacher.pretrained={file}", *changes]
        return weights(train(run_config(*given, task="masked_image"), resume=resume).folder, 4)

    straight, halfway = go_on(resume="none"), str(tmp_path / "run/checkpoints/step_00000002")
    moved = file.rename(tmp_path / "moved.safetensors")
    assert_equal(go_on(f"task.teacher.pretrained={moved}", resume=halfway), straight)
    assert "changed since the checkpoint: task.teacher.pretrained" in capsys.readouterr().out
    save_file({name: value * 1.01 for name, value in state.items()}, file)
    with pytest.raises(UserError, match=r"the teacher is not the one .* \(weights: \w+ -> \w+\).*allow_teacher_change"):
        go_on(resume=halfway)
    with pytest.raises(UserError, match=r"weights: .*precision: fp32 -> bf16"):
        go_on(f"task.teacher={{pretrained: {moved}, precision: bf16}}", resume=halfway)
    changed = go_on("checkpoint.allow_teacher_change=true", resume=halfway)
    assert not torch.equal(changed["lm_head.weight"], straight["lm_head.weight"])
    assert re.search(r"the teacher is not the one .* was trained with \(weights", capsys.readouterr().out)


FIXED = "data.augmentation={scale: [1.0, 1.0], ratio: [1.0, 1.0]}"


def test_a_run_with_a_cache_is_the_same_run(run_config: Make, tmp_path: Path) -> None:
    common = [FIXED, "schedule.steps=8", "data.num_samples=16"]  # two batches an epoch
    plain = train(run_config(*common, "name=plain", task="masked_image")).folder
    cached = [*common, f"task.teacher.cache={tmp_path / 'cache'}"]
    kept = train(run_config(*cached, "name=kept", task="masked_image")).folder
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 16
    # A whole run that finds all: what it finds can only be what was kept.
    (folder,) = (tmp_path / "cache").iterdir()
    found = train(run_config(*cached, "name=found", task="masked_image")).folder
    assert column(plain, "loss") == column(kept, "loss") == column(found, "loss")
    for run in (kept, found):
        assert_equal(weights(run, 8), weights(plain, 8))
    for file in folder.rglob("*.safetensors"):
        file.write_bytes(next(iter(folder.rglob("*.safetensors"))).read_bytes())
    wrong = train(run_config(*cached, "name=wrong", task="masked_image")).folder
    assert column(wrong, "loss") != column(plain, "loss")
    # Of another teacher there is nothing.
    train(run_config(*cached, "name=other", "seed=1", "schedule.steps=1", task="masked_image"))
    assert len(list((tmp_path / "cache").iterdir())) == 2
    # Nor of one with the same weights and other options.
    train(run_config(*cached, "name=eps", "task.teacher.options.vision.norm_eps=0.1", task="masked_image"))
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_frozen_features_are_measured_while_it_trains(run_config: Make, tmp_path: Path) -> None:
    kinds = {"bright": (150, 150, 150), "dark": (0, 0, 0)}
    fit = write_class_folders(tmp_path / "fit", kinds, 15)
    test = write_class_folders(tmp_path / "test", kinds, 5, seed=1)
    noise = {"data": {"train": str(test), "workers": 0}, "fit": {"train": str(fit), "workers": 0}}
    few = {**noise, "fit": {"train": str(write_class_folders(tmp_path / "few", kinds, 4, seed=2)), "workers": 0}}
    every = ["loss", "linear_probe", "knn"]
    sets = {"noise": {**noise, "metrics": every}, "few": {**few, "metrics": every}, "unasked": noise}
    config = run_config(
        "eval.every_steps=3", "validation_split=0.2", f"eval.sets={json.dumps(sets)}", task="masked_image"
    )
    measured = list(evaluations(train(config).folder).values())
    assert len(measured) == 2
    for found in measured:
        assert found["noise/knn_top1"] == found["noise/linear_probe_top1"] == 1.0
        assert (found["noise/samples"], found["noise/fit_samples"], found["noise/classes"]) == (10, 30, 2)
        assert -1 < found["held_out/loss"] < 1
        # Too few for a probe, which costs the others nothing; and none where none is asked for.
        assert found["few/linear_probe_top1"] is None
        assert found["few/knn_top1"] == found["unasked/knn_top1"] == 1.0
        assert found["few/loss"] == found["noise/loss"]
        assert not {"unasked/linear_probe_top1", "unasked/loss"} & found.keys()
    assert measured[1]["held_out/loss"] < measured[0]["held_out/loss"]


@pytest.mark.parametrize(
    ("key", "argument"),
    [
        ("model.lock_text=true", "model.lock_text"),
        ("loss.name=siglip", "loss"),
        ("model.name=tiny", "tiny"),
        ("task.teacher.name=no-such", "no-such"),
        ("task.mask_ratio=0.01", "is 0 of them"),
        ("task.teacher.shard=true", "parallel.mode"),
        ("task.teacher={shard: true, cache: x}", "shard=false"),
        ("model.options.rope=false", "task.masked=compute"),
        ("eval.sets.x={metrics: [classify], data: {num_samples: 8}}", "metrics"),
        ("eval.sets.x={metrics: [knn], data: {num_samples: 8}}", "fit"),
        ("eval.sets.x={templates: 'a {}', data: {num_samples: 8}}", "eval.sets.x.templates"),
    ],
)
def test_masked_image_mistakes(key: str, argument: str, run_config: Make) -> None:
    with pytest.raises(UserError, match=argument):
        train(run_config("task.masked=drop", key, task="masked_image"))


def test_pictures_need_no_captions(run_config: Make, tmp_path: Path) -> None:
    source = SyntheticSource(24)
    samples = [(f"{number}", {"png": source[number].image}) for number in range(24)]
    write_shard(tmp_path / "shard.tar", samples)
    folder = train(run_config(f"data.train={tmp_path / 'shard.tar'}", "schedule.steps=2", task="masked_image")).folder
    assert len(column(folder, "loss")) == 2


def test_a_teacher_may_be_an_image_model(run_config: Make) -> None:
    config = run_config("schedule.steps=1", task="masked_image")
    teacher = TeacherConfig(name="eva02_tiny_patch14_224", options={**OPTIONS["vision"], "width": 24})
    folder = train(replace(config, task=MaskedImageTask(name="masked_image", teacher=teacher, smallest_block=2))).folder
    assert weights(folder, 1)["lm_head.weight"].shape == (24, 16)


@pytest.mark.parametrize("name", ["eva02_base_patch14_224", "eva02_tiny_patch14_224"])
def test_masked_image_weights_convert_both_ways(name, run_config, tmp_path):
    small = {**OPTIONS["vision"], "layers": 2}
    run = train(run_config(f"model.name={name}", "schedule.steps=1", task="masked_image")).folder
    file = run / "checkpoints/step_00000001/model.safetensors"
    state, images = load_file(file), torch.randn(2, 3, 16, 16)
    for layout in ("original", "timm"):
        convert(file, tmp_path / f"{layout}.pt", layout)
    authors, timms = (torch.load(tmp_path / f"{layout}.pt") for layout in ("original", "timm"))
    assert {"mask_token", "lm_head.weight", "norm.weight"} < authors.keys()
    assert ("blocks.0.mlp.w12.weight" in authors) == ("tiny" in name)
    back = create_masked_image_model(name, 16, tmp_path / "original.pt", **small)
    assert all(torch.equal(value, state[key]) for key, value in back.state_dict().items())
    # The same features from our image model, from either file, and from timm's own.
    expected = back.eval()(images)
    for layout in ("original", "timm"):
        ours = create_vision_model(name, tmp_path / f"{layout}.pt", num_classes=0, **small).eval()
        torch.testing.assert_close(ours(images), expected)
    torch.testing.assert_close(load_features(str(run)).model(images), expected)
    peer = timm.create_model(name, num_classes=0, img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2)
    assert timms.keys() == peer.state_dict().keys()
    peer.load_state_dict(timms)
    torch.testing.assert_close(peer.eval()(images), expected, rtol=1e-4, atol=1e-5)
    # CLIP training starts from any of them.
    vision = {**small, "mlp_ratio": 2.6667, "sub_norm": "base" in name, "attn_sub_norm": False}
    options = {**OPTIONS, "vision": vision}
    for start in (file, tmp_path / "original.pt", tmp_path / "timm.pt"):
        visual = create_model("tiny", pretrained_image=start, **options).visual
        assert torch.equal(visual.pos_embed, state["pos_embed"])
        assert torch.equal(visual.norm.weight, state["norm.weight"])
        assert torch.equal(visual.blocks[1].mlp.w1.weight, state["blocks.1.mlp.w1.weight"])


def test_training_starts_from_weights(run_config: Make) -> None:
    first = train(run_config("name=first", task="masked_image")).folder
    state = weights(first)
    for key, own in (("pretrained", ()), ("pretrained_image", ("mask_token", "lm_head"))):
        common = [f"name={key}", f"model.{key}={first}", "optim.lr=0.0", "schedule.steps=1"]
        folder = train(run_config(*common, task="masked_image")).folder
        for name, value in weights(folder, 1).items():
            assert torch.equal(value, state[name]) != name.startswith(own), name


def test_flops_of_masked_and_of_dropped_patches() -> None:
    config = vision_config("eva02_base_patch14_224")
    computed = masked_image_flops(config, 1024, 105)
    assert computed == vision_flops(config, 0) + 2 * 105 * 768 * 1024
    dropped = masked_image_flops(config, 1024, 105, decoder_layers=1)
    # Twelve blocks of 152 tokens and one of 257, in the place of twelve of 257.
    assert dropped / computed == pytest.approx((12 * 152 + 257) / (12 * 257), rel=0.03)


def test_flops_of_teacher_leave_out_pooling() -> None:
    options: dict[str, Any] = {"num_classes": 0, "layers": 1, "width": 24, "heads": 2}
    towers = [create_vision_model("naflexvit_base_patch16_map", pool=pool, **options) for pool in ("mean", "attention")]
    mean, attention = (Teacher(tower, SAME, SAME).flops_per_sample((4, 4)) for tower in towers)
    assert attention == mean


@pytest.mark.slow
@pytest.mark.xdist_group("processes")
def test_a_sharded_teacher_is_the_whole_one(run_config: Make, tmp_path: Path) -> None:
    sets = "eval.sets.val={data: {num_samples: 48, workers: 0}, skip: 40, samples: 3}"
    common = ["parallel.mode=shard", "schedule.steps=3", sets]
    alone = train(run_config(*common, "name=alone", task="masked_image"))
    configs = [
        run_config(*common, f"task.teacher.shard={shard}", f"name=shard-{shard}", task="masked_image")
        for shard in ("false", "true")
    ]
    in_processes(2, train_all, *((config, "none") for config in configs))
    states = [torch.load(checkpoint(tmp_path / name, 3) / "state.pt") for name in ("alone", "shard-true")]
    assert states[0]["taught_by"] == states[1]["taught_by"]
    for name in ("shard-false", "shard-true"):
        assert column(tmp_path / name, "loss") == pytest.approx(column(alone.folder, "loss"), abs=1e-6)
        assert evaluations(tmp_path / name)[3]["val/loss"] == pytest.approx(alone.metrics["val/loss"], abs=1e-5)
