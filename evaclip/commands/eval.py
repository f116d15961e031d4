"""`evaclip eval zero-shot | classify | retrieval | linear-probe | knn`."""

import argparse
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evaclip.commands.parser import Run, add_reading, leaf, open_data

if TYPE_CHECKING:
    from evaclip.data import Source
    from evaclip.eval.features import FeatureOptions
    from evaclip.eval.results import Evaluation, Gallery
    from evaclip.eval.runs import Setting
    from evaclip.loading import LoadedClassifier, LoadedModel

_MODEL = "a run folder, a checkpoint folder, hf-hub:OWNER/NAME, local-dir:FOLDER, or NAME[:WEIGHTS]"
_CLASSIFIER = "a run or checkpoint folder of a classifier, hf-hub:timm/NAME, or NAME[:WEIGHTS] with timm's NAME"
_DATA = "tar shards (pattern or folder), a table (CSV, JSON Lines, Parquet), or a folder of class folders"
_CLASSES = "class names, one a line or a JSON list, in label order"
_ZERO_SHOT = (
    "evaclip eval zero-shot runs/demo --data 'emoji/openmoji-*.tar' --classes emoji/classes.txt",
    "evaclip eval zero-shot EVA02-CLIP-B-16:b16.pt --data val --classes imagenet",
    "evaclip eval zero-shot runs/a --data 'cifar/{00..03}.tar' --caption-key cls --classes names.txt",
)
_CLASSIFY = (
    "evaclip eval classify hf-hub:timm/eva02_base_patch14_448.mim_in22k_ft_in22k_in1k --data imagenet/val",
    "evaclip eval classify eva02_tiny_patch14_336:tiny.safetensors --data 'val/{00..49}.tar' --caption-key cls",
    "evaclip eval classify eva02_base_patch14_448.mim_in22k_ft_in22k:b.pt --data imagenet/val --subset in1k",
)
_RETRIEVAL = (
    "evaclip eval retrieval runs/demo --data 'emoji/openmoji-*.tar'",
    "evaclip eval retrieval EVA02-CLIP-B-16:weights.pt --data coco/test.csv   # one row per caption",
    "evaclip eval retrieval runs/a --data 'flickr/{0..3}.tar' --caption-key json:captions",
)
_PROBES: dict[Literal["linear-probe", "knn"], str] = {
    "linear-probe": "train a linear classifier on frozen features",
    "knn": "classify by the 20 nearest neighbours among frozen features",
}


def add_commands(subparsers: Any) -> None:
    """Add `evaclip eval` and its tasks."""
    group = subparsers.add_parser("eval", help="measure a model", description="Measure a model.")
    tasks = group.add_subparsers(title="tasks", metavar="TASK", required=True, parser_class=type(group))

    def task(name: str, run: Run, help: str, examples: tuple[str, ...], model: str = _MODEL) -> Any:
        parser = leaf(tasks, name, run, help=help, examples=examples)
        _add_common(parser, model)
        return parser.add_argument

    add = task("zero-shot", _run_zero_shot, "classify images by the names of classes, without training", _ZERO_SHOT)
    add("--classes", metavar="FILE", help=f"{_CLASSES}, or 'imagenet' (default: the folders' names, or the captions)")
    add(
        "--templates",
        metavar="FILE",
        help="one a line, or a JSON list, each with {}; 'imagenet' for its 80; or one template itself "
        "(default: 'imagenet' with its classes, else '{}')",
    )
    _add_show_classes(add)
    help = "classify images by the model's own classifier, as timm's validate does"
    add = task("classify", _run_classify, help, _CLASSIFY, _CLASSIFIER)
    add("--classes", metavar="FILE", help=f"{_CLASSES} (default: the folders' sorted names, or the numbers from 0)")
    add(
        "--subset",
        metavar="SUBSET",
        help="choose among these of its classes only: in1k, for classifiers of ImageNet's larger sets, or a file with "
        "their numbers, one a line, in the order of the labels",
    )
    help = "reassessed labels of ImageNet's validation set (real.json), or 'imagenet' for timm's copy"
    add("--real-labels", metavar="FILE", help=help)
    _add_show_classes(add)
    add("--image-size", type=_image_size, metavar="N", help="in pixels, or HEIGHTxWIDTH (default: the model's)")
    add("--crop-pct", type=float, metavar="SHARE", help="share that the centre crop keeps (default: the weights')")
    add("--antialias", action="store_true", help="resize positions as timm does (default: as the models' authors do)")
    help = "find images by caption and captions by image, all captions of an image counted"
    task("retrieval", _run_retrieval, help, _RETRIEVAL)
    for name, help in _PROBES.items():
        example = f"evaclip eval {name} runs/demo --train flowers/train --data flowers/test --cache features"
        run, model = partial(_run_by_features, name), f"{_MODEL}; or an image model's as for classify"
        add = task(name, run, help, (example,), model)
        add("--train", metavar="PATH", required=True, help=f"to train on: {_DATA}")
        add("--classes", metavar="FILE", help="class names in label order, or 'imagenet'")


def _add_show_classes(add: Any) -> None:
    add("--show-classes", action="store_true", help="print the accuracy of every class, worst first")


def _image_size(text: str) -> int | tuple[int, int]:
    sides = text.split("x")
    if len(sides) > 2 or not all(map(str.isdecimal, sides)):
        raise argparse.ArgumentTypeError(f"must be N or HEIGHTxWIDTH, in pixels, got {text!r}")
    return int(sides[0]) if len(sides) == 1 else (int(sides[0]), int(sides[1]))


