"""Prepacked weights: equal results, and no unnoticed changes."""

import copy
import io
import pickle

import pytest
import torch
from op_checks import freezes_both
from torch import nn

import evakernels
from evakernels.backends import observed_by
from evakernels.nn import FrozenWeight, Linear, freeze, frozen, unfreeze

pytestmark = [pytest.mark.by_processor, freezes_both]

KINDS = [
    pytest.param(dtype, int8, id=f"{str(dtype)[6:]}{'-int8' * int8}")
    for dtype in (torch.float32, torch.bfloat16)
    for int8 in (False, True)
]


def skip_without_int8(int8):
    if int8 and (reason := frozen.int8_unsupported_reason()):
        pytest.skip(f"int8 {reason}")


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(Linear(96, 200), nn.GELU(), nn.Linear(200, 65)).to(dtype).eval()


def error(found, expected):
    """Root of the mean square, relative to that of `expected`."""
    return float((found.double() - expected).norm() / expected.norm())


def with_int8(weight, x):
    """The expected result of an int8 matmul, in float64."""
    scale, rows = weight.abs().amax(1, keepdim=True) / 127, x.abs().amax(-1, keepdim=True) / 127
    return ((x / rows).round() @ (weight / scale).round().T) * rows * scale.T


@pytest.mark.parametrize(("dtype", "int8"), KINDS)
@pytest.mark.parametrize("shape", [(96,), (1, 96), (10, 96), (3, 50, 96), (0, 96)])
@pytest.mark.parametrize("bias", [True, False])
def test_frozen_linear_matches_torch(dtype, int8, shape, bias):
    skip_without_int8(int8)
    layer = nn.Linear(96, 200, bias=bias).to(dtype).eval().requires_grad_(False)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight, expected = layer.weight.double(), layer.double()(x.double())
    plain = layer.to(dtype)(x)
    if int8:
        expected = with_int8(weight, x.double()) + (layer.bias.double() if bias else 0)
    found = freeze(layer, int8=int8)(x)
    assert isinstance(layer.weight, FrozenWeight)
    assert (found.shape, found.dtype) == (plain.shape, dtype)
    if x.numel():
        # In 8 bits a code at half of a unit goes either way, and bfloat16 is rounded twice.
        bound = (
            (2e-3 if dtype == torch.float32 else 5e-3)
            if int8
            else 2 * max(error(plain, expected), torch.finfo(dtype).eps)
        )
        assert error(found, expected) <= bound
    assert torch.equal(found, layer(x))


@pytest.mark.parametrize(("dtype", "int8"), KINDS)
def test_unfreeze_restores_weights(dtype, int8):
    skip_without_int8(int8)
    plain = model(dtype)
    thawed = unfreeze(freeze(copy.deepcopy(plain), int8=int8))
    assert [type(p) for p in thawed.parameters()] == [nn.Parameter] * 4
    for found, weight in ((thawed[0].weight, plain[0].weight), (thawed[2].weight, plain[2].weight)):
        step = weight.float().abs().amax(1, keepdim=True) / 127
        assert torch.equal(found, weight) if not int8 else ((found.float() - weight).abs() <= step).all()


