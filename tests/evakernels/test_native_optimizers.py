"""The compiled steps of the optimizers against their references: lists of any sizes, dtypes and layouts."""

import pytest
import torch
from on_device import COMPILED
from op_checks import thread_results
from optimizer_checks import (
    BUFFERS,
    DTYPES,
    FLOAT32,
    MIXES,
    SIZES,
    VARIANTS,
    assert_states_close,
    everything,
    lists,
    update,
)

import evakernels
from evakernels import _native

native = pytest.mark.skipif(not _native.LOADED, reason="the native library is not built")
pytestmark = [native, pytest.mark.kernels("newest triton")]

every_kind = pytest.mark.parametrize("kind", ["adamw", *VARIANTS])


MANY = [i % 3 for i in range(700)]


@pytest.mark.parametrize(
    ("sizes", "flags"),
    [
        (SIZES, {}),
        (SIZES, {"scale": 8.0, "found_inf": 0.0}),
        (SIZES, {"found_inf": 1.0}),
        pytest.param(MANY, {}, marks=pytest.mark.kernels),
    ],
)
@every_kind
def test_equals_the_reference(kind, sizes, flags):
    ours, theirs = lists(sizes=sizes), lists(sizes=sizes)
    norms, expected_norms = (update(s, kind, b, **flags) for s, b in ((ours, COMPILED), (theirs, "reference")))
    torch.testing.assert_close(norms, expected_norms, rtol=2e-6, atol=1e-9)  # of one element that may cancel
    assert_states_close(ours, theirs, lr_of_last=0.01 * len(sizes))


@pytest.mark.parametrize("backend", [COMPILED, "reference"])
@pytest.mark.parametrize("kind", ["adamw", "lamb_step", *VARIANTS])
@pytest.mark.kernels
def test_rates_on_device_equal_numbers_formula(kind, backend):
    ours, theirs = lists(), lists()
    lrs = [(1 + i) / 64 for i in range(len(ours[0]))]
    update(ours, kind, backend, lrs=torch.tensor(lrs))
    update(theirs, kind, backend, lrs=lrs)
    assert_states_close(ours, theirs)


@pytest.mark.parametrize(
    "offsets", [(1, 1, 1, 1), (2, 2, 2, 2), (7, 3, 3, 3), (4, 4, 4, 4), (0, 1, 2, 3), (0, 0, 0, 2)]
)
@pytest.mark.parametrize("dtypes", [FLOAT32, (torch.bfloat16, torch.float16, torch.float32, torch.float32)], ids=str)
@every_kind
def test_strided_parts_of_a_flat_buffer(kind, dtypes, offsets):
    """As sharded training makes them: they begin anywhere, and nothing around them is written."""
    sizes = [2, 64, 1061, 2 * 8192 + 3]
    plain, parts, flat = lists(dtypes, sizes), lists(dtypes, sizes), []
    for tensors, offset in zip(parts[:4], offsets, strict=True):
        for i, tensor in enumerate(tensors):
            flat.append(torch.full((offset + len(tensor) + 9,), 7.0, dtype=tensor.dtype))
            tensors[i] = flat[-1][offset : offset + len(tensor)].copy_(tensor)
    norms, expected_norms = update(parts, kind), update(plain, kind)
    torch.testing.assert_close(norms, expected_norms, rtol=2e-6, atol=0)
    for a, b in zip(everything(parts), everything(plain), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=torch.finfo(a.dtype).eps)
    for i, buffer in enumerate(flat):
        begin = offsets[i // len(sizes)]
        assert (buffer[:begin] == 7.0).all()
        assert (buffer[begin + sizes[i % len(sizes)] :] == 7.0).all()


@pytest.mark.parametrize("dtypes", MIXES, ids=str)
@pytest.mark.kernels("cpu")
def test_every_mix_of_dtypes(dtypes):
    ours, theirs = lists(dtypes, [1061, 5]), lists(dtypes, [1061, 5])
    norms, expected_norms = update(ours, "deepspeed"), update(theirs, "deepspeed", "reference")
    torch.testing.assert_close(norms, expected_norms, rtol=1e-3, atol=0)
    for name, got, expected in zip(BUFFERS, ours, theirs, strict=False):
        # A value next to the middle of two stored ones may fall to either side; a moment that did moves its parameter
        # by that share of a step, which is some hundredths.
        slack = 1e-6 + 0.02 * max(torch.finfo(dtype).eps for dtype in dtypes[2:]) * (name == "params")
        for a, b in zip(got, expected, strict=True):
            unit = torch.finfo(a.dtype).eps
            torch.testing.assert_close(a, b, rtol=1.01 * unit + 1e-5, atol=slack, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.kernels
def test_norms_are_as_accurate_as_torchs(variant):
    size = 100_003
    ours, theirs, exact = (lists(sizes=[size]) for _ in range(3))
    exact[:4] = ([t.double() for t in tensors] for tensors in exact[:4])
    truth = update(exact, variant, "reference")
    error, torchs = ((update(s, variant, b) / truth - 1).abs() for s, b in ((ours, COMPILED), (theirs, "reference")))
    assert (error <= 2 * torchs + torch.finfo(torch.float32).eps).all(), (error, torchs)


@pytest.mark.parametrize("name", BUFFERS)
@pytest.mark.parametrize("dtype", DTYPES)
@every_kind
def test_strided_tensors(kind, name, dtype):
    dense, strided = (lists((dtype,) * 4, [60]) for _ in range(2))
    for state in (dense, strided):
        state[:4] = ([t.view(6, 10) for t in tensors] for tensors in state[:4])
    storage = torch.full((10, 12), 7.0, dtype=dtype)
    strided[BUFFERS.index(name)] = [storage.T[::2].copy_(strided[BUFFERS.index(name)][0])]
    results = [everything(state, update(state, kind)) for state in (dense, strided)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert (storage.T[1::2] == 7.0).all()


@every_kind
def test_threads_do_not_change_the_step(kind):
    def step():
        state = lists()
        return everything(state, update(state, kind))

    assert all(map(torch.equal, *thread_results(step)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@every_kind
def test_non_finite_gradient_stays_in_its_tensor(kind, value):
    bad, good = lists(), lists()
    bad[1][5][3] = value
    for state in (bad, good):
        update(state, kind)
    assert not bad[0][5].isfinite().all()
    assert all(i == 5 or torch.equal(bad[0][i], good[0][i]) for i in range(len(SIZES)))


def test_zero_eps_padding_is_ignored():
    params, _, exp_avgs, exp_avg_sqs, steps = lists(sizes=[5])
    options = {"betas": (0.9, 0.98), "eps": 0.0}
    norms = evakernels.lamb_update(params, params, exp_avgs, exp_avg_sqs, steps, [0.0], **options)
    assert norms.isfinite().all()