def _add_common(parser: argparse.ArgumentParser, model: str) -> None:
    parser.add_argument("model", metavar="MODEL", help=model)
    data = parser.add_argument_group("data")
    add = data.add_argument
    add("--data", metavar="PATH", required=True, help=_DATA)
    add_reading(data)
    add("--allow-unreadable", action="store_true", help="evaluate the readable samples even if many cannot be read")
    add("--title", metavar="TEXT", help="name of the data in tables and reports (default: the end of its path)")
    add = parser.add_argument_group("computation").add_argument
    add("--batch-size", type=int, default=64, metavar="N", help="images at once (default: 64)")
    add("--workers", type=int, default=2, metavar="N", help="processes that decode (default: 2)")
    add("--device", help="cpu, cuda, cuda:N (default: cuda where there is one)")
    add("--precision", choices=("fp32", "bf16", "fp16"), default="fp32", help="autocast (default: fp32)")
    if model == _CLASSIFIER:
        parser.set_defaults(cache=None)
    else:
        add("--cache", type=Path, metavar="FOLDER", help="store features here and reuse stored ones")
    add("--no-average", action="store_true", help="the weights themselves, not their moving average")
    add = parser.add_argument_group("output").add_argument
    add("--json", type=Path, metavar="FILE", help="write the result, with all that it depends on, here")


def _run_zero_shot(args: argparse.Namespace) -> None:
    from evaclip.eval.runs import run_zero_shot
    from evaclip.eval.zero_shot import IMAGENET, PLACEHOLDER, load_templates

    templates = load_templates(args.templates or (IMAGENET if args.classes == IMAGENET else PLACEHOLDER))
    setting = _load_setting(args)
    _report(args, setting, run_zero_shot(setting, _classnames(args), templates))


def _run_classify(args: argparse.Namespace) -> None:
    from evaclip.eval.classify import class_space, load_real_labels
    from evaclip.eval.runs import run_classify
    from evaclip.loading import find_classifier
    from evaclip.model.config import Preprocess

    if args.crop_pct is not None:
        Preprocess(crop=args.crop_pct)  # raises before weights are looked for
    classnames = _classnames(args)
    source, options = _prepare(args)
    found = find_classifier(args.model, average=not args.no_average)
    classes = class_space(found.num_classes, source, classnames, args.subset, found.classes)
    real = load_real_labels(args.real_labels, source, len(classes.names)) if args.real_labels else None
    changes = {"image_size": args.image_size or found.eval_size, "crop": args.crop_pct, "antialias": args.antialias}
    setting = _make_setting(args, source, options, found.load(device=_device(args), **changes))
    _report(args, setting, run_classify(setting, classes, real))


def _run_retrieval(args: argparse.Namespace) -> None:
    from evaclip.eval.runs import run_retrieval

    setting = _load_setting(args)
    _report(args, setting, *run_retrieval(setting))


def _run_by_features(task: Literal["linear-probe", "knn"], args: argparse.Namespace) -> None:
    from evaclip.eval.runs import run_probe
    from evaclip.loading import load_features

    train = open_data(args.train, args, caption_template="{}")
    source, options = _prepare(args)
    loaded = load_features(args.model, device=_device(args), average=not args.no_average)
    setting = _make_setting(args, source, options, loaded)
    _report(args, setting, run_probe(task, setting, train, _classnames(args)))


def _load_setting(args: argparse.Namespace) -> "Setting":
    from evaclip.loading import load_model

    source, options = _prepare(args)
    loaded = load_model(args.model, device=_device(args), average=not args.no_average)
    return _make_setting(args, source, options, loaded)


def _prepare(args: argparse.Namespace) -> tuple["Source", "FeatureOptions"]:
    # Everything that can be wrong with the data and the numbers is found before the model is loaded.
    from evaclip.atomic import require_writable
    from evaclip.eval.features import FeatureOptions

    for file in filter(None, (args.json, args.cache and args.cache / "features")):
        require_writable(file)
    options = FeatureOptions(args.batch_size, args.workers, args.precision, args.cache)
    return open_data(args.data, args, caption_template="{}"), options


def _device(args: argparse.Namespace) -> str:
    import torch

    return args.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _make_setting(
    args: argparse.Namespace, source: "Source", options: "FeatureOptions", loaded: "LoadedModel | LoadedClassifier"
) -> "Setting":
    from evaclip.eval.runs import Setting
    from evaclip.redact import redacted

    title = args.title or "/".join(Path(redacted(args.data)).parts[-2:]).replace("//", "/")
    setting = Setting(loaded, args.data, source, title, options)
    return replace(setting, allowed_unreadable=1.0) if args.allow_unreadable else setting


def _classnames(args: argparse.Namespace) -> tuple[str, ...] | None:
    from evaclip.eval.zero_shot import load_classnames

    return load_classnames(args.classes) if args.classes else None


def _report(
    args: argparse.Namespace, setting: "Setting", evaluation: "Evaluation", gallery: "Gallery | None" = None
) -> None:
    from evaclip.eval.results import print_classes, print_evaluation
    from evaclip.eval.runs import store

    if getattr(args, "show_classes", False):
        print_classes(evaluation)
    print_evaluation(evaluation)
    if args.json:
        evaluation.save(args.json)
    if setting.loaded.run:
        print(f"stored for the report of the run: {store(setting.loaded.run, evaluation, gallery)}")
