"""Attention under `as_torch_operators`: torch's own attention, in exported and in compiled programs."""

import subprocess
import sys
from contextlib import nullcontext

import pytest
import test_packed_attention as of_packed_batch
import test_rope_attention as of_images
import torch
import torch.nn.functional as F
from op_checks import error, exhaustive_but
from torch import Tensor, nn

import evakernels

SDPA = torch.ops.aten.scaled_dot_product_attention.default
CASES = [*of_images.CASES, *of_packed_batch.CASES]
QUICK = "text", "dropout", "heads-share-keys", "fewer-keys-causal", "causal", "rows-one-key-head"


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *given):
        return self.function(*given)


def assert_attention_is_torchs(graph, calls=1):
    targets = [node.target for node in graph.nodes if node.op == "call_function"]
    assert [target in (SDPA, F.scaled_dot_product_attention) for target in targets].count(True) == calls
    names = " ".join(map(str, targets)).replace("expand", "")
    assert not [name for name in ("softmax", "bmm", "matmul", "exp", "evakernels") if name in names]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("pair", "inputs"), exhaustive_but(CASES, *QUICK))
def test_export_contains_torchs_attention(pair, inputs, grad):
    ours, qkv = pair[0], inputs[0].float()
    with torch.set_grad_enabled(grad), evakernels.as_torch_operators():
        program = torch.export.export(Calls(ours), (qkv.requires_grad_(grad),))
    assert_attention_is_torchs(program.graph)
    qkv = qkv.detach()
    torch.testing.assert_close(program.module()(qkv), ours(qkv), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("pair", "inputs"), CASES)
def test_in_bfloat16_the_error_is_at_most_twice_torchs(pair, inputs):
    (ours, theirs), qkv = pair, inputs[0].bfloat16()
    with evakernels.as_torch_operators():
        found = ours(qkv)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous()
    exact = theirs(qkv.double())
    assert error(found, exact) <= 2 * error(theirs(qkv), exact) + torch.finfo(torch.bfloat16).eps * exact.abs().max()


def test_batch_sizes_stay_dynamic():
    images, _ = of_images.pair()
    qkv = of_images.packed(dtype=torch.float32)
    free = torch.export.Dim("free")

    def text(qkv: Tensor, offsets: Tensor) -> Tensor:
        return evakernels.packed_attention(*qkv.unbind(1), offsets, max_seqlen=9)

    packed = torch.randn(9, 3, 2, 8, generator=torch.Generator().manual_seed(0))
    with evakernels.as_torch_operators():
        of_batch = torch.export.export(Calls(images), (qkv,), dynamic_shapes=(({0: free},),)).module()
        given = packed[:5], torch.tensor([0, 3, 5])
        sizes = {0: torch.export.Dim("tokens")}, {0: torch.export.Dim("ends", min=3)}
        program = torch.export.export(Calls(text), given, dynamic_shapes=(sizes,))
    assert_attention_is_torchs(program.graph)
    for other in (qkv[:1], qkv.repeat(2, 1, 1, 1, 1)):
        torch.testing.assert_close(of_batch(other), images(other), rtol=1e-5, atol=1e-5)
    offsets = torch.tensor([0, 4, 4, 9])
    torch.testing.assert_close(program.module()(packed, offsets), text(packed, offsets), rtol=1e-5, atol=1e-5)


LOAD = """
import sys, torch
package, numbers, name = sys.argv[1:]
if name == "ours":
    import evakernels
x, expected = torch.load(numbers)
torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), expected)
assert ("evakernels" in sys.modules) == (name == "ours")
"""


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("name", ["ours", "torchs"])
def test_aoti_package_runs(name, tmp_path):
    """A package of our op needs this library's import; one of torch's operators runs without it."""
    norm, x = evakernels.nn.LayerNorm(8).eval(), torch.linspace(-1, 1, 16).view(2, 8)
    package, numbers = str(tmp_path / "package.pt2"), tmp_path / "numbers.pt"
    with torch.no_grad(), evakernels.as_torch_operators() if name == "torchs" else nullcontext():
        torch._inductor.aoti_compile_and_package(torch.export.export(norm, (x,)), package_path=package)
        torch.save((x, norm(x)), numbers)
    subprocess.run([sys.executable, "-c", LOAD, package, numbers, name], check=True)
