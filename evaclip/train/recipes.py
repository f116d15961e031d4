"""Named starting points: each recipe is a function that returns a complete configuration.

The published ones hold the hyper-parameters of the EVA-CLIP release (Sun et al. 2023, arXiv 2303.15389): LAMB, 2000
steps of warm-up and a cosine to 0, weight decay 0.05, gradients clipped at 5, activation checkpointing. They do not set
`data.train`, `model.pretrained_image` or `model.pretrained_text`: give your shards and the weights that the towers
start from. Merged-2B is a `data.mixture` of LAION-2B and COYO-700M, 80 to 20. Adam's moments are (0.9, 0.98, 1e-6), the
values in force when the models were trained. Samples are what the model cards state. The two largest models have
other values (Sun et al. 2024), and those of g/14 are published in part.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from evaclip.augmentation import Augmentation
from evaclip.data.config import DataConfig, RemoteConfig
from evaclip.errors import unknown_name
from evaclip.model.config import Savings
from evaclip.train.config import (
    CheckpointConfig,
    ClassificationTask,
    EvalConfig,
    EvalSetConfig,
    LogConfig,
    LossConfig,
    MaskedImageTask,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    ScheduleConfig,
    TeacherConfig,
    TowerConfig,
    TrainConfig,
)

Recipe = Callable[[], TrainConfig]

RECIPES: dict[str, Recipe] = {}

VALIDATION_SPLIT = 0.05
"""Fraction of the user's data that is held out if no evaluation set is given."""


def recipe(function: Recipe) -> Recipe:
    """Registers a recipe under its function's name, with `-` for `_`."""
    RECIPES[function.__name__.replace("_", "-")] = function
    return function


def get_recipe(name: str) -> TrainConfig:
    """The configuration of a recipe, which may also be called by its model; case and `_` for `-` don't matter.

    Raises:
        UserError: there is no recipe of this name; the nearest ones are named.
    """
    wanted = _spelling(name)
    if wanted in RECIPES:
        return RECIPES[wanted]()
    for function in RECIPES.values():
        if _spelling((config := function()).model.name) == wanted:
            return config
    raise unknown_name("recipe", name, RECIPES)


def with_fitting_nodes(config: TrainConfig, base: TrainConfig) -> TrainConfig:
    """`config` with as many of the recipe's `canonical_nodes` as divide its batch, mixed over as many batches."""
    nodes = config.data.canonical_nodes
    if nodes != base.data.canonical_nodes or config.batch_size % nodes == 0:
        return config
    nodes, window = math.gcd(config.batch_size, nodes), config.data.shuffle_window
    if window and window == base.data.shuffle_window:
        window = 8 * config.batch_size // nodes
    return replace(config, data=replace(config.data, canonical_nodes=nodes, shuffle_window=window))


def with_own_evaluation(config: TrainConfig, base: TrainConfig) -> TrainConfig:
    """`config` without the evaluation sets of the recipe `base` if the training data is no longer the recipe's.

    If no other set is left, a validation split replaces them, unless `validation_split` is set.
    """
    sets, of_recipe = config.eval.sets or {}, base.eval.sets or {}
    left = {name: each for name, each in sets.items() if not _same_data(each, of_recipe.get(name))}
    same_data = (config.data.train, config.data.mixture) == (base.data.train, base.data.mixture)
    if same_data or left == sets:
        return config
    split = VALIDATION_SPLIT if config.validation_split is None and not left else config.validation_split
    return replace(config, eval=replace(config.eval, sets=left or None), validation_split=split)


def _same_data(one: EvalSetConfig | None, other: EvalSetConfig | None) -> bool:
    return one is not None and other is not None and one.data == other.data


def _spelling(name: str) -> str:
    return name.lower().replace("_", "-")


def describe_recipes() -> dict[str, str]:
    """Each recipe's name and the first line of its docstring."""
    return {name: (function.__doc__ or "").partition("\n")[0] for name, function in RECIPES.items()}


@recipe
def tiny() -> TrainConfig:
    """A small model on drawn shapes: shows in half a minute on a CPU that everything works."""
    samples, held_out = 4096, 512
    drawn = DataConfig(train="synthetic", num_samples=samples, workers=0)
    return TrainConfig(
        name="tiny",
        batch_size=32,
        data=drawn,
        model=ModelConfig(name="tiny"),
        optim=OptimConfig(lr=5e-4, grad_clip_norm=1.0),
        schedule=ScheduleConfig(steps=180, warmup_steps=10),
        log=LogConfig(every_steps=10),
        eval=EvalConfig(
            sets={"shapes": EvalSetConfig(data=replace(drawn, num_samples=samples + held_out), skip=samples)}
        ),
    )


