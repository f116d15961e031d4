"""What whole evaluations make of samples that cannot be read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from eval_fakes import COLORS, ColorModel, ToTensor, png, tokenize_colors, write_tar

from evaclip.data import open_source
from evaclip.errors import Refused
from evaclip.eval.features import FeatureOptions
from evaclip.eval.runs import Setting, run_knn, run_linear_probe, run_retrieval, run_zero_shot
from evaclip.loading import LoadedModel

SAMPLES = 20


def shard(path: Path, unreadable: int) -> Path:
    names = list(COLORS)[:2]
    return write_tar(
        path,
        {
            f"{number:03d}": {
                "png": b"damaged" if number < unreadable else png(COLORS[names[number % 2]], 4 + number),
                "txt": names[number % 2].encode(),
            }
            for number in range(SAMPLES)
        },
    )


def setting(path: Path, **options: Any) -> Setting:
    loaded = LoadedModel("fake", "nowhere", ColorModel(), tokenize_colors, ToTensor())  # type: ignore[arg-type]
    features = FeatureOptions(batch_size=1, progress=False)
    return Setting(loaded, str(path), open_source(str(path)), "Two colours", features, **options)


def probe(setting: Setting) -> Any:
    return run_linear_probe(setting, setting.source, None)


TASKS: list[Callable[[Setting], Any]] = [
    lambda setting: run_zero_shot(setting, None, ["{}"]),
    lambda setting: run_retrieval(setting)[0],
    probe,
    lambda setting: run_knn(setting, setting.source, None),
]


@pytest.mark.parametrize("run", TASKS, ids=["zero-shot", "retrieval", "linear-probe", "knn"])
def test_too_many_unreadable_samples_are_refused(run: Callable[[Setting], Any], tmp_path: Path) -> None:
    result = run(setting(shard(tmp_path / "few.tar", 2)))
    assert (result.data.samples, result.data.unreadable) == (18, 2)
    many = shard(tmp_path / "many.tar", 3)
    with pytest.raises(Refused, match=r"^3 of the 20 samples of \S*many.tar could not be read, more than 10%, .*allow"):
        run(setting(many))
    result = run(setting(many, allowed_unreadable=1.0))
    assert (result.data.samples, result.data.unreadable) == (17, 3)
    result.save(tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text())["data"]["unreadable"] == 3


def test_a_probe_needs_its_training_samples_too(tmp_path: Path) -> None:
    good, bad = setting(shard(tmp_path / "good.tar", 0)), shard(tmp_path / "bad.tar", 5)
    with pytest.raises(Refused, match=r"5 of the 20 samples of .*bad\.tar"):
        run_linear_probe(good, open_source(str(bad)), None)
    few = open_source(str(shard(tmp_path / "few.tar", 1)))
    assert run_linear_probe(good, few, None).metrics["train_unreadable"] == 1
