"""The first hour of somebody who puts single ops, and then all of them, into a model that is there already."""

import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, jvp

import evakernels
from evakernels import _C


def refused(kind: type[Exception], *parts: str, call: Any) -> None:
    try:
        call()
    except kind as exc:
        told = str(exc)
    else:
        raise AssertionError(f"nothing was raised where {parts} were expected")
    for part in parts:
        assert part in told, f"{part!r} is not in: {told}"
    assert "\n" not in told, told


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.mlp = nn.Sequential(nn.Linear(64, 128), nn.GELU("tanh"), nn.Linear(128, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


def main() -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(4, 9, 64), torch.rand(64), torch.randn(64)

    # The module in the place of torch's, with its state dict and its defaults.
    theirs, ours = nn.LayerNorm(64), evakernels.nn.LayerNorm(64)
    theirs.weight.data, theirs.bias.data = w.clone(), b.clone()
    ours.load_state_dict(theirs.state_dict())
    assert ours.eps == theirs.eps
    torch.testing.assert_close(ours(x * 1e-3), theirs(x * 1e-3))

    # Or on arrays of NumPy alone.
    array = np.ones(4, "f")
    _C.gelu_forward(array, None, array)
    torch.testing.assert_close(torch.from_numpy(array), nn.functional.gelu(torch.ones(4)))

    # What is no tensor, or no number, is named.
    refused(TypeError, "x", "ndarray", "torch.from_numpy", call=lambda: evakernels.layer_norm(np.ones((2, 4)), w, b))
    refused(TypeError, "x", "list", call=lambda: evakernels.rms_norm([1.0], w))
    refused(ValueError, "eps", "-1", call=lambda: evakernels.layer_norm(x, w, b, -1.0))
    refused(ValueError, "Cpu", "did you mean 'cpu'", call=lambda: evakernels.use_backend("Cpu").__enter__())
    assert "serves the call" in evakernels.explain("clip_loss", x[0], x[1])

    # Derivatives of every mode are those of torch.
    out, tangent = jvp(lambda x: evakernels.swiglu(x, x + 1), (x.double(),), (torch.ones_like(x).double(),))
    expected = jvp(lambda x: nn.functional.silu(x) * (x + 1), (x.double(),), (torch.ones_like(x).double(),))
    torch.testing.assert_close((out, tangent), expected)

    # A whole model, in place and back.
    model = nn.Sequential(Block(), Block()).eval()
    before, state = model(x), copy.deepcopy(model.state_dict())
    report = evakernels.accelerate(model, exclude="1.*")
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    assert "LayerNorm" in str(report)
    assert type(model[1].norm) is nn.LayerNorm
    refused(ValueError, "nrm", call=lambda: evakernels.accelerate(nn.Sequential(Block()), include="*.nrm"))
    parameters = dict(model.named_parameters())
    along = {name: torch.ones_like(value) for name, value in parameters.items()}
    _, slope = jvp(lambda p: functional_call(model, p, (x,)), (parameters,), (along,))
    evakernels.restore(model)
    _, wanted = jvp(lambda p: functional_call(model, p, (x,)), (parameters,), (along,))
    torch.testing.assert_close(slope, wanted, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    print("done")


if __name__ == "__main__":
    main()
