"""Options of open_clip's and EVA-CLIP's training scripts, as assignments to configuration keys."""

from collections.abc import Mapping
from typing import Any

from evaclip.errors import UserError, unknown_name
from evaclip.model.config import find_model
from evaclip.train.tree import Tree, nest

_VALIDATION = "eval.sets.val"
_SHARED = ("data.kind", "data.image_key", "data.caption_key", "data.csv_separator", "data.max_image_pixels")
"""Keys of options that also apply to `--val-data`."""

FLAGS = {
    "--train-data": "data.train={}",
    "--data": "data.train={}",
    "--val-data": f"{_VALIDATION}.data.train={{}} validation_split=null",
    "--val-num-samples": f"{_VALIDATION}.samples={{}}",
    "--imagenet-val": "eval.sets.imagenet.data.train={} eval.sets.imagenet.classes=imagenet",
    "--imagenet-v2": "eval.sets.imagenet_v2.data.train={} eval.sets.imagenet_v2.classes=imagenet",
    "--val-frequency": "eval.every_epochs={}",
    "--zeroshot-frequency": "eval.every_epochs={}",
    "--dataset-type": "data.kind={}",
    "--csv-img-key": "data.image_key={}",
    "--csv-caption-key": "data.caption_key={}",
    "--csv-separator": "data.csv_separator={}",
    "--max-image-pixels": "data.max_image_pixels={}",
    "--workers": "data.workers={}",
    "--train-num-samples": "schedule.epoch_samples={}",
    "--epochs": "schedule.epochs={}",
    "--warmup": "schedule.warmup_steps={}",
    "--lr-scheduler": "schedule.name={}",
    "--skip-scheduler": "schedule.name=constant",
    "--batch-size": "batch_size={}",
    "--accum-freq": "accumulation_steps={}",
    "--precision": "precision={}",
    "--model": "model.name={}",
    "--pretrained": "model.pretrained={}",
    "--pretrained-image": "model.pretrained_image={}",
    "--pretrained-text": "model.pretrained_text={}",
    "--lock-image": "model.lock_image=true",
    "--lock-image-unlocked-groups": "model.lock_image_unlocked_groups={}",
    "--lock-text": "model.lock_text=true",
    "--lock-text-unlocked-layers": "model.lock_text_unlocked_layers={}",
    "--force-patch-dropout": "model.patch_dropout={}",
    "--force-image-size": "model.options.vision.image_size={}",
    "--force-context-length": "model.options.text.context_length={}",
    "--image-mean": "model.options.preprocess.mean={}",
    "--image-std": "model.options.preprocess.std={}",
    "--image-interpolation": "model.options.preprocess.interpolation={}",
    "--image-resize-mode": "model.options.preprocess.resize={}",
    "--grad-checkpointing": "model.savings.recompute=block",
    "--torchcompile": "compile=blocks",
    "--opt": "optim.name={}",
    "--opt-kwargs": "optim.options.{}",
    "--momentum": "optim.options.momentum={}",
    "--lr": "optim.lr={}",
    "--visual-lr": "optim.visual.lr={}",
    "--text-lr": "optim.text.lr={}",
    "--visual-ld": "optim.visual.layer_decay={}",
    "--text-ld": "optim.text.layer_decay={}",
    "--beta1": "optim.beta1={}",
    "--beta2": "optim.beta2={}",
    "--eps": "optim.eps={}",
    "--wd": "optim.weight_decay={}",
    "--grad-clip-norm": "optim.grad_clip_norm={}",
    "--siglip": "loss.name=siglip",
    "--save-frequency": "checkpoint.every_epochs={}",
    "--delete-previous-checkpoint": "checkpoint.keep=1",
    "--log-every-n-steps": "log.every_steps={}",
    "--report-to": "{}",
    "--wandb-project-name": "log.wandb.project={}",
    "--name": "name={}",
    "--logs": "output={}",
    "--seed": "seed={}",
    # What these ask for is always so, see docs/open-clip.md.
    **dict.fromkeys(("--local-loss", "--gather-with-grad", "--dataset-resampled", "--save-most-recent"), ""),
    **dict.fromkeys(("--lock-image-freeze-bn-stats", "--lock-text-freeze-layer-norm", "--use-bn-sync"), ""),
    **dict.fromkeys(("--force-custom-text", "--log-local", "--ddp-static-graph"), ""),
}
"""Assignments by flag, as after `--set`; a flag takes a value if one of them has `{}`."""

ARGUMENTS: dict[str, dict[str, Any]] = {
    "--batch-size": {"type": int},
    "--accum-freq": {"type": int},
    "--force-image-size": {"nargs": "*"},
    "--image-mean": {"nargs": "*"},
    "--image-std": {"nargs": "*"},
    "--opt-kwargs": {"nargs": "*"},
}
"""Keyword arguments of `add_argument` for flags whose value is an integer or a list."""

