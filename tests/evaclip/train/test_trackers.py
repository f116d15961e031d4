"""Weights & Biases: what is logged there, and what a run does without it or when it fails."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from test_progress import RECORD

from evaclip.errors import UserError
from evaclip.train import trackers
from evaclip.train.config import LogConfig, WandbConfig
from evaclip.train.sinks import Sink
from evaclip.train.trainer import train

WANDB = LogConfig(wandb=WandbConfig(project="p", mode="offline"))


def log_two_steps(config: LogConfig, folder: Path, first: int) -> None:
    messages: list[str] = []
    (sink,) = trackers.open_trackers(config, folder, "my-run", {"optim": {"lr": 0.123}}, messages.append)
    for step in (first, first + 1):
        sink.record(replace(RECORD, step=step, loss=1.0 / step))
    sink.evaluation(first + 1, {"top1": 0.5})
    sink.close(None)
    assert messages == []


def test_tracker_config_has_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = []
    monkeypatch.setattr(trackers, "Wandb", lambda config, folder, name, tree: shown.append(tree) or Sink())
    tree = {"data": {"train": "https://me:abc123@host/00.tar"}, "optim": {"lr": 0.1}}
    trackers.open_trackers(WANDB, tmp_path, "my-run", tree, print)
    assert shown == [{"data": {"train": "https://host/00.tar"}, "optim": {"lr": 0.1}}]


@pytest.mark.exhaustive
def test_wandb_offline(tmp_path: Path) -> None:
    wandb = pytest.importorskip("wandb", reason="the extra [wandb] is not installed")
    for first in (1, 3):
        log_two_steps(WANDB, tmp_path, first)
    # Its own process writes the files, and is waited for at exit alone.
    wandb.teardown()
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    # The same run to the service, although two processes had a part in it.
    assert len({path.name for path in files}) == 1
    for path in files:
        content = path.read_bytes()
        for expected in (b"my-run", b"train/loss", b"train/update_ratio_text", b"eval/top1", b"0.123"):
            assert expected in content, expected
        # Nothing was sampled: what is no number is left out.


@pytest.mark.parametrize(
    ("name", "value", "extra", "without"),
    [
        ("wandb", "{project: p}", "wandb", "null"),
        ("tensorboard", "true", "clip", "false"),
    ],
)
def test_missing_tracker_is_refused_first(name, value, extra, without, run_config, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    told = rf"^log\.{name} needs `pip install 'evakernels\[{extra}\]'`; log\.{name}={without} logs without it$"
    with pytest.raises(UserError, match=told):
        train(run_config(f"log.{name}={value}"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_service_that_fails_does_not_fail_the_run(fails, run_config, monkeypatch, capsys):
    def call(name: str) -> Callable[..., Any]:
        def function(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            if name == fails:
                raise ConnectionError("no\nroute")
            return run

        return function

    calls: list[str] = []
    run = SimpleNamespace(**{name: call(name) for name in ("log", "finish", "define_metric")})
    fake = SimpleNamespace(init=call("init"), Settings=dict)
    monkeypatch.setitem(sys.modules, "wandb", fake)  # type: ignore[arg-type]
    monkeypatch.setattr(trackers, "find_spec", lambda name: object())
    assert train(run_config("log.wandb={project: p}")).steps == 6
    told = "log.wandb failed and is left out from now on (ConnectionError: no route)"
    assert capsys.readouterr().out.count(told) == 1
    assert calls.count("log") == {"init": 0, "log": 1, "finish": 6}[fails]
