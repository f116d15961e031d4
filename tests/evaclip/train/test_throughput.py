"""What the device could do."""

import dataclasses

import pytest
import torch
from torch import nn

from evaclip.model.clip import CLIP
from evaclip.model.norm import Stream
from evaclip.train import throughput
from evaclip.train.config import LossConfig
from evaclip.train.loss import ContrastiveLoss
from evaclip.train.tasks.contrastive import Contrastive
from evaclip.train.throughput import peak_flops


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12, 67e12),
        ("NVIDIA H100 PCIe", 756e12, 51e12),
        ("NVIDIA A100-SXM4-80GB", 312e12, 19.5e12),
        ("NVIDIA L40S", 362e12, 91.6e12),
        ("NVIDIA A10", 125e12, 31.2e12),
    ],
)
def test_data_sheet(monkeypatch: pytest.MonkeyPatch, name: str, half: float, single: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    cuda = torch.device("cuda")
    assert peak_flops(cuda, "amp_bf16") == half
    assert peak_flops(cuda, "fp16") == half
    assert peak_flops(cuda, "fp32") == single


def test_peak_of_a_cpu_is_measured_once() -> None:
    throughput._measure_peak.cache_clear()
    before = torch.get_rng_state()
    found = peak_flops(torch.device("cpu"), "fp32")
    assert 1e8 < found < 1e14
    assert peak_flops(torch.device("cpu"), "fp32") == found
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_tokens_are_the_rows_that_reach_the_blocks(small_model: CLIP, pack: bool, dropout: float) -> None:
    rows: list[int] = []

    def count(block: nn.Module, arguments: tuple[Stream, ...]) -> None:
        rows.append(arguments[0].x.shape[:-1].numel())

    small_model.set_savings(dataclasses.replace(small_model.visual.savings, pack_text=pack))
    small_model.visual.patch_dropout = dropout
    for blocks in (small_model.visual.blocks, small_model.text.transformer.resblocks):
        blocks[0].register_forward_pre_hook(count)
    tokens = torch.zeros(3, small_model.config.text.context_length, dtype=torch.int64)
    for row, end in enumerate((2, 9, 5)):
        tokens[row, end] = 49_407
    small_model.train()(torch.randn(3, 3, 16, 16), tokens)
    assert Contrastive(small_model, ContrastiveLoss(LossConfig())).tokens_computed(tokens) == sum(rows)
