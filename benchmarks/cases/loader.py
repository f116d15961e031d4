"""Reading the samples of tar shards, undecoded and in order; the baseline is Python's tarfile."""

import random
import tarfile
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.operation import Cost, Draw, Function, Inputs, Operation, Work, peer, register
from benchmarks.shapes import Shape
from evaclip.data import open_source
from evaclip.data.shard_writer import write_shards

_CAPTION = b"a caption of some forty characters %08d"


@lru_cache(maxsize=1)
def _shards(count: int, samples: int, image_bytes: int) -> Any:
    """A temporary folder with shards of images of random bytes, and captions."""
    folder = tempfile.TemporaryDirectory()
    rng = random.Random(0)
    content = (
        (f"{number:08d}", {"jpg": rng.randbytes(image_bytes), "txt": _CAPTION % number})
        for number in range(count * samples)
    )
    write_shards(Path(folder.name), "s", content, samples)
    return folder


def _inputs(shape: Shape, draw: Draw) -> Inputs:
    folder = _shards(shape.batch, shape.tokens, shape.width).name
    return {"shards": f"{folder}/s-{{00000..{shape.batch - 1:05d}}}.tar"}


def _sum(images: Any) -> Tensor:
    """The number of images and their bytes."""
    sizes = [len(image) for image in images]
    return torch.tensor([len(sizes), sum(sizes)], dtype=torch.float64)


def _tarfile(shards: str) -> Tensor:
    def images() -> Any:
        for path in sorted(Path(shards).parent.glob("*.tar")):
            with tarfile.open(path) as tar:
                read = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
            yield from (content for name, content in read.items() if name.endswith(".jpg"))

    return _sum(images())


def _ours(shards: str) -> Tensor:
    source = open_source(shards)
    return _sum(source[index].image for index in range(len(source)))


def _work(shape: Shape, itemsize: int) -> Work:
    """Each image and caption is read once."""
    return Work(Cost(0, shape.batch * shape.tokens * (shape.width + len(_CAPTION % 0))))


register(
    Operation(
        name="loader",
        summary="all samples of tar shards, read in order and not decoded",
        inputs=_inputs,
        eager=_tarfile,
        ours=_ours,
        baseline="tarfile",
        work=_work,
        shapes={"cpu": ("8x500x40000",)},
        raw=lambda shards, samples, image_bytes: Shape(batch=shards, tokens=samples, width=image_bytes),
        small="1x2x64",
        by_request=True,
        references=False,
        compiles=False,
    )
)


@peer("loader", package="webdataset", devices=("cpu",))
def webdataset(shape: Shape) -> Function:
    """webdataset, without shuffling."""
    import webdataset

    return lambda shards: _sum(sample["jpg"] for sample in webdataset.WebDataset(shards, shardshuffle=False))
