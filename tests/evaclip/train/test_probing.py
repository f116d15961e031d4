"""Votes of neighbours and fits of a linear probe, shared by the processes of a training."""

import json
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from processes import in_processes
from torch import Tensor, nn

from evaclip.eval import probes
from evaclip.train.distributed import World, connect
from evaclip.train.distributed_encoder import DistributedEncoder, Stopped

CLASSES = 4


class Model(nn.Module):
    """Is asked for nothing."""

    config = SimpleNamespace(image_shape=(8, 8))


def drawn(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of few directions, so that many neighbours are equally near."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    return torch.eye(CLASSES)[labels] + torch.randint(-1, 2, (samples, CLASSES), generator=generator), labels


def measured(**how: Any) -> list[dict[str, Any]]:
    train, test = drawn(150, 0), drawn(77, 1)
    both = [measure(train, test, classes=CLASSES, **how) for measure in (probes.knn, probes.linear_probe)]
    return [result.to_dict() for result in both]


def write_measured(path: Path) -> None:
    """What a process finds, and how many blocks of queries and fits it had, in all of them."""
    places = patch.object(probes, "top_items", wraps=probes.top_items)
    fit = patch.object(probes, "_fit", wraps=probes._fit)
    with closing(connect("cpu")) as world, patch.object(probes, "_QUERIES", 16), places as votes, fit as fits:
        found = measured(over=DistributedEncoder(Model(), world, None, lambda: False).over)
        everywhere = world.gather_everywhere((found, votes.call_count, fits.call_count))
        if world.is_main:
            path.write_text(json.dumps(everywhere))


@pytest.mark.xdist_group("processes")
@pytest.mark.parametrize("count", [2, 3])
def test_probes_on_ranks_equal_one_process(count: int, tmp_path: Path) -> None:
    in_processes(count, write_measured, tmp_path / "found.json")
    found, votes, fits = zip(*json.loads((tmp_path / "found.json").read_text()), strict=True)
    assert all(each == measured() for each in found)
    # Five blocks of queries; seven strengths, and the best of them once more.
    assert (sum(votes), sum(fits)) == (5, 8)
    assert max(votes) - min(votes) <= 1
    assert max(fits) <= 5


def test_a_stop_is_noticed_between_two_blocks() -> None:
    done = list[int]()
    encoder = DistributedEncoder(Model(), World(torch.device("cpu")), None, lambda: len(done) == 3)
    with pytest.raises(Stopped):
        encoder.over(range(9), done.append)
    assert done == [0, 1, 2]
