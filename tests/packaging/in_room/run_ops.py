"""One op of each family, forward and backward, on the compiled library; prints their names.

Attention over packed sequences and the norm of gradients have no kernels for CPUs: they run on what serves them.
"""

import contextlib
from collections.abc import Callable

import torch

import evakernels as ek


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, requires_grad=True)


def rope_attention() -> torch.Tensor:
    q, k, v = (numbers(2, 17, 2, 32) for _ in range(3))
    return ek.rope_attention(q, k, v, *ek.nn.axial_rope(4, 4, head_dim=32), num_prefix=1)


def packed_attention() -> torch.Tensor:
    q, k, v = (numbers(7, 2, 32) for _ in range(3))
    return ek.packed_attention(q, k, v, torch.tensor([0, 3, 7]), max_length=4)


def lamb() -> torch.Tensor:
    parameter = torch.nn.Parameter(torch.ones(5))
    parameter.grad = torch.ones(5)
    before = parameter.detach().clone()
    ek.optim.Lamb([parameter], lr=0.1).step()
    assert not torch.equal(before, parameter)
    return parameter.sum()


def adamw() -> torch.Tensor:
    parameter = torch.nn.Parameter(torch.ones(5))
    parameter.grad = torch.ones(5)
    ek.optim.AdamW([parameter], lr=0.1).step()
    assert (parameter < 1).all()
    return parameter.sum()


def token_dropout() -> torch.Tensor:
    index = ek.sample_token_index(2, 16, 8)
    return ek.token_dropout(numbers(2, 16, 32), index, prefix=numbers(1, 32), pos_embed=numbers(17, 32))


FAMILIES: dict[str, tuple[str | None, Callable[[], torch.Tensor]]] = {
    "layer_norm": ("cpu", lambda: ek.layer_norm(numbers(4, 32), numbers(32), numbers(32))),
    "add_layer_norm": ("cpu", lambda: ek.add_layer_norm(numbers(4, 32), numbers(4, 32), numbers(32), numbers(32))[0]),
    "swiglu": ("cpu", lambda: ek.swiglu(numbers(4, 32), numbers(4, 32))),
    "gelu": ("cpu", lambda: ek.gelu(numbers(4, 32), numbers(32))),
    "rope_attention": ("cpu", rope_attention),
    "packed_attention": (None, packed_attention),
    "contrastive": ("cpu", lambda: ek.clip_loss(numbers(6, 8), numbers(6, 8), torch.tensor(10.0))),
    "token_dropout": ("cpu", token_dropout),
    "lamb": ("cpu", lamb),
    "adamw": ("cpu", adamw),
    "gradient_norm": (None, lambda: ek.gradient_norm([torch.ones(4)]).requires_grad_()),
}

torch.manual_seed(0)
for name, (backend, run) in FAMILIES.items():
    with ek.use_backend(backend) if backend else contextlib.nullcontext():
        out = run()
        out.sum().backward()
    assert out.isfinite().all(), name
    print(name)

# The Python module reaches the same kernels.
from evakernels import _C  # noqa: E402

x, y = torch.ones(2, 4).numpy(), torch.empty(2, 4).numpy()
_C.gelu_forward(x, None, y)
assert abs(float(y[0, 0]) - 0.8413) < 1e-4