@recipe
def emoji() -> TrainConfig:
    """Twemoji drawings and their names, from the shards that `evaclip data emoji data/emoji` writes."""
    # One drawing a concept: what carries over to another style has to come from the augmentation.
    augmentation = Augmentation(
        scale=(0.8, 1.0),
        rotation=15.0,
        translation=0.1,
        zoom=(0.8, 1.1),
        brightness=0.3,
        contrast=0.5,
        saturation=0.8,
        grayscale=0.15,
    )
    data = DataConfig(
        train="data/emoji/twemoji-*.tar",
        workers=1,
        augmentation=augmentation,
        transform="evaclip.demo.augmentation:DrawingTransform",
    )
    return TrainConfig(
        name="emoji",
        batch_size=128,
        data=data,
        model=ModelConfig(name="emoji"),
        # On OpenMoji after 102,000 samples at 48 pixels, with 3 layers: patches of 16 pixels 4.3 %; of 12 pixels with
        # half of them dropped 2.9 %, of 8 with three quarters dropped 3.1 %.
        optim=OptimConfig(lr=5e-4, text=TowerConfig(lr=1e-3), weight_decay=0.1, grad_clip_norm=1.0),
        schedule=ScheduleConfig(steps=1600, warmup_steps=80),
        log=LogConfig(every_steps=50),
        eval=EvalConfig(
            sets={"openmoji": EvalSetConfig(data=DataConfig(train="data/emoji/openmoji-*.tar"))}, batch_size=128
        ),
    )


@recipe
def finetune() -> TrainConfig:
    """Released weights on your own pictures and captions: AdamW, 10 epochs, batches of 256; 5 % are held out.

    The contrastive loss of the pretraining stays (FLYP, Goyal et al. 2022, arXiv 2212.00638). A small rate that
    falls with the distance from the output, few epochs and hardly any augmentation keep what the model knows (FT-CLIP,
    Dong et al. 2022, arXiv 2212.06138): 5e-5 at the projections and 1e-6 at the embeddings of 12 blocks. The precision
    is float32, which every machine has; say amp_bf16 on a GPU.
    """
    towers = TowerConfig(layer_decay=0.75)
    return TrainConfig(
        name="finetune",
        batch_size=256,
        validation_split=VALIDATION_SPLIT,
        data=DataConfig(train="", workers=4),
        model=ModelConfig(name="EVA02-CLIP-B-16", pretrained="eva_clip"),
        optim=OptimConfig(lr=5e-5, visual=towers, text=towers, grad_clip_norm=1.0),
        schedule=ScheduleConfig(epochs=10, warmup_fraction=0.1),
        eval=EvalConfig(every_epochs=1),
    )


class _FineTuning(NamedTuple):
    """One of timm's classifiers, and the values of its training."""

    model: str
    batch_size: int
    epochs: int
    warmup_epochs: int
    lr: float
    layer_decay: float
    drop_path: float = 0.1
    smoothing: float = 0.1

    @property
    def start(self) -> str:
        """The weights of timm that it starts from: a classifier of ImageNet-21K, masked image modelling, or CLIP."""
        architecture, tag = self.model.split(".")
        if tag.endswith("_in22k_in1k"):
            return self.model.removesuffix("_in1k")
        if tag == "clip_ft_in1k":
            return "eva_giant_patch14_clip_224.laion400m"
        return f"{architecture.rpartition('_')[0]}_224.{tag.partition('_ft_')[0]}"

    def config(self) -> TrainConfig:
        """Fine-tuning on ImageNet-1K, or on ImageNet-21K with larger crops and without a moving average.

        Every number is from the authors' commands: the README files of EVA-02/asuka and of EVA-01/eva in
        baaivision/EVA, with the defaults of `run_class_finetuning.py` there (AdamW's moments, the average's decay, the
        policy, jitter that the policy turns off). They neither mix nor erase, and don't clip gradients.

        Two things differ from theirs: the last norm starts from the pre-trained one, as in timm, where theirs
        starts anew; and the moving average warms up, see `Ema`.
        """
        large, options = self.model.endswith("_ft_in22k"), {"drop_path": self.drop_path}
        # A model of a billion parameters computes its blocks again in the backward pass.
        savings = Savings(recompute="block") if self.model.startswith("eva_giant") else Savings()
        start = f"hf-hub:timm/{self.start}"
        return TrainConfig(
            name=self.model,
            batch_size=self.batch_size,
            precision="amp_fp16",
            data=DataConfig(train="", workers=8, augmentation=Augmentation(scale=(0.2 if large else 0.08, 1.0))),
            task=ClassificationTask(classes=21_841 if large else 1000, label_smoothing=self.smoothing),
            model=ModelConfig(name=self.model, pretrained_image=start, options=options, savings=savings),
            optim=OptimConfig(lr=self.lr, beta2=0.999, eps=1e-8, visual=TowerConfig(layer_decay=self.layer_decay)),
            schedule=ScheduleConfig(epochs=self.epochs, warmup_fraction=self.warmup_epochs / self.epochs),
            ema_decay=None if large else 0.9999,
            eval=EvalConfig(every_epochs=1),
        )


