"""What the Triton kernels do where no model goes, and what they refuse, by their PTX.

What they read and write is audited: tests/benchmarks/test_bench_triton_audit.py.
"""

import os

import pytest
import torch

import evakernels
from evakernels.triton import launcher

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif("TRITON_PTX" not in os.environ, reason="started by test_ptx_kernels.py"),
]

SECTOR = 32


@pytest.fixture(scope="module", autouse=True)
def reports():
    from benchmarks.audit.count import served

    with served("sm_90", "triton") as found:
        yield found


def test_many_tiles_merge_to_log_sum_exps(reports):
    from evakernels.triton import contrastive

    generator = torch.Generator().manual_seed(0)
    maxima, sums = 10 * torch.randn(37, 70, generator=generator), torch.rand(37, 70, generator=generator) + 0.5
    maximum, lse = torch.empty(2, 70)
    contrastive._merge(torch.stack([maxima, sums]), maximum, lse, final=True)
    assert torch.equal(maximum, maxima.amax(0))
    torch.testing.assert_close(lse.double(), (maxima.double() + sums.double().log()).logsumexp(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("wrong", [-1, 4])
def test_index_out_of_range_gives_nan(reports, wrong):
    from benchmarks.audit.count import launch_of, spans_of

    patches, token_index = torch.ones(2, 4, 8), torch.tensor([[0, 3], [1, wrong]])
    reports.clear()
    out = launcher("token_dropout_forward")(patches, token_index, None, torch.ones(4, 8))
    (launch,) = (launch_of(report, spans_of({"patches": [patches]})) for report in reports)
    assert out[1, 1].isnan().all()
    assert out.isnan().sum() == 8
    assert launch.loads["patches"].touched == 3  # each row is a sector


def test_class_token_adds_no_tiles_with_88_channels(reports):
    """257 tokens: products of 257 queries with 256 keys, or the other way round, in tiles of 272 by 256. 88 channels
    are multiplied as 128, and the class token's tile of 16 rows in each of several warps."""
    from benchmarks.audit.count import launch_of

    tokens, products = 257, {"forward_kernel": 2, "dq_kernel": 3, "dkdv_kernel": 4}
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, tokens, 3, 1, 88, generator=generator).bfloat16().requires_grad_()
    cos, sin = evakernels.nn.axial_rope(16, 16, 88, compact=True)
    reports.clear()
    evakernels.rope_attention(*qkv.unbind(2), cos, sin, num_prefix=1).sum().backward()
    made = {launch.kernel: launch.flops for launch in (launch_of(report, {}) for report in reports) if launch.flops}
    useful = {kernel: products[kernel] * 2 * tokens * (tokens - 1) * 88 / flops for kernel, flops in made.items()}
    least = {"forward_kernel": 0.41, "dq_kernel": 0.37, "dkdv_kernel": 0.41}
    assert {kernel: share for kernel, share in useful.items() if not least[kernel] < share <= 1} == {}, useful
    assert useful.keys() == least.keys()
