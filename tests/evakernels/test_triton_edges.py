"""An index that only the Triton kernels can check, on their PTX."""

import os

import pytest
import torch

from evakernels.triton import launcher

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif("TRITON_PTX" not in os.environ, reason="started by test_ptx_kernels.py"),
]


def test_index_out_of_range_gives_nan():
    from benchmarks.audit.count import launch_of, served, spans_of

    patches = torch.ones(2, 4, 8)
    with served("sm_90", "triton") as reports:
        for wrong in (-1, 4):
            reports.clear()
            token_index = torch.tensor([[0, 3], [1, wrong]])
            out = launcher("token_dropout_forward")(patches, token_index, None, torch.ones(4, 8))
            (launch,) = (launch_of(report, spans_of({"patches": [patches]})) for report in reports)
            assert out[1, 1].isnan().all()
            assert out.isnan().sum() == 8
            assert launch.loads["patches"].touched == 3  # each row is a sector of 32 bytes