_FINE_TUNINGS = {
    "eva02-ti-in1k": _FineTuning("eva02_tiny_patch14_336.mim_in22k_ft_in1k", 1024, 100, 5, 2e-4, 0.9),
    "eva02-s-in1k": _FineTuning("eva02_small_patch14_336.mim_in22k_ft_in1k", 1024, 100, 5, 1e-4, 0.8),
    "eva02-b-in1k": _FineTuning("eva02_base_patch14_448.mim_in22k_ft_in1k", 1024, 30, 3, 1e-4, 0.7),
    "eva02-l-in1k": _FineTuning("eva02_large_patch14_448.mim_in22k_ft_in1k", 1024, 30, 3, 5e-5, 0.8, 0.15, 0.2),
    "eva02-l-m38m-in1k": _FineTuning("eva02_large_patch14_448.mim_m38m_ft_in1k", 1024, 30, 3, 7e-5, 0.8, 0.15, 0.2),
    "eva02-b-in22k": _FineTuning("eva02_base_patch14_448.mim_in22k_ft_in22k", 2048, 40, 1, 3e-4, 0.7),
    "eva02-l-in22k": _FineTuning("eva02_large_patch14_448.mim_in22k_ft_in22k", 1024, 20, 1, 2e-4, 0.75, 0.15),
    "eva02-l-m38m-in22k": _FineTuning("eva02_large_patch14_448.mim_m38m_ft_in22k", 2048, 30, 1, 3e-4, 0.75, 0.15),
    "eva02-b-in22k-in1k": _FineTuning(
        "eva02_base_patch14_448.mim_in22k_ft_in22k_in1k", 512, 15, 2, 5e-5, 0.8, 0.15, 0.2
    ),
    "eva02-l-in22k-in1k": _FineTuning(
        "eva02_large_patch14_448.mim_in22k_ft_in22k_in1k", 512, 20, 2, 2e-5, 0.85, 0.15, 0.2
    ),
    "eva02-l-m38m-in22k-in1k": _FineTuning(
        "eva02_large_patch14_448.mim_m38m_ft_in22k_in1k", 512, 20, 2, 2e-5, 0.85, 0.15, 0.2
    ),
    "eva-g-clip-in1k": _FineTuning("eva_giant_patch14_224.clip_ft_in1k", 1024, 20, 2, 3e-5, 0.9, 0.4, 0.3),
    "eva-g-clip-in1k-336": _FineTuning("eva_giant_patch14_336.clip_ft_in1k", 512, 20, 2, 3e-5, 0.9, 0.4, 0.3),
}
for _name, _tuning in _FINE_TUNINGS.items():
    _recipe = RECIPES[f"finetune-{_name}"] = partial(_tuning.config)
    _data = "ImageNet-21K" if _tuning.model.endswith("_ft_in22k") else "ImageNet-1K"
    _recipe.__doc__ = f"{_tuning.model}: {_tuning.epochs} epochs of {_data} from {_tuning.start}."


@recipe
def siglip_b_16() -> TrainConfig:
    """EVA02-CLIP-B/16 by SigLIP's sigmoid loss, from random values: batches of 32,768."""
    # Batch and beta2 are those of Zhai et al. 2023 (arXiv 2303.15343), rate and decay those of SigLIP 2 (Tschannen et
    # al. 2025, arXiv 2502.14786). The configuration of SigLIP in google-research/big_vision (siglip_lit_coco, a locked
    # image tower) has the same rate and bound on the gradient, and a decay of 1e-2. What the paper of 2023 has from
    # random values wasn't compared; the model, the 4B samples and the warm-up are not its.
    config = _published("EVA02-CLIP-B-16", 32_768, 122_070, TowerConfig(), TowerConfig())
    optim = OptimConfig(lr=1e-3, weight_decay=1e-4, beta2=0.95, eps=1e-8, grad_clip_norm=1.0)
    return replace(config, name="siglip-b-16", precision="amp_bf16", loss=LossConfig(name="siglip"), optim=optim)


