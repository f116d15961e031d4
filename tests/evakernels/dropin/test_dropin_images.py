"""`accelerate` on transforms of images: pixels and random draws against the untouched transform."""

import copy
import pickle
import random

import numpy as np
import open_clip
import pytest
import timm.data
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import evakernels
from evakernels.dropin import images

TRANSFORMS = {
    "open_clip-eval": lambda: open_clip.image_transform(64, is_train=False),
    "open_clip-train": lambda: open_clip.image_transform(64, is_train=True),
    "open_clip-squash": lambda: open_clip.image_transform(64, is_train=False, resize_mode="squash"),
    "open_clip-longest": lambda: open_clip.image_transform(64, is_train=False, resize_mode="longest"),
    "timm-eval": lambda: timm.data.create_transform(64, interpolation="bicubic"),
    "timm-train": lambda: timm.data.create_transform(64, is_training=True, interpolation="random"),
    "v2": lambda: v2.Compose([v2.RandomResizedCrop(48), v2.RandomHorizontalFlip(), v2.PILToTensor()]),
}
PROCESSORS = {
    "CLIP": CLIPImageProcessorPil,
    "SigLIP": SiglipImageProcessorPil,
    "ViT": ViTImageProcessorPil,
    "Qwen2-VL": Qwen2VLImageProcessorPil,
}
SIZES = ((90, 70), (70, 190), (300, 64), (5, 40))


def image(size, mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_compose_keeps_pixels_and_draws(name, monkeypatch):
    theirs, ours = TRANSFORMS[name](), TRANSFORMS[name]()
    report, calls, resize = evakernels.accelerate(ours), [], images.resize
    assert {entry.op for entry in report.replaced} == {"resize"}
    assert not report.left
    monkeypatch.setattr(images, "resize", lambda *args, **options: calls.append(args) or resize(*args, **options))
    for transform in (ours, pickle.loads(pickle.dumps(ours))):
        for mode in ("RGB",) if "timm" in name else ("RGB", "L", "RGBA", "P"):
            for seed, size in enumerate(SIZES):
                given, expected = image(size, mode), []
                for candidate in (theirs, transform):
                    torch.manual_seed(seed)
                    np.random.seed(seed)
                    random.seed(seed)
                    expected += [candidate(given), torch.rand(1)]
                assert torch.equal(expected[0], expected[2]), (mode, size)
                assert torch.equal(expected[1], expected[3])
                assert type(given) is Image.Image
    assert calls
    steps = len(ours.transforms)
    evakernels.accelerate(ours)
    assert len(ours.transforms) == steps
    assert evakernels.restore(ours) == 1
    assert len(ours.transforms) == len(theirs.transforms)


@pytest.mark.parametrize("name", PROCESSORS)
def test_processor_keeps_pixels(name, monkeypatch):
    theirs, ours = PROCESSORS[name](), PROCESSORS[name]()
    saved = ours.to_dict()
    report, calls, resize = evakernels.accelerate(ours), [], images.resize
    assert report.headline == "1 of 1 modules"
    monkeypatch.setattr(images, "resize", lambda *args, **options: calls.append(args) or resize(*args, **options))
    for processor in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        for size in SIZES[:3]:
            expected = theirs(image(size), return_tensors="pt")["pixel_values"]
            assert torch.equal(processor(image(size), return_tensors="pt")["pixel_values"], expected)
    assert len(calls) == 9
    assert ours.to_dict() == saved
    assert evakernels.restore(ours) == 1
    assert type(ours) is PROCESSORS[name]


def test_steps_that_stay_are_reported():
    nearest = transforms.Compose([transforms.Resize(32, interpolation=transforms.InterpolationMode.NEAREST)])
    report = evakernels.accelerate(nearest)
    assert (report.left[0].module, report.left[0].reason) == ("Resize", "its interpolation is nearest")
    assert len(nearest.transforms) == 1


def test_image_that_a_step_writes_stays(tmp_path):
    def write(given):
        given.paste((0, 0, 0), (0, 0, 5, 5))
        return given

    given = image((20, 20))
    before = np.array(given)
    transform = transforms.Compose([write, transforms.Resize(10)])
    evakernels.accelerate(transform)
    transform(given)
    assert np.array_equal(np.array(given), before)


@pytest.mark.parametrize(
    ("error", "argument", "call"),
    [
        (TypeError, "model", lambda: evakernels.accelerate(3)),
        (TypeError, "model", lambda: evakernels.restore([])),
        (ValueError, "options", lambda: evakernels.accelerate(transforms.Compose([]), strict=True)),
    ],
)
def test_wrong_transform(error, argument, call):
    with pytest.raises(error, match=f"^accelerate: {argument}"):
        call()
