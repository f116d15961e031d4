"""Attention of the first tokens' queries alone, which no kernel rotates: beside that of all queries."""

import pytest
import torch
from on_device import DEVICE
from test_rope_attention import BATCH, GRID, PATCHES, packed, tables

import evakernels


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("kind", ["shared", "heads", "compact"])
@pytest.mark.parametrize("dropped", [False, True])
def test_queries_of_the_first_tokens_alone(kind, interleaved, queries, dropped):
    patches = PATCHES if kind != "compact" else GRID**2
    index = torch.stack([torch.randperm(patches)[:4] for _ in range(BATCH)]) if dropped else None
    cos, sin = tables(kind)
    qkv = packed(2, 4 if dropped else patches).to(DEVICE).requires_grad_()
    options = {"token_index": index, "num_prefix": 2, "interleaved": interleaved}
    options = {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in options.items()}

    def attended(count):
        q, k, v = qkv.unbind(2)
        out = evakernels.rope_attention(q[:, :count], k, v, cos.to(DEVICE), sin.to(DEVICE), **options)[:, :queries]
        return out, *torch.autograd.grad((out * out.detach().cos()).sum(), qkv)

    torch.testing.assert_close(attended(queries), attended(qkv.shape[1]), rtol=1e-10, atol=1e-12)


def first(**changes):
    """One query of five tokens, four of which a table rotates."""
    table = torch.ones(4, 4)
    k = torch.ones(2, 5, 3, 8)
    return evakernels.rope_attention(k[:, :1], k, k, **{"cos": table, "sin": table, "num_prefix": 1} | changes)


def test_it_compiles_without_a_break():
    index = torch.tensor([[3, 1, 2, -1]] * 2)
    compiled = torch.compile(first, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(token_index=index), first(token_index=index))
