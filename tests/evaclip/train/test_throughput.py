"""What the device could do."""

import pytest
import torch

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


def test_a_cpu_is_measured() -> None:
    assert 1e8 < peak_flops(torch.device("cpu"), "fp32") < 1e14