_REPLACEMENTS = {
    "--set 'data.mixture={NAME: {train: PATH, weight: SHARE}, ...}'": "--train-data-upsampling-factors",
    "--set 'schedule={name: constant, cooldown_fraction: 0.2, cooldown: linear, final_factor: 0}'": (
        "--epochs-cooldown --lr-cooldown-end --lr-cooldown-power"
    ),
    "--set 'data.augmentation={scale: [0.5, 1.0], grayscale: 0.1}'": "--aug-cfg",
    "--set precision=bf16": "--use-bnb-linear",
    "--torchcompile": "--torchscript",
    "--device cuda:N": "--no-set-device-rank",
    "torchrun, with --rdzv-endpoint and --rdzv-backend": "--dist-url --dist-backend --horovod",
    "evaclip export, after the training": "--trace",
    "a copy of the run folder, as by aws s3 sync": "--remote-sync --remote-sync-frequency --remote-sync-protocol",
    "RUN/config.yaml, and the versions in RUN/events.jsonl": "--copy-codebase",
    "the environment variable WANDB_NOTES": "--wandb-notes",
    "the environment variable HF_HOME": "--cache-dir",
    "nothing, as the loss is always exact": "--loss-dist-impl",
    "nothing, as EVA-CLIP has exact GELU": "--force-quick-gelu",
    "nothing, without CoCa": "--coca-caption-loss-weight --coca-contrastive-loss-weight",
    "nothing, without distillation": "--distill-model --distill-pretrained",
}
INSTEAD = {flag: text for text, flags in _REPLACEMENTS.items() for flag in flags.split()}
"""What replaces an option that is not accepted."""

_WORDS: dict[str, dict[str, Any]] = {
    "precision": {"amp": "amp_fp16", "amp_bfloat16": "amp_bf16", "pure_bf16": "bf16", "pure_fp16": "fp16"},
    "schedule.name": {"const": "constant"},
    "optim.name": {"timm/adamw": "adamw", "timm/lamb": "lamb"},
    "eval.every_epochs": {"0": None},
    "checkpoint.every_epochs": {"0": None},
    "model.pretrained": {"": None},
}
"""Values that have another name here, by key."""

_WANDB = "log.wandb.project=open-clip"
_TRACKERS = {
    "": "log.tensorboard=false",
    "tensorboard": "log.tensorboard=true",
    "wandb": f"log.tensorboard=false {_WANDB}",
    **dict.fromkeys(("all", "wandb,tensorboard", "tensorboard,wandb"), f"log.tensorboard=true {_WANDB}"),
}


def changes(flags: Mapping[str, Any], accumulation_steps: int, processes: int) -> list[Tree]:
    """The configuration changes that flags ask for.

    Args:
        flags: values by flag, True for a flag without a value; None or nothing for unset flags.
        accumulation_steps: of the configuration so far.
        processes: number of ranks.

    Raises:
        UserError: a value of `--report-to` is unknown, or two flags set one key to different values.
    """
    from evaclip.train.overrides import parse_assignment  # yaml belongs to the extra clip

    trees, values = list[Tree](), dict[str, Any]()
    for flag, text in FLAGS.items():
        value, assignments = flags.get(flag), text.split()
        if value is None:
            continue
        if flag == "--report-to":
            if value not in _TRACKERS:
                raise unknown_name(flag, value, _TRACKERS)
            assignments = _TRACKERS[value].split()
        elif flag == "--opt-kwargs":
            assignments = [f"optim.options.{option}" for option in value]
        elif flag == "--batch-size":
            # There it is the micro-batch of one rank, here the global batch.
            value *= (flags.get("--accum-freq") or accumulation_steps) * processes
        elif flag == "--pretrained":
            name, _, source = value.partition(":")
            if source and find_model(name):
                trees.append(nest("model.name", name))
                value = source
        for assignment in assignments:
            key, _, constant = assignment.partition("=")
            if constant != "{}":
                trees.append(parse_assignment(assignment))
                continue
            if values.setdefault(key, value) != value:
                raise UserError(f"{key} must have one value, got {values[key]} and, by {flag}, {value}")
            if ".options." in key:  # has no type that could convert the text
                several = isinstance(value, list) and len(value) > 1
                given_text = f"[{', '.join(value)}]" if several else "".join(value)
                trees.append(parse_assignment(f"{key}={given_text}"))
                continue
            value = _WORDS.get(key, {}).get(value, value)
            trees.append(nest(key, value))
            if key in _SHARED and flags.get("--val-data"):
                trees.append(nest(f"{_VALIDATION}.{key}", value))
    return trees
