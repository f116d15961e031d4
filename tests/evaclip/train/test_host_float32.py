"""One rule for products of float32 on a GPU."""

from collections.abc import Iterator

import pytest
import torch

from evaclip.train.config import LossConfig
from evaclip.train.host import prepare
from evakernels import backends, set_loss_products


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]
    set_loss_products("ieee")


@pytest.mark.parametrize(("precision", "rounded"), [("highest", False), ("high", True)])
def test_convolutions_round_as_other_products_do(precision: str, rounded: bool) -> None:
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = not rounded
    prepare(torch.device("cpu"), 0)
    assert torch.backends.cudnn.allow_tf32 == rounded
    assert torch.backends.cuda.matmul.allow_tf32 == rounded


def test_a_run_says_how_its_loss_multiplies() -> None:
    prepare(torch.device("cpu"), 0, LossConfig(products="tf32x3").products)
    assert backends.loss_products == "tf32x3"
    prepare(torch.device("cpu"), 0)
    assert backends.loss_products == "ieee"