@pytest.mark.parametrize(("dtype", "int8"), KINDS)
def test_frozen_model_is_read_copied_and_saved(dtype, int8):
    skip_without_int8(int8)
    froze = freeze(model(dtype), int8=int8)
    weight, x = froze[0].weight, torch.ones(2, 96, dtype=dtype)
    twin, thawed = copy.deepcopy(froze), unfreeze(copy.deepcopy(froze))
    assert torch.equal(twin(x), froze(x))
    file = io.BytesIO()
    torch.save(froze.state_dict(), file)
    file.seek(0)
    outer = {name.removeprefix("0."): value for name, value in nn.Sequential(froze).state_dict().items()}
    of_copy = pickle.loads(pickle.dumps(froze)).state_dict()
    for state in (torch.load(file, weights_only=True), froze.state_dict(), outer, of_copy):
        assert not isinstance(state["0.weight"], FrozenWeight)
        assert state["0.weight"].is_contiguous()  # as safetensors wants it
        assert all(torch.equal(state[name], value) for name, value in thawed.state_dict().items())
    assert float(weight.double().sum()) == float(thawed[0].weight.double().sum())
    assert (weight.shape, weight.dtype, weight.device.type) == ((200, 96), dtype, "cpu")
    assert sum(p.numel() for p in froze.parameters()) == sum(p.numel() for p in model().parameters())
    assert "FrozenWeight([200, 96]" in repr(weight)
    assert froze.to("cpu")[0].weight is weight


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m[0].weight.zero_(),
        lambda m: m[0].weight.data.mul_(2),
        lambda m: m[0].weight.__setitem__(0, 1.0),
        lambda m: m[0].weight[0].zero_(),
        lambda m: setattr(m[0].weight, "data", torch.ones(200, 96)),
        lambda m: torch.add(torch.ones(200, 96), 1, out=m[0].weight),
        lambda m: nn.init.ones_(m[0].weight),
        lambda m: m.double(),
        lambda m: m.share_memory(),
    ],
)
def test_frozen_weight_change_raises(change):
    froze = freeze(model())
    before = froze(torch.ones(2, 96))
    with torch.no_grad(), pytest.raises(TypeError, match="frozen"):
        change(froze)
    assert torch.equal(froze(torch.ones(2, 96)), before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.ones(2, 96, requires_grad=True)), "x must not require a gradient"),
        (lambda m: m(torch.ones(2, 96, dtype=torch.bfloat16)), "x must be torch.float32.*got torch.bfloat16"),
        (lambda m: m(torch.ones(2, 95)), r"x must have shape \[..., 96\]"),
        (lambda m: torch.autocast("cpu")(m)(torch.ones(2, 96)), "also under autocast"),
        (lambda m: m.load_state_dict(model().state_dict()), r"frozen; change it before `evakernels\.nn\.freeze`"),
    ],
)
def test_frozen_model_wrong_call_raises(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(freeze(model()))


def test_freeze_wrong_model_raises(monkeypatch):
    with pytest.raises(ValueError, match="model must be"):
        freeze(model().train())
    with pytest.raises(ValueError, match="weight must be on a CPU"):
        freeze(model().to("meta"))
    monkeypatch.setattr(frozen, "int8_unsupported_reason", lambda: "needs a processor with int8 matmuls")
    with pytest.raises(RuntimeError, match="int8 needs a processor with int8 matmuls"):
        freeze(model(), int8=True)


@pytest.mark.skipif(frozen.int8_unsupported_reason() is not None, reason=f"int8 {frozen.int8_unsupported_reason()}")
def test_freeze_int8_by_name():
    froze = freeze(model(), int8=lambda name: name == "2.weight")
    assert [froze[0].weight.is_int8, froze[2].weight.is_int8] == [False, True]
    with pytest.raises(ValueError, match="int8 must be False"):
        freeze(froze, int8=True)


def test_frozen_model_under_autocast():
    froze = freeze(model(torch.bfloat16))
    x = torch.randn(4, 96)
    with torch.autocast("cpu"):
        found = froze(x)
    assert torch.equal(found, froze(x.bfloat16()))


@pytest.mark.parametrize("other", [nn.Linear(4, 8), nn.Embedding(8, 4)])
def test_freeze_keeps_tied_weights(other):
    """A weight that an embedding reads too stays dense."""
    tied = nn.Sequential(copy.deepcopy(other), nn.Linear(4, 8)).eval()
    tied[1].weight = tied[0].weight
    freeze(tied)
    assert tied[0].weight is tied[1].weight
    assert isinstance(tied[0].weight, FrozenWeight) == isinstance(other, nn.Linear)
    unfreeze(tied)
    assert tied[0].weight is tied[1].weight


def test_freeze_leaves_linear_with_own_forward():
    """As FalconLinear, which reads a view of it."""

    class Transposed(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T

    layer, x = Transposed(4, 8).eval(), torch.randn(2, 4)
    expected = layer(x)
    evakernels.accelerate(layer, freeze=True)
    assert torch.equal(layer(x), expected)


def test_unfreeze_restores_requires_grad():
    partly = model()
    partly[0].weight.requires_grad_(False)
    partly[2].bias.requires_grad_(False)
    expected = [p.requires_grad for p in partly.parameters()]
    froze = freeze(freeze(partly))
    assert not any(p.requires_grad for p in froze.parameters())
    for thawed in (unfreeze(copy.deepcopy(froze)), unfreeze(pickle.loads(pickle.dumps(froze))), unfreeze(froze)):
        assert [p.requires_grad for p in thawed.parameters()] == expected


def test_accelerate_freezes_and_restore_unfreezes():
    plain, backends = model(), set()
    x = torch.randn(4, 96)
    accelerated = copy.deepcopy(plain)
    with torch.no_grad():
        expected = plain(x)
        evakernels.accelerate(accelerated, freeze=True)
        with observed_by(lambda op, backend: backends.add(backend)):
            torch.testing.assert_close(accelerated(x), expected)
    assert "oneDNN, packed" in backends
    evakernels.restore(accelerated)
    assert all(torch.equal(a, b) for a, b in zip(accelerated.parameters(), plain.parameters(), strict=True))
    with pytest.raises(ValueError, match="training mode"):
        evakernels.accelerate(accelerated.train(), freeze=True)


def test_frozen_weight_in_training_mode_raises():
    layers = freeze(model())
    layers.train()
    with pytest.raises(RuntimeError, match=r"weight must not be frozen.*restore\(model\)"):
        layers(torch.ones(2, 96))
    with torch.no_grad():
        layers(torch.ones(2, 96))
    layers.eval()(torch.ones(2, 96))
    unfreeze(layers).train()(torch.ones(2, 96)).sum().backward()
