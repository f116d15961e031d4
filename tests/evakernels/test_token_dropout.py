import itertools
import math
from functools import partial

import op_checks
import pytest
import torch
from case_tests import *  # noqa: F403
from on_device import DEVICE
from op_checks import DTYPES, cast, randn, with_gradients
from optimizer_checks import MIXES

import evakernels
from evakernels import _native

BATCH, TOKENS, CHANNELS, PREFIX = 2, 6, 5, 2
KEPT = torch.tensor([[5, 0, 3], [1, 4, 2]])


def pair(token_index):
    """Our function and torch's, over (patches, prefix, pos_embed)."""

    def ours(patches, prefix, pos_embed):
        return evakernels.token_dropout(patches, token_index, prefix=prefix, pos_embed=pos_embed)

    def theirs(patches, prefix, pos_embed):
        batch, _, channels = patches.shape
        x = patches if prefix is None else torch.cat((prefix.expand(batch, -1, -1), patches), 1)
        x = x if pos_embed is None else x + pos_embed
        if token_index is None:
            return x.clone()
        num_prefix = 0 if prefix is None else prefix.shape[0]
        kept = x[:, num_prefix:].gather(1, token_index[..., None].expand(-1, -1, channels))
        return torch.cat((x[:, :num_prefix], kept), 1)

    return ours, theirs


def inputs(with_prefix=True, with_pos_embed=True):
    prefix = randn(PREFIX, CHANNELS, seed=1) if with_prefix else None
    pos_embed = randn(TOKENS + PREFIX * with_prefix, CHANNELS, seed=2) if with_pos_embed else None
    return randn(BATCH, TOKENS, CHANNELS), prefix, pos_embed


def wide_inputs(batch: int, tokens: int, channels: int):
    return randn(batch, tokens, channels), randn(2, channels, seed=1), randn(2 + tokens, channels, seed=2)


VARIANTS = list(itertools.product([KEPT, None], [True, False], [True, False]))
CASES = [
    pytest.param(pair(index), inputs(*given), id=f"{'dropped' if index is not None else 'all'}-{given[0]}-{given[1]}")
    for index, *given in VARIANTS
]
QUICK = {"test_compiles_without_graph_break": ["dropped-True-True"]}
TRANSFORMED = ["dropped-True-True", "dropped-False-False", "all-True-True"]


EVERY_SECOND = torch.arange(0, 40, 2).repeat(20, 1)
THREADED = [(pair(index)[0], cast(wide_inputs(20, 40, 64), torch.bfloat16)) for index in (EVERY_SECOND, None)]


@pytest.mark.parametrize("token_index", [None, KEPT])
def test_the_result_is_a_copy(token_index):
    patches = randn(BATCH, TOKENS, CHANNELS)
    assert evakernels.token_dropout(patches, token_index).data_ptr() != patches.data_ptr()


@pytest.mark.parametrize("token_index", [None, KEPT])
def test_parameters_may_be_wider_than_the_patches(token_index):
    """As under autocast, where the patches are 16-bit and the parameters float32: the widest dtype, as
    torch's own."""
    ours, theirs = pair(token_index)
    patches = randn(BATCH, TOKENS, CHANNELS).bfloat16().requires_grad_()
    prefix, pos_embed = (randn(n, CHANNELS, seed=n).float().requires_grad_() for n in (PREFIX, PREFIX + TOKENS))
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        actual, expected = ours(patches, prefix, pos_embed), theirs(patches, prefix, pos_embed)
    assert actual.dtype == expected.dtype == torch.float32
    assert torch.equal(actual, expected)
    leaves = (patches, prefix, pos_embed)
    actual, expected = (torch.autograd.grad(x.square().sum(), leaves) for x in (actual, expected))
    assert [g.dtype for g in actual] == [torch.bfloat16, torch.float32, torch.float32]
    torch.testing.assert_close(actual, expected)


PATCHES = torch.ones(2, 6, 5)


def channel_by_channel(patches):
    """The same values with a sample's channels apart, as a convolution leaves them."""
    return patches.mT.contiguous().mT


