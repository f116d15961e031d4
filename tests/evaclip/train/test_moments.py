"""The optimizer's state goes to the disk and comes back by name."""

from pathlib import Path
from typing import Any

import pytest
import torch
from contrastive_step import groups_of

from evaclip.errors import UserError
from evaclip.model.clip import CLIP
from evaclip.train import moments, tensor_files
from evaclip.train.config import OptimConfig
from evaclip.train.optimizer import build_optimizer


def stepped(model: CLIP, config: OptimConfig) -> torch.optim.Optimizer:
    optimizer = build_optimizer(groups_of(model, config), config)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


def saved(model: CLIP, optimizer: torch.optim.Optimizer, folder: Path) -> Any:
    tensors, scalars = moments.take(model, optimizer)
    tensor_files.write_parts(tensors, folder, 0, 1)
    return scalars


@pytest.mark.parametrize("name", ["adamw", "lamb"])
def test_moments_come_back_and_rates_stay(small_model: CLIP, name: Any, tmp_path: Path) -> None:
    first = stepped(small_model, OptimConfig(name=name, lr=1e-2))
    scalars = saved(small_model, first, tmp_path)
    # Other groups, in another order.
    config = OptimConfig(name=name, lr=2e-2, weight_decay=0.3, visual={"layer_decay": 0.5})  # type: ignore[arg-type]
    second = build_optimizer(groups_of(small_model, config), config)
    moments.put_back(small_model, second, tmp_path, scalars)
    for parameter in small_model.parameters():
        for kind, value in first.state[parameter].items():
            assert torch.equal(second.state[parameter][kind], value)
            assert second.state[parameter][kind].dtype == value.dtype
    assert max(group["peak_lr"] for group in second.param_groups) == 2e-2


def test_what_is_locked_by_now_has_no_moments(small_model: CLIP, tmp_path: Path) -> None:
    scalars = saved(small_model, stepped(small_model, OptimConfig()), tmp_path)
    small_model.lock_image_tower()
    second = build_optimizer(groups_of(small_model, OptimConfig()), OptimConfig())
    moments.put_back(small_model, second, tmp_path, scalars)
    trained = [parameter for parameter in small_model.parameters() if parameter.requires_grad]
    assert second.state.keys() == set(trained)
    assert all(second.state[parameter].keys() == {"step", "exp_avg", "exp_avg_sq"} for parameter in trained)


def test_moments_of_another_model_are_refused(small_model: CLIP, tmp_path: Path) -> None:
    optimizer = stepped(small_model, OptimConfig())
    scalars = saved(small_model, optimizer, tmp_path)
    del small_model.visual.head
    with pytest.raises(UserError, match=r"no parameter visual\.head\.bias"):
        moments.put_back(small_model, optimizer, tmp_path, scalars)
