"""Pictures of all kinds in class folders, and what timm's own parts make of them."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import RealLabelsImagenet, create_dataset, create_loader, resolve_data_config
from timm.utils import AverageMeter, accuracy
from torch import Tensor, nn

MODES = ("RGB", "L", "P", "RGBA", "CMYK", "LA", "1", "tRNS")
WNIDS = ("n01440764", "n01443537", "n02085782", "n03126707", "n04399382", "n15075141")


def picture(mode: str, size: tuple[int, int], seed: int) -> bytes:
    """A file of smooth noise; JPEG where its modes allow, else PNG."""
    draws = np.random.default_rng(seed)
    coarse = Image.fromarray(draws.integers(0, 256, (5, 4, 4), np.uint8), "RGBA").resize(size, Image.Resampling.BICUBIC)
    image = coarse.convert("RGB") if mode == "tRNS" else coarse if mode == "RGBA" else coarse.convert(mode)
    if mode == "LA":
        image = Image.merge("LA", (coarse.convert("L"), coarse.getchannel("A")))
    options: dict[str, Any] = {"transparency": 7} if mode == "P" else {}
    if mode == "tRNS":
        options["transparency"] = coarse.convert("RGB").getpixel((0, 0))
    file = io.BytesIO()
    image.save(file, "JPEG" if mode in ("L", "CMYK") else "PNG", **options)
    return file.getvalue()


def write_folders(root: Path, classes: Sequence[str] = WNIDS, each: int = 2) -> Path:
    """`each` pictures a class, called as those of ImageNet's validation set; their order is not that of the classes."""
    for number in range(each * len(classes)):
        folder = root / classes[number % len(classes)]
        folder.mkdir(parents=True, exist_ok=True)
        size = [(70, 50), (33, 91), (64, 64), (300, 20), (150, 151)][number % 5]
        data = picture(MODES[number % len(MODES)], size, number)
        (folder / f"ILSVRC2012_val_{number + 1:08d}.JPEG").write_bytes(data)
    return root


def teach(model: nn.Module, inputs: Tensor, labels: Tensor) -> None:
    """Gives a random model of timm a head under which some pictures are found and others are not."""
    with torch.no_grad():
        features = model.forward_head(model.forward_features(inputs), pre_logits=True)
        directions = features - features.mean(0)
        noise = torch.Generator().manual_seed(3)
        weight = 0.3 * directions.std() * torch.randn(model.head.weight.shape, generator=noise)
        weight.index_add_(0, labels, directions)
        model.head.weight.copy_(weight / weight.norm(dim=1, keepdim=True).mean())
        model.head.bias.copy_(-model.head.weight @ features.mean(0))


@dataclass
class Validated:
    """What timm's `validate` has of a data set: accuracies as shares, and every picture, logits and top-5."""

    top1: float
    top5: float
    inputs: Tensor
    logits: Tensor
    best: Tensor


def validate(model, root, *, real=None, columns=None, class_map=None, prefetch=False, **args):
    """The loop of timm's script of that name, of the same parts; `args` are its options of the same names."""
    config = resolve_data_config(args, model=model, use_test_size=True)
    dataset = create_dataset("", str(root), split="validation", class_map=class_map or "")
    loader = create_loader(
        dataset,
        batch_size=5,
        use_prefetcher=prefetch,
        num_workers=0,
        device=torch.device("cpu"),
        **{key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")},
    )
    labels = RealLabelsImagenet(dataset.filenames(basename=True), real_json=real) if real else None
    meters = (AverageMeter(), AverageMeter())
    inputs, logits = [], []
    model.eval()
    with torch.no_grad():
        for images, targets in loader:
            output = model(images)
            if columns is not None:
                output = output[:, columns]
            if labels:
                labels.add_result(output)
            for meter, share in zip(meters, accuracy(output, targets, topk=(1, 5)), strict=True):
                meter.update(share.item(), images.size(0))
            inputs.append(images)
            logits.append(output)
    both = torch.cat(logits)
    top1, top5 = (labels.get_accuracy(k) for k in (1, 5)) if labels else (meter.avg for meter in meters)
    return Validated(top1 / 100, top5 / 100, torch.cat(inputs), both, both.topk(min(5, both.shape[1]), 1).indices)


def targets(root: Path) -> Tensor:
    """Labels in the order of the files, by sorted folders."""
    folders = sorted(root.iterdir())
    return torch.tensor([label for label, folder in enumerate(folders) for _ in folder.iterdir()])