LAYOUTS = {"token by token": lambda patches: patches, "channel by channel": channel_by_channel}
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.mark.parametrize("dtype", DTYPES)
@every_layout
@pytest.mark.parametrize(
    "shape",
    [
        *((1, 1, 1), (3, 9, 7), (2, 5, 37), (3, 10, 100)),
        # More rows, channels and samples than a block of any kernel.
        *(
            pytest.param(shape, marks=pytest.mark.kernels("cpu", "nvcc", "triton bfloat16"))
            for shape in ((2, 70, 768), (3, 40, 74), (40, 9, 264))
        ),
    ],
    ids=str,
)
@pytest.mark.kernels
def test_odd_shapes(shape, layout, dtype):
    batch, tokens, _ = shape
    index = evakernels.sample_token_index(batch, tokens, tokens // 2 + 1, generator=torch.Generator().manual_seed(0))
    for token_index in (None, index.to(DEVICE)):
        ours, theirs = pair(token_index)
        inputs = wide_inputs(*shape)
        op_checks.assert_as_accurate_as_torch(lambda x, *more, f=ours: f(layout(x), *more), theirs, inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_samples_no_tokens_none_kept_no_channels(dtype):
    for shape, index in (
        ((0, 4, 5), torch.zeros(0, 3, dtype=torch.int64)),
        ((2, 0, 5), None),
        ((2, 4, 5), torch.zeros(2, 0, dtype=torch.int64)),
        ((2, 4, 0), torch.zeros(2, 1, dtype=torch.int64)),
    ):
        inputs = [t.to(dtype) for t in wide_inputs(*shape)]
        ours, theirs = (with_gradients(function, inputs) for function in pair(index))
        for actual, expected in zip(ours[0] + ours[1], theirs[0] + theirs[1], strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtypes", [mix[:3] for mix in MIXES])
@every_layout
@pytest.mark.kernels("nvcc")
def test_every_mix_of_dtypes(dtypes, layout):
    patches, prefix, pos_embed = (t.to(dtype) for t, dtype in zip(wide_inputs(2, 6, 70), dtypes, strict=True))
    actual = evakernels.token_dropout(layout(patches), KEPT, prefix=prefix, pos_embed=pos_embed)
    expected = pair(KEPT)[1](*(t.float() for t in (patches, prefix, pos_embed)))
    assert actual.dtype == (dtypes[0] if len(set(dtypes)) == 1 else torch.float32)
    # torch rounds the sum of two 16-bit tensors before a float32 prefix widens the result.
    eps = max(torch.finfo(d).eps for d in dtypes)
    torch.testing.assert_close(actual.float(), expected, rtol=eps, atol=0)


@pytest.mark.parametrize("channels", [1, 31, 32, 70])
@pytest.mark.parametrize("token_index", [None, KEPT])
@pytest.mark.kernels("nvcc")
def test_patches_in_any_layout(channels, token_index):
    """As a convolution leaves them, as slices of something larger, and the same for all samples."""
    patches, prefix, pos_embed = (t.float() for t in wide_inputs(2, 6, channels))
    sparse = torch.zeros(2, 12, 2 * channels)[:, ::2, ::2]
    sparse.copy_(patches)
    slices = torch.zeros(2, 9, channels + 3)[:, 3:, 3:]
    slices.copy_(patches)
    expected = evakernels.token_dropout(patches, token_index, prefix=prefix, pos_embed=pos_embed)
    for view in (channel_by_channel(patches), sparse, slices):
        actual = evakernels.token_dropout(view, token_index, prefix=prefix, pos_embed=pos_embed)
        assert actual.is_contiguous()
        assert torch.equal(actual, expected)
    for lone in (torch.ones(1, 1, 1), torch.ones(3, 1, 1), torch.ones(0, 6, 4)):
        odd = lone.as_strided(lone.shape, (lone.stride(0), 7, 7))  # strides that say nothing
        assert torch.equal(evakernels.token_dropout(odd), lone)
    same = evakernels.token_dropout(patches[:1].expand(2, -1, -1), token_index)
    assert torch.equal(same, evakernels.token_dropout(patches[:1].repeat(2, 1, 1), token_index))


def test_a_dropped_patch_may_hold_anything():
    patches = randn(BATCH, TOKENS, CHANNELS).float()
    kept = torch.zeros(BATCH, TOKENS, dtype=torch.bool).scatter_(1, KEPT, True)
    patches[~kept] = float("nan")
    assert evakernels.token_dropout(patches, KEPT).isfinite().all()
    patches[0, KEPT[0, 1]] = float("inf")
    assert evakernels.token_dropout(patches, KEPT)[0, 1].isinf().all()


@pytest.mark.cpu_only("a GPU's kernels alone read an index, and a wrong one ends all work of the process there")
@pytest.mark.skipif(not _native.implemented("token_dropout_backward", "cpu"), reason="no compiled kernel")
@pytest.mark.parametrize("wrong", [KEPT + 1, KEPT - 1, torch.tensor([[0, 1, 2], [3, 3, 4]])])
def test_kernels_refuse_a_wrong_index(wrong):
    """Forward may read a token twice, but none outside of the patches."""
    native = torch.ops.evakernels_native
    calls = [lambda: native.token_dropout_backward(PATCHES[:, :3], wrong, 0, 6, [True, True, True])]
    if wrong.min() < 0 or wrong.max() >= TOKENS:
        layouts = PATCHES, PATCHES.mT.contiguous().mT
        calls += [partial(native.token_dropout_forward, patches, wrong, None, None) for patches in layouts]
    for call in calls:
        with pytest.raises((ValueError, RuntimeError), match="token_index"):
            call()


def test_every_set_of_tokens_is_equally_likely():
    """Chi-square over all 20 sets of 3 out of 6; the bound is 5 standard deviations above the mean."""
    draws, sets = 20_000, {kept: i for i, kept in enumerate(itertools.combinations(range(6), 3))}
    index = evakernels.sample_token_index(draws, 6, 3, generator=torch.Generator().manual_seed(0))
    observed = torch.zeros(len(sets))
    for kept in index.tolist():
        observed[sets[tuple(kept)]] += 1
    expected, freedom = draws / len(sets), len(sets) - 1
    statistic = ((observed - expected) ** 2 / expected).sum().item()
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_sampling_is_reproducible_from_its_generator():
    def draw(seed):
        return evakernels.sample_token_index(4, 50, 25, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    torch.manual_seed(3)
    first = evakernels.sample_token_index(4, 50, 25)
    torch.manual_seed(3)
    assert torch.equal(first, evakernels.sample_token_index(4, 50, 25))


def test_sampling_follows_the_device_and_compiles():
    for device in ("meta", DEVICE.type):
        assert evakernels.sample_token_index(4, 50, 25, device=device).device.type == device
    assert evakernels.sample_token_index(4, 50, 25, generator=torch.Generator("cpu")).device.type == "cpu"
    compiled = torch.compile(evakernels.sample_token_index, fullgraph=True, backend="aot_eager")
    assert (compiled(4, 50, 25).diff(dim=1) > 0).all()


@pytest.mark.parametrize("num_keep", [0, 7, -1])
def test_wrong_number_of_kept_tokens_is_refused(num_keep):
    with pytest.raises(ValueError, match="num_keep"):
        evakernels.sample_token_index(2, 6, num_keep)


# --- wrong input, for test_wrong_input ------------------------------------------------------------------------------

CALLED = torch.tensor([[0], [1]])
CALLS = {
    "token_dropout": {"patches": torch.ones(2, 3, 4), "token_index": CALLED}
    | {"prefix": torch.ones(1, 4), "pos_embed": torch.ones(4, 4)}
}
WRONG = {
    "token_dropout": [
        (ValueError, "token_index", {"token_index": CALLED[:1]}),
        (IndexError, "token_index", {"token_index": CALLED + 2}),
        (IndexError, "token_index", {"token_index": CALLED - 1}),
        (IndexError, "token_index", {"token_index": torch.tensor([[0, 1], [2, 2]])}),
        (ValueError, "prefix", {"prefix": torch.ones(1, 5)}),
    ]
}
