"""An index that only the Triton kernels can check, on their PTX."""

import os

import pytest
import torch

import evakernels
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


def test_unrotated_token_around_a_tile_is_cheap():
    """A token before whole tiles costs no row and column of tiles."""
    from benchmarks.audit.count import served

    instructions = {}
    with served("sm_90", "triton") as reports:
        for tokens in (128, 129):
            q = torch.ones(1, tokens, 1, 64).bfloat16()
            reports.clear()
            evakernels.rope_attention(q, q, q)
            instructions[tokens] = sum(report.instructions for report in reports)
    assert instructions[129] < 2.2 * instructions[128]
