"""The frozen image tower that masked image modelling learns from, and a disk cache of its features."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from evaclip.atomic import replacing, writing
from evaclip.errors import UserError
from evaclip.factory import create_model, create_vision_model
from evaclip.model.clip import CLIP
from evaclip.model.config import Preprocess, VisionConfig, find_model, get_config, override
from evaclip.model.flops import vision_flops
from evaclip.model.vision import VisionTower
from evaclip.model.vision_model import VisionModel
from evaclip.model.vision_names import split_name, vision_config
from evaclip.train import rng
from evaclip.train.config import TeacherConfig, TrainConfig
from evaclip.train.distributed import World
from evaclip.train.sharding import WholeRandomNumbers, shard
from evaclip.weights.files import save_file, weights_hash

_log = logging.getLogger(__name__)

_FEATURES = "features"


def features_of(config: TeacherConfig) -> int:
    """Width of a teacher's features, without building it.

    Raises:
        UserError: no model has this name.
    """
    if find_model(config.name) is None:
        return override(vision_config(split_name(config.name)[0]), config.options).width
    return override(get_config(config.name), config.options).embed_dim


class Teacher:
    """Features of patches from a frozen tower, after the last norm and the projection, if any (EVA-02).

    Args:
        tower: on its device, in its own precision.
        teacher_preprocess, student_preprocess: their means and standard deviations.
        cache: of features; None always computes them.
        facts: identify the teacher, see `Task.teacher_identity`.
    """

    def __init__(
        self,
        tower: VisionTower,
        teacher_preprocess: Preprocess,
        student_preprocess: Preprocess,
        cache: "FeatureCache | None" = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.tower = tower.requires_grad_(False).eval()
        self.facts = facts or {}
        self._cache = cache
        self._preprocess = teacher_preprocess, student_preprocess

    @torch.no_grad()
    def __call__(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features `[b, patches, width]` in the teacher's precision.

        Args:
            images: `[b, 3, height, width]`, normalised for the student.
            grid: rows and columns of the student's patches. Images are resized (bicubic, antialiased) to give the
                teacher as many.
        """
        with torch.autocast(images.device.type, enabled=False):
            if self._cache is None:
                return self._computed(images, grid)
            return self._cache(images, grid, self._computed)

    def tensors(self) -> Iterator[Tensor]:
        """Parameters and buffers."""
        yield from self.tower.parameters()
        yield from self.tower.buffers()

    def flops_per_sample(self, grid: tuple[int, int]) -> float:
        """FLOPs of one forward pass; 0 with a cache."""
        if self._cache:
            return 0.0
        config, head = self._sized(grid), self.tower.head
        projection = 0 if head is None else 2 * config.num_patches * config.width * head.out_features
        return vision_flops(replace(config, pool="mean"), 0) + projection  # without an attention pooling

    def _computed(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        if self.tower.present.grid != grid:
            self.tower.set_image_size(self._sized(grid).image_size)
        if self._change is not None:
            factor, shift = self._change
            images = images * factor + shift
        if images.shape[2:] != self.tower.present.image_shape:
            shape = self.tower.present.image_shape
            images = F.interpolate(images, shape, mode="bicubic", antialias=True)
        return self.tower.patch_features(images)

    @cached_property
    def _change(self) -> tuple[Tensor, Tensor] | None:
        """Factor and shift from the student's normalization to the teacher's; None if they are equal."""
        teacher, student = self._preprocess
        if (teacher.mean, teacher.std) == (student.mean, student.std):
            return None
        teacher_mean, teacher_std, mean, std = (
            torch.tensor(values, device=self.tower.pos_embed.device).reshape(3, 1, 1)
            for values in (teacher.mean, teacher.std, student.mean, student.std)
        )
        return std / teacher_std, (mean - teacher_mean) / teacher_std

    def _sized(self, grid: tuple[int, int]) -> VisionConfig:
        side = self.tower.config.patch_size
        return replace(self.tower.config, image_size=(grid[0] * side, grid[1] * side))


def similarity(predicted: Tensor, target: Tensor) -> Tensor:
    """Cosine similarities `[patches]` of features `[patches, width]`, in float32 at least."""
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    return F.cosine_similarity(predicted.to(dtype), target.to(dtype), dim=-1)


class FeatureCache:
    """Features of views on disk, one file each, named by a 128-bit hash of the normalised pixels and the grid.

    Files are written atomically; damaged ones are written again. If a view of a batch is missing, all are computed, so
    that matmuls have the same shapes as without a cache.

    Args:
        folder: for one teacher's weights, architecture, precision and preprocessing.
        min_free_gb: disk space in 10^9 bytes that stays free.
    """

    def __init__(self, folder: Path, min_free_gb: float) -> None:
        self._folder = folder
        self._min_free = min_free_gb * 1e9
        self._is_full = False
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def __call__(
        self, images: Tensor, grid: tuple[int, int], compute: Callable[[Tensor, tuple[int, int]], Tensor]
    ) -> Tensor:
        """The result of `compute(images, grid)`, `[b, patches, width]`."""
        paths = [self._folder / name[:2] / f"{name}-{grid[0]}x{grid[1]}.safetensors" for name in digests(images)]
        cached = [_read(path) for path in paths]
        hits = [features for features in cached if features is not None]
        if len(hits) == len(paths):
            return torch.stack(hits).to(images.device)
        computed = compute(images, grid)
        for path, before, features in zip(paths, cached, computed.cpu(), strict=True):
            if before is None:
                self._write(path, features)
        return computed

    def _write(self, path: Path, features: Tensor) -> None:
        if self._is_full:
            return
        if shutil.disk_usage(self._folder).free < self._min_free:
            _log.warning("%s has less than cache_leaves_gb free: no more features are cached", self._folder)
            self._is_full = True
            return
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as temporary:
                save_file({_FEATURES: features.contiguous()}, temporary)
        except (OSError, SafetensorError) as exc:
            _log.warning("cannot write %s: %s; no more features are cached", path, exc)
            self._is_full = True


def digests(images: Tensor) -> list[str]:
    """A 128-bit hash of each image, in hexadecimal: sums of its bits times random odd numbers, equal on all devices."""
    words = images.float().flatten(1).view(torch.int32)
    factors = torch.randint(-(2**62), 2**62, (2, words.shape[1]), generator=torch.Generator().manual_seed(0)) * 2 + 1
    factors = factors.to(images.device)
    sums = torch.stack([(factors * row.long()).sum(1) for row in words]).cpu()
    return [row.numpy().tobytes().hex() for row in sums]


def open_teacher(config: TeacherConfig, run: TrainConfig, world: World, model: VisionModel) -> Teacher:
    """The teacher of a run, on its device: whole, or this rank's shards.

    Args:
        model: the student. If it is on the meta device, so is the teacher, and no weights are read.

    Raises:
        UserError: the model or its weights don't exist, or `shard` is set and `parallel.mode` is replicate.
    """
    if config.shard and run.parallel.mode == "replicate":
        raise UserError("task.teacher.shard=true needs parallel.mode=shard or hybrid, got replicate")
    is_meta, is_sharded = model.pos_embed.is_meta, config.shard and world.size > 1
    precision = config.precision or run.precision.removeprefix("amp_")
    pretrained = None if is_meta else config.pretrained

    def shard_teacher(teacher: CLIP | VisionModel) -> None:
        from torch.distributed.fsdp import register_fsdp_forward_method

        shard([_tower(teacher)], replace(run.parallel, offload="none"), "fp32", world)
        register_fsdp_forward_method(_tower(teacher), "patch_features")

    how: dict[str, Any] = {
        "device": "meta" if is_meta else world.device,
        "precision": precision,
        "as_trained": False,
        "prepare": shard_teacher if is_sharded else None,
        **config.options,
    }
    # Random weights are equal on all ranks and for all students.
    rng.seed_all(run.seed, 0)
    with WholeRandomNumbers() if is_sharded else nullcontext():
        teacher: CLIP | VisionModel
        if find_model(config.name) is None:
            teacher = create_vision_model(config.name, pretrained or False, num_classes=0, **how)
        else:
            teacher = create_model(config.name, pretrained, **how)
    tower, preprocess = _tower(teacher), teacher.config.preprocess if isinstance(teacher, CLIP) else teacher.preprocess
    if is_meta:
        return Teacher(tower, preprocess, model.preprocess)
    facts = {
        "weights": weights_hash(tower)[:32],
        "precision": precision,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
    }
    cache = None
    if config.cache is not None:
        # Options such as a norm's epsilon change features, and no parameter's name or shape.
        described = json.dumps([facts, asdict(tower.config), asdict(model.preprocess)])
        name = hashlib.sha256(described.encode()).hexdigest()[:24]
        cache = FeatureCache(Path(config.cache).expanduser() / name, config.cache_leaves_gb)
    return Teacher(tower, preprocess, model.preprocess, cache, facts)


def _tower(model: CLIP | VisionModel) -> VisionTower:
    return model.visual if isinstance(model, CLIP) else model


def _read(path: Path) -> Tensor | None:
    try:
        return load_file(path)[_FEATURES]
    except (OSError, SafetensorError, KeyError):
        return None
