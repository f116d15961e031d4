"""Selective activation checkpointing: what the policy keeps runs once, everything else in the region twice."""

from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import torch
from op_checks import served_by
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import evakernels
from evakernels import backends

WIDTH, HEADS = 8, 2
RUNS = {"layer_norm_forward": 2, "rope_attention_forward": 1, "swiglu_forward": 1, "gelu_forward": 1}
"""How often each op computes without a checkpoint."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.norm2 = evakernels.nn.LayerNorm(WIDTH), evakernels.nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.ModuleList(nn.Linear(*sizes) for sizes in ((WIDTH, 2 * WIDTH), (WIDTH, WIDTH), (WIDTH, WIDTH)))

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).unbind(2)
        branch = self.proj(evakernels.rope_attention(q, k, v, causal=True).flatten(2))
        y, x = evakernels.add_layer_norm(x, branch, self.norm2.weight, self.norm2.bias)
        hidden = evakernels.swiglu(*self.mlp[0](y).chunk(2, -1))
        return x + self.mlp[2](evakernels.gelu(self.mlp[1](hidden)))


@contextmanager
def counted():
    """How often each op of the block computes."""
    runs = Counter()

    def counting(name, function):
        return lambda *args: (runs.update([name]), function(*args))[1]

    with ExitStack() as stack:
        for name in RUNS:
            function = backends._implementations[name]["reference"].function
            implementation = backends.Implementation("reference", counting(name, function), lambda *args: [])
            stack.enter_context(served_by(name, {"reference": implementation}))
        yield runs


def step(function, block):
    x = torch.linspace(-1, 1, 2 * 5 * WIDTH).view(2, 5, WIDTH).sin().requires_grad_()
    with counted() as runs:
        out = function(x)
        gradients = torch.autograd.grad(out.square().sum(), [x, *block.parameters()])
    return dict(runs), [out.detach(), *gradients]


def checkpointed(block, *given):
    contexts = partial(create_selective_checkpoint_contexts, evakernels.checkpoint_policy(*given))
    return lambda x: checkpoint(block, x, use_reentrant=False, context_fn=contexts)


KEPT = {
    "attention": ((), ["rope_attention_forward"]),
    "named": (
        (["add_layer_norm", torch.ops.aten.addmm.default],),
        ["layer_norm_forward"],
    ),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("given", "kept"), KEPT.values(), ids=KEPT)
def test_saved_ops_run_once_with_equal_gradients(given, kept, compiled):
    torch.manual_seed(0)
    torch._dynamo.reset()
    block = Block()
    runs, expected = step(block, block)
    assert runs == RUNS
    function = checkpointed(block, *given)
    function = torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function
    runs, found = step(function, block)
    assert runs == {name: count if name in kept else 2 * count for name, count in RUNS.items()}
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "kind", "name"),
    [
        ("rope_atention", ValueError, "'rope_attention'"),
        ([torch.ops.aten.mm], TypeError, "save"),
        (torch.mm, TypeError, "save"),
        ([3], TypeError, "save"),
    ],
)
def test_checkpoint_policy_wrong_op_raises(given, kind, name):
    with pytest.raises(kind, match=f"^checkpoint_policy: .*{name}"):
        evakernels.checkpoint_policy(given)