@recipe
def eva01_g_14() -> TrainConfig:
    """EVA01-CLIP-g/14: LAION-400M, 11B samples, batches of 41k; rates and warm-up aren't published."""
    # Published: the data, 11B samples, 41k of them on 256 GPUs (40,960 = 256 x 160), stochastic depth of 0.4 (the
    # model's default), no patch dropout, fp16, an epoch of a tenth of the data. LAMB came with later models.
    # Unpublished values are those of g/14+.
    visual = TowerConfig(lr=4e-4, layer_decay=0.85)
    config = _published("EVA01-CLIP-g-14", 40_960, 268_555, visual)
    return replace(config, optim=replace(config.optim, name="adamw"))


@recipe
def eva01_g_14_plus() -> TrainConfig:
    """EVA01-CLIP-g/14+: Merged-2B, 11B samples, batches of 114,688."""
    return _published(
        "EVA01-CLIP-g-14-plus", 114_688, 95_900, TowerConfig(lr=4e-4, layer_decay=0.85), patch_dropout=0.5
    )


@recipe
def eva02_b_16() -> TrainConfig:
    """EVA02-CLIP-B/16: Merged-2B, 8B samples, batches of 131,072."""
    visual, text = TowerConfig(lr=2e-4, layer_decay=0.75), TowerConfig(lr=2e-5, layer_decay=0.75)
    return _published("EVA02-CLIP-B-16", 131_072, 64_000, visual, text)


@recipe
def eva02_l_14() -> TrainConfig:
    """EVA02-CLIP-L/14: Merged-2B, 4B samples, batches of 131,072."""
    return _published("EVA02-CLIP-L-14", 131_072, 32_000, TowerConfig(lr=4e-4, layer_decay=0.85))


@recipe
def eva02_l_14_336() -> TrainConfig:
    """EVA02-CLIP-L/14 at 336 pixels: 2B further samples from the 224-pixel model, batches of 61,440."""
    visual, text = TowerConfig(lr=4e-4, layer_decay=0.75), TowerConfig(lr=4e-5, layer_decay=0.65)
    return _published("EVA02-CLIP-L-14-336", 61_440, 32_800, visual, text)


@recipe
def eva02_e_14() -> TrainConfig:
    """EVA02-CLIP-E/14: LAION-2B, 4B samples, batches of 115,200."""
    visual = TowerConfig(lr=4e-4, layer_decay=0.9)
    return _cut(_published("EVA02-CLIP-bigE-14", 115_200, 35_200, visual, patch_dropout=0.5))


@recipe
def eva02_e_14_plus() -> TrainConfig:
    """EVA02-CLIP-E/14+: LAION-2B, 9B samples, batches of 144,000, bf16."""
    visual = TowerConfig(lr=4e-4, layer_decay=0.9)
    config = _published("EVA02-CLIP-bigE-14-plus", 144_000, 62_500, visual, patch_dropout=0.5)
    return replace(_cut(config), precision="amp_bf16")


@recipe
def eva_clip_8b() -> TrainConfig:
    """EVA-CLIP-8B: Merged-2B, 9B samples, batches of 178k, bf16."""
    # 178k on 384 GPUs: 464 samples on each are nearest.
    return _sun_2024("EVA-CLIP-8B", 178_176, 50_512)


@recipe
def eva_clip_18b() -> TrainConfig:
    """EVA-CLIP-18B: Merged-2B and others, 6B samples, batches of 108k on 360 GPUs, bf16."""
    # The last 0.6B samples had no patch dropout: go on with model.patch_dropout=0 from step 50,000. The data is
    # Merged-2B, 20M pairs of LAION-COCO and, at the end, 23M of videos, in proportions that aren't published.
    return _sun_2024("EVA-CLIP-18B", 108_000, 55_556)


