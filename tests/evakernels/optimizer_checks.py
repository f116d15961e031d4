"""Lists of tensors for the optimizers' tests, and steps on them."""

from contextlib import nullcontext

import torch
from on_device import COMPILED
from torch import nn

import evakernels
from evakernels.optim import AdamW

SHAPES = [(4, 3), (5,), (), (2, 3, 2)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FLOAT32 = (torch.float32,) * 4
MIXES = [
    (a, b, DTYPES[(i + j) % 3], DTYPES[(i + 2 * j) % 3]) for i, a in enumerate(DTYPES) for j, b in enumerate(DTYPES)
]
"""Dtypes of four lists of tensors, with all pairs of dtypes in any two lists."""
# Around the CPU kernel's block (1,024) and chunk (16,384), of which the GPU's (8,192) is a half; and nothing at all.
SIZES = [1, 7, 37, 0, 1024, 1061, 16384, 3 * 16384 + 5]
BUFFERS = ("params", "grads", "exp_avgs", "exp_avg_sqs")
BETAS, EPS = (0.9, 0.98), 1e-6
VARIANTS = ("deepspeed", "nvlamb")
LRS, DECAYS = [0.1, 0.02, 0.3, 0.05], [0.05, 0.0, 0.0, 0.2]


def tensors(seed: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in SHAPES]


def parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def optimizer_of(params, kind=AdamW, lrs=LRS, decays=DECAYS, **options):
    """Every parameter in a group of its own, as layer-wise learning rates make it."""
    leaves = [nn.Parameter(p.detach().clone()) for p in params]
    groups = [{"params": [p], "lr": lr, "weight_decay": d} for p, lr, d in zip(leaves, lrs, decays, strict=True)]
    return kind(groups, betas=BETAS, eps=EPS, **options)


def step(optimizer: torch.optim.Optimizer, grads: list[torch.Tensor]) -> None:
    for param, grad in zip(parameters(optimizer), grads, strict=True):
        param.grad = grad.to(param.dtype)
    optimizer.step()


def lists(dtypes=FLOAT32, sizes=SIZES):
    """params, grads, exp_avgs, exp_avg_sqs as after some steps, and the steps."""
    generator = torch.Generator().manual_seed(0)
    scales = (1.0, 0.1, 0.05, 0.01)
    buffers = [
        [(scale * torch.randn(size, generator=generator)).to(dtype) for size in sizes]
        for scale, dtype in zip(scales, dtypes, strict=True)
    ]
    buffers[3] = [v.abs() for v in buffers[3]]
    return [*buffers, [torch.tensor(float(3 + i)) for i in range(len(sizes))]]


def update(
    state, kind, backend=COMPILED, lrs=None, decays=None, betas=BETAS, eps=EPS, scale=None, found_inf=None, **rounding
):
    """One step of the lists by "adamw", "lamb_step", or both phases of LAMB, whose squared norms it returns.

    Unless rates are given every tensor has its own, the second no decay. `backend` of None is the best there is. AdamW
    has no compiled kernels: its reference stands for them.
    """
    if kind == "adamw" and backend not in ("triton", None):
        backend = "reference"
    numbers = range(len(state[0]))
    lrs = [0.01 * (i + 1) for i in numbers] if lrs is None else lrs
    decays = decays or [0.0 if i == 1 else 0.05 for i in numbers]
    scale, found_inf = (None if value is None else torch.tensor(value) for value in (scale, found_inf))
    options = {"betas": betas, "eps": eps, "found_inf": found_inf} | ({"variant": kind} if kind in VARIANTS else {})
    with nullcontext() if backend is None else evakernels.use_backend(backend):
        if kind == "adamw":
            evakernels.adamw_update(*state, lrs, decays, grad_scale=scale, **options, **rounding)
            return torch.zeros(())
        if kind == "lamb_step":
            evakernels.lamb_step(*state, lrs, decays, grad_scale=scale, **options, **rounding)
            return torch.zeros(())
        norms = evakernels.lamb_update(*state, decays, grad_scale=scale, **options)
        evakernels.lamb_apply(state[0], *state[2:], norms, lrs, decays, **options, **rounding)
    return norms


def everything(state, *more):
    return [*more, *(t for tensors_ in state for t in tensors_)]


def assert_states_close(ours, theirs, lr_of_last=0.1):
    for name, got, expected in zip((*BUFFERS, "steps"), ours, theirs, strict=True):
        # A rounding unit of the numbers that were added: params are about 1, moments below 0.1.
        slack = 2e-6 * lr_of_last if name == "params" else 2e-8
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=slack, msg=lambda m, n=name: f"{n}: {m}")


def assert_same_state(ours, theirs, tolerance):
    for a, b in zip(parameters(ours), parameters(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        for name, value in theirs.state[b].items():
            torch.testing.assert_close(ours.state[a][name], value, rtol=tolerance, atol=tolerance)


def assert_compiles_in_place(function) -> None:
    """Without a graph break, to the bit; what is written and what is returned."""

    def run(function):
        state = [*(tensors(seed) for seed in (0, 1)), *([t.abs() for t in tensors(seed)] for seed in (2, 3))]
        state.append([torch.ones(()) for _ in SHAPES])
        return [function(*state), *everything(state)]

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(function), run(compiled), strict=True):
        assert torch.equal(a, b)


C, ONE = torch.ones(4), torch.ones(())
STATE = {"params": [C], "exp_avgs": [C], "exp_avg_sqs": [C], "steps": [ONE], "weight_decays": [0.0]}
CALL = STATE | {"betas": (0.9, 0.99), "eps": 1e-8, "found_inf": ONE}
"""A right call of an optimizer's op, but for what only some of them take."""
