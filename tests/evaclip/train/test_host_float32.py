"""One rule for products of float32 on a GPU."""

from collections.abc import Iterator

import pytest
import torch

from evaclip.train.host import prepare


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize(("precision", "rounded"), [("highest", False), ("high", True)])
def test_convolutions_round_as_other_products_do(precision: str, rounded: bool) -> None:
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.allow_tf32 = not rounded
    prepare(torch.device("cpu"), 0)
    assert torch.backends.cudnn.allow_tf32 == rounded
    assert torch.backends.cuda.matmul.allow_tf32 == rounded
