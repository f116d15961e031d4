import copy
import inspect
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from timm.layers import AttentionRope, RotaryEmbeddingCat
from timm.layers import SwiGLU as TimmSwiGLU

import evakernels
from evakernels import nn


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def arguments_of(function):
    return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (nn.LayerNorm(8), torch.nn.LayerNorm(8)),
        (nn.LayerNorm((8,), elementwise_affine=False), torch.nn.LayerNorm((8,), elementwise_affine=False)),
        (nn.LayerNorm([3, 8], 1e-4, True, False), torch.nn.LayerNorm([3, 8], 1e-4, True, False)),
        (nn.RMSNorm(8), torch.nn.RMSNorm(8)),
        (nn.RMSNorm(8, 1e-4), torch.nn.RMSNorm(8, eps=1e-4)),
        (nn.RMSNorm(8, elementwise_affine=False), torch.nn.RMSNorm(8, elementwise_affine=False)),
    ],
    ids=lambda norm: str(norm),
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norms_match_torch(ours, theirs, dtype):
    """Of inputs so small that eps tells."""
    ours, theirs = copy.deepcopy(ours).to(dtype), copy.deepcopy(theirs).to(dtype)
    state = {name: randn(*value.shape, seed=i) for i, (name, value) in enumerate(theirs.state_dict().items())}
    ours.load_state_dict(state)
    theirs.load_state_dict(state)
    assert isinstance(ours, type(theirs))
    assert ours.extra_repr() == theirs.extra_repr()
    *of_torch, (name, kind, default) = arguments_of(type(ours))
    assert of_torch == arguments_of(type(theirs))
    assert (name, kind, default) == ("out_dtype", inspect.Parameter.KEYWORD_ONLY, None)
    for size in (1e-8, 1e-3, 1.0):
        x = (size * randn(2, 3, 8)).to(dtype)
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize(("shape", "expected"), [(8, r"\[..., 8\]"), ((2, 3, 4), r"\[..., 2, 3, 4\]")])
def test_norms_input_of_another_width_raises(norm, shape, expected):
    """Without a weight nothing else would notice it."""
    for affine in (True, False):
        with pytest.raises(ValueError, match=rf"{norm.__name__}: input .*{expected}"):
            norm(shape, elementwise_affine=affine)(randn(3, 4))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
@pytest.mark.parametrize("shape", [8, (3, 8)])
def test_norms_return_out_dtype(norm, shape):
    module, x = norm(shape, out_dtype=torch.bfloat16), torch.randn(2, 3, 8)
    assert torch.equal(module(x), norm(shape)(x).bfloat16())
    assert "out_dtype=torch.bfloat16" in repr(module)
    del module.__dict__["out_dtype"]  # as of a module that was pickled before there was one
    assert module(x).dtype == torch.float32


def test_norm_functions_have_eps_of_torch():
    x, branch = 1e-3 * randn(2, 8), 1e-3 * randn(2, 8, seed=1)
    given = x, branch, x + branch
    of_layer, of_rms = ([norm(t, (8,)) for t in given] for norm in (F.layer_norm, F.rms_norm))
    for (plain, of_branch, of_sum), name in ((of_layer, "layer_norm"), (of_rms, "rms_norm")):
        torch.testing.assert_close(getattr(evakernels, name)(x), plain)
        torch.testing.assert_close(getattr(evakernels, f"add_{name}")(x, branch)[0], of_sum)
        torch.testing.assert_close(getattr(evakernels, f"{name}_add")(x, branch), x + of_branch)


def test_swiglu_matches_timm():
    """timm's SwiGLU names its projections fc1_g, fc1_x and fc2, and its sub-LN norm."""
    names = {"w1": "fc1_g", "w2": "fc1_x", "ffn_ln": "norm", "w3": "fc2"}
    theirs = TimmSwiGLU(6, 14, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6))
    ours = nn.SwiGLU(6, 14)
    state = {name: randn(*value.shape, seed=i) for i, (name, value) in enumerate(ours.state_dict().items())}
    ours.load_state_dict(state)
    renamed = {f"{names[module]}.{kind}": value for name, value in state.items() for module, kind in [name.split(".")]}
    theirs.load_state_dict(renamed)
    x = randn(2, 3, 6)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("half", [False, True], ids=["interleaved", "rotate-half"])
