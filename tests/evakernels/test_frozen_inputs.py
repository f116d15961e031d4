"""Gradients of inputs that require none, such as frozen weights, are neither computed nor allocated."""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from on_device import DEVICE
from op_checks import assert_opcheck, op_files, randn, served_by

import evakernels
from evakernels import backends


def cases():
    """Name, op of the backward pass, function and inputs."""
    for name in ("gelu", "layer_norm", "swiglu", "token_dropout"):
        module = op_files()[name]
        for case in module.CASES:
            (function, _), inputs = case.values
            if case.id in module.TRANSFORMED and sum(x is not None for x in inputs) > 1:
                yield f"{name}-{case.id}", f"{name}_backward", function, inputs


CASES = {name: case for name, *case in cases()}
PRESENT = {name: [i for i, x in enumerate(inputs) if x is not None] for name, (*_, inputs) in CASES.items()}
FROZEN = [pytest.param(name, i, id=f"{name}-{i}") for name, present in PRESENT.items() for i in present]
SCALED = "layer_norm-add_then_norm-layer-True-True"
OMITTED = {(SCALED, 1), ("token_dropout-dropped-True-True", 0), ("token_dropout-dropped-False-False", 0)}
"""Activations whose gradients are left out if not needed; the loops of other ops compute them anyway."""
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


def gradients(name, frozen=(), function=None):
    _, plain, inputs = CASES[name]
    leaves = [None if x is None else x.detach().clone().float().to(DEVICE) for x in inputs]
    leaves = [x if x is None else x.requires_grad_(i not in frozen) for i, x in enumerate(leaves)]
    outputs = (function or plain)(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    cotangents = [randn(*out.shape, seed=10 + i).float().to(DEVICE) for i, out in enumerate(outputs)]
    torch.autograd.backward(outputs, cotangents)
    return [None if leaf is None else leaf.grad for leaf in leaves]


def elements(results):
    """Computed elements: what isn't computed is None or empty."""
    return sum(x.numel() for x in ((results,) if isinstance(results, torch.Tensor) else results) if x is not None)


def is_omitted(name, i):
    return CASES[name][2][i].dim() < 3 or (name, i) in OMITTED


@BACKENDS
@pytest.mark.parametrize(("name", "i"), FROZEN)
def test_frozen_input_has_empty_gradient(name, i, backend):
    """Other gradients stay bit-equal, also where all but one input are frozen."""
    op, _, inputs = CASES[name]
    others = [n for n in PRESENT[name] if n != i]
    with nullcontext() if backend is None else evakernels.use_backend(backend), recorded(op) as calls:
        expected, without, alone = gradients(name), gradients(name, [i]), gradients(name, others)
    assert without[i] is None
    assert all(torch.equal(without[n], expected[n]) for n in others)
    assert torch.equal(alone[i], expected[i])
    full, reduced, *_ = (elements(results) for _, results in calls)
    assert not is_omitted(name, i) or full - reduced == inputs[i].numel()


@pytest.mark.parametrize("name", CASES)
def test_frozen_input_compiled(name):
    op, function, _ = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    last = PRESENT[name][-1]
    with recorded(op) as calls:
        actual, expected = gradients(name, [last], compiled), gradients(name, [last])
    compiled_results, eager_results = (elements(results) for _, results in calls)
    assert compiled_results == eager_results
    for a, b in zip(actual, expected, strict=True):
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
            gradients(SCALED, frozen)
        return sum(sizes)

    assert kept() - kept(4) == CASES[SCALED][2][1].numel()
