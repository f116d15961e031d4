"""The frozen image tower that masked image modelling learns from, and a disk cache of its features."""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

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
from evaclip.train.config import ParallelConfig, TeacherConfig, TrainConfig
from evaclip.train.distributed import World
from evaclip.train.sharding import WholeRandomNumbers, shard
from evaclip.weights import is_cut
from evaclip.weights.files import save_file, weights_hash

_log = logging.getLogger(__name__)

_LIKE_THE_RUN = {"amp_bf16": "bf16", "bf16": "bf16", "amp_fp16": "fp16", "fp16": "fp16"}
_FEATURES = "features"


def features_of(config: TeacherConfig) -> int:
    """Width of a teacher's features; of the teacher itself nothing is built.

    Raises:
        UserError: for a name that is no model's.
    """
    if find_model(config.name) is None:
        return override(vision_config(split_name(config.name)[0]), config.options).width
    return override(get_config(config.name), config.options).embed_dim


class Teacher:
    """Features of patches from a frozen tower, as EVA-02 takes them: behind the last norm and the projection.

    Cosine similarity normalises them. An image model without a projection gives them behind its last norm.

    Args:
        tower: on its device, in its own precision.
        own, students: what images go through for the one and for the other.
        cache: of features; None always computes them.
        facts: identify the teacher, see `Task.teacher_identity`.
    """

    def __init__(
        self,
        tower: VisionTower,
        own: Preprocess,
        students: Preprocess,
        cache: "FeatureCache | None" = None,
        facts: dict[str, Any] | None = None,
    ) -> None:
        self.tower = tower.requires_grad_(False).eval()
        self.facts = facts or {}
        self._cache = cache
        self._change: tuple[Tensor, Tensor] | None = None
        if (own.mean, own.std) != (students.mean, students.std):
            own_mean, own_std, mean, std = (
                torch.tensor(values, device=tower.cls_token.device).reshape(3, 1, 1)
                for values in (own.mean, own.std, students.mean, students.std)
            )
            self._change = std / own_std, (mean - own_mean) / own_std

    @torch.no_grad()
    def __call__(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Features `[b, patches, width]` in the teacher's precision.

        Args:
            images: `[b, 3, height, width]`, normalised as the student gets them.
            grid: rows and columns of the student's patches. The teacher sees the images at a size (bicubic, with
                antialiasing) at which its patches are as many.
        """
        with torch.autocast(images.device.type, enabled=False):
            if self._cache is None:
                return self._computed(images, grid)
            return self._cache(images, grid, self._computed)

    def tensors(self) -> Iterator[Tensor]:
        """What it holds."""
        yield from self.tower.parameters()
        yield from self.tower.buffers()

    def flops_per_sample(self, grid: tuple[int, int]) -> float:
        """FLOPs of one forward pass of the teacher; 0 if the features may come from a cache."""
        if self._cache:
            return 0.0
        config, head = self._sized(grid), self.tower.head
        projection = 0 if head is None else 2 * config.num_patches * config.width * head.out_features
        return vision_flops(config, 0) + projection

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

    def _sized(self, grid: tuple[int, int]) -> VisionConfig:
        side = self.tower.config.patch_size
        return replace(self.tower.config, image_size=(grid[0] * side, grid[1] * side))


def similarity(predicted: Tensor, wanted: Tensor) -> Tensor:
    """Cosine similarities `[patches]` of features `[patches, width]`, in float32 at least."""
    dtype = torch.promote_types(predicted.dtype, torch.float32)
    return F.cosine_similarity(predicted.to(dtype), wanted.to(dtype), dim=-1)


class FeatureCache:
    """Features of views on disk, one file each, named by a hash of the pixels.

    A file's name is a hash of 128 bits of the normalised pixels and the grid, in a folder for the teacher's weights,
    architecture, precision and preprocessing. It appears complete or not at all, and is mapped when it is read; a
    damaged one is written anew. Where one view of a batch is missing, all are computed: so the products have the shapes
    that they would have without a cache.

    Args:
        folder: of this teacher.
        leaves_gb: what stays free of the disk.
    """

    def __init__(self, folder: Path, leaves_gb: float) -> None:
        self._folder = folder
        self._leaves = leaves_gb * 1e9
        self._is_full = False
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def __call__(
        self, images: Tensor, grid: tuple[int, int], compute: Callable[[Tensor, tuple[int, int]], Tensor]
    ) -> Tensor:
        """What `compute(images, grid)` gives, `[b, patches, width]`."""
        paths = [self._folder / name[:2] / f"{name}-{grid[0]}x{grid[1]}.safetensors" for name in digests(images)]
        found = [_read(path) for path in paths]
        kept = [features for features in found if features is not None]
        if len(kept) == len(paths):
            return torch.stack(kept).to(images.device)
        computed = compute(images, grid)
        for path, before, features in zip(paths, found, computed.cpu(), strict=True):
            if before is None:
                self._write(path, features)
        return computed

    def _write(self, path: Path, features: Tensor) -> None:
        if self._is_full:
            return
        if shutil.disk_usage(self._folder).free < self._leaves:
            _log.warning("the disk of %s is full but for what cache_leaves_gb says: nothing more is kept", self._folder)
            self._is_full = True
            return
        try:
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as temporary:
                save_file({_FEATURES: features.contiguous()}, temporary)
        except (OSError, SafetensorError) as exc:
            _log.warning("cannot write %s: %s; nothing more is kept", path, exc)
            self._is_full = True


def digests(images: Tensor) -> list[str]:
    """A hash of 128 bits in hexadecimal digits of each image, computed where they are.

    It is sums of the pixels' bits times fixed random odd numbers, modulo 2^64: the same on any device.
    """
    words = images.float().flatten(1).view(torch.int32)
    factors = torch.randint(-(2**62), 2**62, (2, words.shape[1]), generator=torch.Generator().manual_seed(0)) * 2 + 1
    factors = factors.to(images.device)
    sums = torch.stack([(factors * row.long()).sum(1) for row in words]).cpu()
    return [row.numpy().tobytes().hex() for row in sums]


def open_teacher(config: TeacherConfig, run: TrainConfig, world: World, model: VisionModel) -> Teacher:
    """The teacher of a run, on its device: whole, or this process's part of it.

    Args:
        model: the student. Of one without data the teacher has none either, and no weights are looked for.

    Raises:
        UserError: the model or its weights aren't there, or the processes share out nothing.
    """
    refuse_lone_parts(config, run.parallel)
    mode, cut = _fake_mode(model), config.shard and world.size > 1
    precision = config.precision or _LIKE_THE_RUN.get(run.precision, "fp32")
    cut_up = partial(_cut_up, parallel=replace(run.parallel, offload="none"), world=world)
    how: dict[str, Any] = {
        "device": world.device if mode is None else "meta",
        "precision": precision,
        "as_trained": False,
        **config.options,
    }
    pretrained = config.pretrained if mode is None else None
    # One of random weights is the same in all processes, and whatever the student is.
    rng.seed_all(run.seed, 0)
    prepare = (lambda found: cut_up(_tower(found))) if cut and mode is None else None
    with WholeRandomNumbers() if cut else nullcontext():
        found: CLIP | VisionModel
        if find_model(config.name) is None:
            found = create_vision_model(config.name, pretrained or False, num_classes=0, prepare=prepare, **how)
        else:
            found = create_model(config.name, pretrained, prepare=prepare, **how)
    tower, own = _tower(found), found.config.preprocess if isinstance(found, CLIP) else found.preprocess
    if mode is not None:
        from evaclip.train.fake_ranks import without_data

        without_data(tower, mode)
        if cut:
            cut_up(tower)
    if mode is not None:
        with mode:
            return Teacher(tower, own, model.preprocess)
    facts = {"weights": weights_hash(tower)[:32], "precision": precision, "mean": list(own.mean), "std": list(own.std)}
    return Teacher(tower, own, model.preprocess, _cache(config, tower, model.preprocess, facts), facts)


def refuse_lone_parts(config: TeacherConfig, parallel: ParallelConfig) -> None:
    """Raises UserError for a sharded teacher of a replicated model."""
    if config.shard and parallel.mode == "replicate":
        raise UserError("parallel.mode must be shard or hybrid for task.teacher.shard=true, got replicate")


def _tower(model: CLIP | VisionModel) -> VisionTower:
    return model.visual if isinstance(model, CLIP) else model


def _cut_up(tower: VisionTower, parallel: ParallelConfig, world: World) -> None:
    from torch.distributed.fsdp import register_fsdp_forward_method

    shard([tower], parallel, "fp32", world)
    register_fsdp_forward_method(tower, "patch_features")


def _fake_mode(model: VisionModel) -> FakeTensorMode | None:
    """That of the tensors of a model without data."""
    token = model.cls_token
    local = token.to_local() if is_cut(token) else token
    return local.fake_mode if isinstance(local, FakeTensor) else None


def _cache(
    config: TeacherConfig, tower: VisionTower, students: Preprocess, facts: dict[str, Any]
) -> FeatureCache | None:
    if config.cache is None:
        return None
    # Options such as the heads or a norm's epsilon change features, and no parameter's name or shape.
    described = json.dumps([facts, asdict(tower.config), asdict(students)])
    name = hashlib.sha256(described.encode()).hexdigest()[:24]
    return FeatureCache(Path(config.cache).expanduser() / name, config.cache_leaves_gb)


def _read(path: Path) -> Tensor | None:
    try:
        return load_file(path)[_FEATURES]
    except (OSError, SafetensorError, KeyError):
        return None
