"""How much of the attention kernels' matrix products is of use, and what they refuse; counted in the interpreter."""

import math

import pytest
import torch

import evakernels
from evakernels import backends
from evakernels.triton import INTERPRETED

pytestmark = [
    pytest.mark.exhaustive,
    pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter, started by test_triton_kernels.py"),
]

TOKENS, HEAD_DIM = 257, 64


def launches_of(tokens):
    """Forward and backward of one head behind a class token."""
    from evakernels.triton._counting import counting

    qkv = torch.randn(1, tokens, 3, 1, HEAD_DIM, generator=torch.Generator().manual_seed(0)).requires_grad_()
    cos, sin = evakernels.nn.axial_rope(math.isqrt(tokens), math.isqrt(tokens), HEAD_DIM, compact=True)
    with evakernels.use_backend("triton"), counting() as launches:
        out = evakernels.rope_attention(*qkv.unbind(2), cos, sin, num_prefix=1)
        out.sum().backward()
    return launches


def test_a_class_token_costs_no_tiles_of_its_own():
    """257 tokens: products of 257 queries with 256 keys, or the other way round, in tiles of 272 by 256."""
    products = {"forward_kernel": 2, "query_kernel": 3, "key_kernel": 4}
    for launch in launches_of(TOKENS):
        useful = products[launch.kernel] * 2 * TOKENS * (TOKENS - 1) * HEAD_DIM
        assert 0.9 < useful / launch.flops <= 1, launch.kernel


def test_results_are_written_once():
    for launch in launches_of(TOKENS):
        for name, traffic in launch.tensors.items():
            assert traffic.stored == traffic.stored_once, (launch.kernel, name)


def test_reasons():
    def why_not(head_dim, scale):
        x = torch.ones(1, 2, 1, head_dim)
        return backends.why_not("rope_attention_forward", "triton", x, x, x, None, None, None, 0, False, True, scale)

    assert why_not(128, 1.0) == []
    assert why_not(136, 1.0) == ["head_dim 136 is not one of 1 to 128"]
    assert why_not(64, -1.0) == ["scale -1.0 is not positive"]