@pytest.mark.parametrize("sub_ln", [False, True])
def test_rotary_attention_matches_timm(half, sub_ln):
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    theirs = AttentionRope(24, 2, num_prefix_tokens=2, scale_norm=sub_ln, norm_layer=norm, rotate_half=half)
    ours = nn.RotaryAttention(24, 2, num_prefix=2, interleaved=not half, sub_ln=sub_ln)
    ours.load_state_dict(theirs.state_dict())
    cos, sin = nn.axial_rope(3, 2, 12)
    spread = (lambda t: t.repeat(1, 2)) if half else (lambda t: t.repeat_interleave(2, -1))
    x = randn(3, 8, 24)
    torch.testing.assert_close(ours(x, cos, sin), theirs(x, torch.cat((spread(sin), spread(cos)), -1)))
    torch.testing.assert_close(ours(x), theirs(x))


def test_rotary_attention_token_index_and_causal():
    x, index = randn(2, 7, 8), torch.tensor([[4, 1, 0], [2, 3, 5]])
    cos, sin = nn.axial_rope(2, 3, 4)
    module = nn.RotaryAttention(8, 2)
    kept = torch.cat((x[:, :1], x[:, 1:].gather(1, index[..., None].expand(-1, -1, 8))), 1)
    one = module(torch.cat((x[:1, :1], x[:1, 1:][:, index[0]]), 1), cos[index[0]], sin[index[0]])
    torch.testing.assert_close(module(kept, cos, sin, index)[:1], one)
    causal = nn.RotaryAttention(8, 2, causal=True)
    torch.testing.assert_close(causal(x)[:, :3], causal(x[:, :3]))


@pytest.mark.parametrize(
    "module",
    [nn.LayerNorm, nn.RMSNorm, lambda *a, **k: nn.SwiGLU(*a, 12, **k), lambda *a, **k: nn.RotaryAttention(*a, 2, **k)],
)
def test_modules_take_device_and_dtype(module):
    built = module(8, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in built.parameters()} == {("meta", torch.bfloat16)}


def test_patch_dropout_keeps_prefix_in_training():
    module = nn.PatchDropout(0.5)
    patches, prefix, pos_embed = randn(3, 9, 4), randn(2, 4, seed=1), randn(11, 4, seed=2)
    tokens, index = module(patches, prefix=prefix, pos_embed=pos_embed)
    assert tokens.shape == (3, 2 + 4, 4)
    assert index.shape == (3, 4)
    full = torch.cat((prefix.expand(3, -1, -1), patches), 1) + pos_embed
    assert torch.equal(tokens[:, :2], full[:, :2])
    assert torch.equal(tokens[:, 2:], full[:, 2:].gather(1, index[..., None].expand(-1, -1, 4)))
    assert not torch.equal(index, module(patches)[1])
    assert nn.PatchDropout(0.99)(patches)[0].shape[1] == 1
    for kept in (module.eval(), nn.PatchDropout(0.0)):
        assert torch.equal(kept(patches)[0], patches)
        assert kept(patches)[1] is None


@pytest.mark.parametrize(("grid", "head_dim"), [((14, 14), 64), ((24, 24), 64), ((3, 5), 88)])
def test_axial_rope_matches_timm(grid, head_dim):
    peer = RotaryEmbeddingCat(head_dim, in_pixels=False, feat_shape=list(grid), ref_feat_shape=[16, 16])
    sin, cos = (t[:, ::2] for t in peer.get_embed().chunk(2, -1))  # timm stores each angle twice
    actual = nn.axial_rope(*grid, head_dim)
    assert [t.dtype for t in actual] == [torch.float32] * 2
    torch.testing.assert_close(actual, (cos, sin), atol=2e-6, rtol=0)


def test_rotate_matches_rope_attention():
    q, k, v = torch.randn(3, 1, 6, 2, 8).unbind()
    cos, sin = nn.axial_rope(2, 3, 8)
    rotated = [nn.rotate(x, cos.unsqueeze(1), sin.unsqueeze(1)) for x in (q, k)]
    expected = evakernels.rope_attention(q, k, v, cos, sin)
    torch.testing.assert_close(evakernels.rope_attention(*rotated, v), expected)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: nn.axial_rope(0, 4, 8), "grid_h"),
        (lambda: nn.axial_rope(4, 4, 6), "head_dim"),
        (lambda: nn.RotaryAttention(10, 4), "width"),
        (lambda: nn.PatchDropout(-0.1), "rate"),
        (lambda: nn.PatchDropout(1.0), "rate"),
    ],
)
def test_modules_wrong_size_raises(call, name):
    with pytest.raises(ValueError, match=name):
        call()
