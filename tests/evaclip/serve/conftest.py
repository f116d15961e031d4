"""A small store of pictures, and what serves it."""

import numpy as np
import pytest
import torch
from image_files import as_file
from PIL import Image

from evaclip.loading import load_model
from evaclip.runtime.encoder import Encoder
from evaclip.runtime.indexing import describe
from evaclip.runtime.store import Row, Store


@pytest.fixture(scope="session")
def encoder():
    torch.manual_seed(0)
    return Encoder(load_model("tiny"), device="cpu", precision="fp32", batch_size=8, threads=2)


@pytest.fixture(scope="session")
def pictures():
    draw = np.random.default_rng(0)
    return [Image.fromarray(draw.integers(0, 256, (48, 40, 3), dtype=np.uint8)) for _ in range(12)]


@pytest.fixture(scope="session")
def store(encoder, pictures, tmp_path_factory):
    """Rows 0 to 9 have thumbnails; 10 is a file, 11 was one."""
    folder = tmp_path_factory.mktemp("serve")
    made = Store.create(folder / "store", {"given": "tiny", **describe(encoder)})
    rows = [Row(f"{n}.png", f"c{n}", f"picture {n}", {"n": n}, as_file(p)) for n, p in enumerate(pictures[:10])]
    for n in (10, 11):
        pictures[n].resize((480, 400)).save(folder / f"{n}.png")
        rows.append(Row(str(folder / f"{n}.png"), f"c{n}"))
    made.add(encoder.images(pictures).numpy(), rows)
    (folder / "11.png").unlink()
    return made
