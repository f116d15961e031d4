"""Liger's modules beside torch's."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from evakernels.compat import liger

DTYPES = [torch.float32, torch.bfloat16]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drawn(module, dtype=torch.float32):
    for i, parameter in enumerate(module.parameters()):
        parameter.data = randn(*parameter.shape, seed=i)
    return module.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layer_norm(dtype):
    module, x = drawn(liger.LigerLayerNorm(8), dtype), 1e-3 * randn(2, 3, 8, seed=9).to(dtype)
    torch.testing.assert_close(module(x), F.layer_norm(x, (8,), module.weight, module.bias, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(offset, dtype):
    """Gemma's sum of offset and weight isn't rounded to the 16 bits of the weight, nor is its gradient lost."""
    module, x = drawn(liger.LigerRMSNorm(8, offset=offset, casting_mode="gemma"), dtype), randn(2, 3, 8, seed=9)
    expected = F.rms_norm(x.to(dtype).float(), (8,), module.weight.float() + offset, 1e-6)
    y = module(x.to(dtype))
    torch.testing.assert_close(y, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    y.sum().backward()
    assert module.weight.grad.dtype == dtype
    assert not list(liger.LigerRMSNorm(8, elementwise_affine=False, offset=offset).parameters())


def test_rms_norm_behind_a_sum():
    module, x, residual = drawn(liger.LigerFusedAddRMSNorm(8)), randn(2, 3, 8, seed=8), randn(2, 3, 8, seed=9)
    y, total = module(x, residual)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(y, F.rms_norm(x + residual, (8,), module.weight, 1e-6))


@pytest.mark.parametrize("intermediate_size", [None, 5])
def test_swiglu(intermediate_size):
    config = SimpleNamespace(hidden_size=6, intermediate_size=10, hidden_act="silu")
    module, x = liger.LigerSwiGLUMLP(config, intermediate_size), randn(2, 3, 6)
    gate, up, down = (getattr(module, f"{name}_proj").weight for name in ("gate", "up", "down"))
    assert gate.shape == (intermediate_size or 10, 6)
    torch.testing.assert_close(module(x), F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down))


def test_parameters_begin_as_in_liger():
    assert torch.equal(liger.LigerLayerNorm(3).bias, torch.zeros(3))
    assert bool(liger.LigerLayerNorm(3, bias=True).bias.ne(0).all())
    assert torch.equal(liger.LigerRMSNorm(3, init_fn="zeros").weight, torch.zeros(3))


@pytest.mark.parametrize(
    ("wrong", "kind", "message"),
    [
        (lambda: liger.LigerLayerNorm(3, impl="cuda"), NotImplementedError, "impl is 'cuda'; accepted: None"),
        (lambda: liger.LigerLayerNorm(3, backend="triton"), NotImplementedError, "backend is 'triton'; accepted: None"),
        (lambda: liger.LigerLayerNorm(3, init_fn="one"), ValueError, "init_fn is 'one'; accepted: 'ones', 'zeros'"),
        (lambda: liger.LigerRMSNorm(3, casting_mode="lama"), ValueError, "LigerRMSNorm: casting_mode is 'lama'; acc"),
        (
            lambda: liger.LigerSwiGLUMLP(SimpleNamespace(hidden_size=3, intermediate_size=3, hidden_act="gelu")),
            ValueError,
            "LigerSwiGLUMLP: hidden_act is 'gelu'; accepted: 'silu', 'swish'",
        ),
    ],
)
def test_what_is_not_served_is_named(wrong, kind, message):
    with pytest.raises(kind, match=message):
        wrong()
