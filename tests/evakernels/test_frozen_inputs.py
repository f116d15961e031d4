"""Gradients of inputs that require none, such as frozen weights, are neither computed nor allocated."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from on_device import DEVICE
from op_checks import assert_opcheck, randn, served_by

import evakernels
from evakernels import backends

ROWS, VECTOR = (2, 5, 24), (24,)
KEPT = torch.tensor([[4, 0, 2], [1, 2, 3]], device=DEVICE)
SCALE = torch.tensor([0.0, 2.0], device=DEVICE)


def joined(function, scaled=True):
    def call(residual, branch, weight, bias, layer_scale=None):
        given = {"layer_scale": layer_scale, "row_scale": SCALE} if scaled else {}
        return function(residual, branch, weight, bias, **given)

    return call


def dropout(patches, prefix, pos_embed, token_index=KEPT):
    return evakernels.token_dropout(patches, token_index, prefix=prefix, pos_embed=pos_embed)


NORM = (ROWS, ROWS, VECTOR, VECTOR, VECTOR)
PATCHES = (ROWS, (1, 24), (6, 24))
CASES = {
    "layer_norm": ("layer_norm_backward", evakernels.layer_norm, (ROWS, VECTOR, VECTOR), {1: 2, 2: 3}),
    "rms_norm": ("layer_norm_backward", evakernels.rms_norm, (ROWS, VECTOR), {1: 2}),
    "add_layer_norm": ("layer_norm_backward", joined(evakernels.add_layer_norm), NORM, {1: 1, 2: 2, 3: 3, 4: 4}),
    "add_layer_norm, unscaled": (
        "layer_norm_backward",
        joined(evakernels.add_layer_norm, False),
        NORM[:4],
        {2: 2, 3: 3},  # the branch's is that of the residual
    ),
    "layer_norm_add": ("layer_norm_backward", joined(evakernels.layer_norm_add), NORM, {2: 2, 3: 3, 4: 4}),
    "swiglu": ("swiglu_backward", evakernels.swiglu, (ROWS, ROWS, VECTOR, VECTOR), {2: 2, 3: 3}),
    "gelu": ("gelu_backward", evakernels.gelu, (ROWS, VECTOR), {1: 1}),
    "token_dropout": ("token_dropout_backward", dropout, PATCHES, {0: 0, 1: 1, 2: 2}),
    "token_dropout of all": ("token_dropout_backward", lambda *x: dropout(*x, None), PATCHES, {1: 1, 2: 2}),
}
"""The op, its caller, the shapes of the inputs, and by input the place of a gradient that the op can omit."""
FROZEN = [pytest.param(name, i, id=f"{name}-{i}") for name, (*_, places) in CASES.items() for i in places]
BACKENDS = pytest.mark.parametrize("backend", [None, "reference"])


@contextmanager
def recorded(op):
    """The calls of `op`: arguments and results."""
    calls = []

    def recording(implementation):
        def function(*args):
            calls.append((args, implementation.function(*args)))
            return calls[-1][1]

        return replace(implementation, function=function)

    with served_by(op, {name: recording(found) for name, found in backends._implementations[op].items()}):
        yield calls


def on(backend):
    """None leaves the choice of the backend to the op."""
    return nullcontext() if backend is None else evakernels.use_backend(backend)


def gradients(name, *frozen, function=None):
    _, plain, shapes, _ = CASES[name]
    leaves = [randn(*shape, seed=seed).float().to(DEVICE) for seed, shape in enumerate(shapes)]
    leaves = [leaf.requires_grad_(i not in frozen) for i, leaf in enumerate(leaves)]
    outputs = (function or plain)(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [randn(*out.shape, seed=10 + i).float().to(DEVICE) for i, out in enumerate(outputs)]
    torch.autograd.backward(outputs, cotangents)
    return [leaf.grad for leaf in leaves]


def is_left_out(gradient):
    """Whether it wasn't computed: kernels leave it None, the references empty."""
    return gradient is None or gradient.numel() == 0


@BACKENDS
@pytest.mark.parametrize(("name", "i"), FROZEN)
def test_frozen_input_has_empty_gradient(name, i, backend):
    op, _, shapes, places = CASES[name]
    with on(backend), recorded(op) as calls:
        expected, actual = gradients(name), gradients(name, i)
    (_, (*every,)), (_, (*without,)) = calls
    assert every[places[i]].numel() == torch.Size(shapes[i]).numel()
    assert is_left_out(without[places[i]])
    for n, (a, b) in enumerate(zip(actual, expected, strict=True)):
        assert a is None if n == i else torch.equal(a, b)


@BACKENDS
@pytest.mark.parametrize("name", CASES)
def test_frozen_inputs_change_no_other_gradient(name, backend):
    with on(backend):
        every, inputs = gradients(name), range(len(CASES[name][2]))
        for frozen in ((0,), inputs[1:], inputs[:-1]):
            for n, (a, b) in enumerate(zip(gradients(name, *frozen), every, strict=True)):
                assert a is None if n in frozen else torch.equal(a, b)


@pytest.mark.parametrize(("name", "i"), [(name, next(reversed(places))) for name, (*_, places) in CASES.items()])
def test_frozen_input_compiled(name, i):
    op, function, _, places = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with recorded(op) as calls:
        actual = gradients(name, i, function=compiled)
    assert all(is_left_out(result[places[i]]) for _, result in calls)
    for a, b in zip(actual, gradients(name, i), strict=True):
        assert a is b is None or torch.equal(a, b)


@pytest.mark.parametrize("name", CASES)
def test_opcheck_without_gradients(name):
    op, *_ = CASES[name]
    with recorded(op) as calls:
        gradients(name)
    (given, _), *_ = calls
    given = [[False] * len(t) if isinstance(t, list | tuple) else t for t in given]
    arguments = [t.detach() if isinstance(t, torch.Tensor) else t for t in given]
    assert_opcheck(getattr(torch.ops.evakernels, op).default, tuple(arguments))


def test_branch_is_saved_only_for_layer_scale():
    def kept(*frozen):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            gradients("add_layer_norm", *frozen)
        return sum(sizes)

    assert kept() - kept(4) == torch.Size(ROWS).numel()