def _fang_2023(size: str, batch_size: int, epochs: int, lr: float, drop_path: float) -> TrainConfig:
    """EVA-02 (Fang et al. 2023, arXiv 2303.11331), with the values of the authors' commands and their defaults."""
    # The authors train in float16 by DeepSpeed. They mask 105 of 256 patches, in blocks of 16 and more.
    crop = Augmentation(scale=(0.2, 1.0), ratio=(3 / 4, 4 / 3), flip=0.5)
    return TrainConfig(
        name=f"pretrain-mim-eva02-{size}",
        seed=88,
        batch_size=batch_size,
        precision="amp_fp16",
        data=DataConfig(train="", workers=10, augmentation=crop),
        task=MaskedImageTask(
            name="masked_image",
            teacher=TeacherConfig(name="EVA01-CLIP-g-14", pretrained="eva_clip"),
            mask_ratio=105 / 256,
            patch_gradient=0.1,
        ),
        model=ModelConfig(name=f"eva02_{size}_patch14_224", options={"drop_path": drop_path}),
        optim=OptimConfig(lr=lr, weight_decay=0.05, beta2=0.98, eps=1e-6, grad_clip_norm=3.0),
        schedule=ScheduleConfig(epochs=epochs, warmup_fraction=1 / epochs, final_factor=1e-5 / lr),
        checkpoint=CheckpointConfig(every_epochs=1),
    )


for _size, _letters, _batch, _epochs, _rate, _drop in (
    ("tiny", "Ti", 4000, 240, 3e-3, 0.0),
    ("small", "S", 4000, 240, 3e-3, 0.0),
    ("base", "B", 2048, 150, 1.5e-3, 0.0),
    ("large", "L", 2048, 150, 1.5e-3, 0.1),  # on Merged-38M it was 56 epochs, the rest being the same
):
    _recipe = RECIPES[f"pretrain-mim-eva02-{_size}"] = partial(_fang_2023, _size, _batch, _epochs, _rate, _drop)
    _recipe.__doc__ = (
        f"EVA-02 {_letters} by masked image modelling with the teacher EVA01-CLIP-g/14: ImageNet-21K, {_epochs} "
        f"epochs, batches of {_batch:,}."
    )


def _sun_2024(model: str, batch_size: int, steps: int) -> TrainConfig:
    """What Sun et al. 2024 (arXiv 2402.04252) share; the bound on the gradient isn't published, nor the epoch."""
    config = _cut(_published(model, batch_size, steps, TowerConfig(lr=4e-4, layer_decay=0.9), patch_dropout=0.5))
    # The temperature stays 0.01: its rate is the one of parameters outside the towers.
    fixed = replace(config.model, options={"init_logit_scale": math.log(100.0)})
    optim = replace(config.optim, lr=0.0, beta2=0.95, weight_decay=0.0)
    return replace(config, precision="amp_bf16", model=fixed, optim=optim)


def _cut(config: TrainConfig) -> TrainConfig:
    """What a GPU with 80 GB can't hold whole: 4.7 billion parameters and more, each of 16 bytes in training."""
    return replace(config, parallel=ParallelConfig(mode="shard"))


def _canonical_shuffle(batch_size: int) -> DataConfig:
    """Shards with samples mixed over eight batches; a machine reads only the shards of its canonical nodes.

    Most batches can be divided by 64 nodes: a batch of 131,072 is drawn from 165 shards. On two machines and more the
    local copies have room for the next window.
    """
    nodes = math.gcd(batch_size, 64)
    return DataConfig(
        train="",
        kind="webdataset",
        workers=8,
        canonical_nodes=nodes,
        shuffle_window=8 * batch_size // nodes,
        remote=RemoteConfig(cache_gb=80),
    )


_TEXT = TowerConfig(lr=4e-5, layer_decay=0.75)


def _published(
    model: str,
    batch_size: int,
    steps: int,
    visual: TowerConfig,
    text: TowerConfig = _TEXT,
    *,
    patch_dropout: float = 0.0,
) -> TrainConfig:
    return TrainConfig(
        name=model,
        seed=4096,
        batch_size=batch_size,
        precision="amp_fp16",
        data=_canonical_shuffle(batch_size),
        model=ModelConfig(name=model, patch_dropout=patch_dropout, savings=Savings(recompute="block")),
        optim=OptimConfig(name="lamb", lr=5e-4, visual=visual, text=text, grad_clip_norm=5.0),
        schedule=ScheduleConfig(steps=steps, epoch_samples=40_000_000, warmup_steps=2000),
        checkpoint=CheckpointConfig(every_steps=1000, keep_every=10_000),
    )
