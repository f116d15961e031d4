"""A small model with its tokenizer and transform, and pictures."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import evaclip
import evaclip.export
from evaclip.loading import LoadedModel
from evaclip.transforms import EvalTransform
from evaclip.weights.files import weights_hash


@pytest.fixture(scope="session")
def loaded():
    """The caller may not change its dtype."""
    torch.manual_seed(0)
    model = evaclip.create_model("tiny").eval()
    transform = EvalTransform(model.config.vision.image_size, model.config.preprocess)
    return LoadedModel("tiny", "random weights", model, evaclip.get_tokenizer("tiny"), transform)


@pytest.fixture(scope="session")
def pictures():
    draw = np.random.default_rng(0)
    sizes = [(40, 60), (64, 64), (90, 30), (33, 35), (50, 50), (20, 70), (64, 48)]
    return [Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


@pytest.fixture(scope="session")
def exported():
    """Folders of exported towers."""
    return {}


@pytest.fixture(autouse=True)
def exported_once(exported, tmp_path_factory):
    """A new store exports its text tower, which takes seconds; for equal weights it is done once."""
    export = evaclip.export.export

    def copied(model, tower, target, **options):
        key = weights_hash(model), tower, target.name, *sorted(options.items())
        if key not in exported:
            exported[key] = tmp_path_factory.mktemp("exported")
            export(model, tower, exported[key] / target.name, **options)
        for path in exported[key].iterdir():
            shutil.copy(path, target.with_name(path.name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaclip.export, "export", copied)
        yield
