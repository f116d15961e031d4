"""The losses, the optimizers and whole models: what they compute, what they cost, and who is compared."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from bench_case_checks import TOLERANCE, assert_exact, build, draw, gradients, outputs, pretend_installed
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.accuracy import as_double, relative_error, tensors
from benchmarks.cases import _optimizer, models
from benchmarks.cases._open_clip import PlainClip
from benchmarks.cases.models import MODEL_OPERATIONS
from benchmarks.memory import saved_bytes
from benchmarks.operation import Function, Inputs, get_operation, operations, peers_of
from benchmarks.shapes import parse_shape
from evaclip import create_model, get_config, list_models
from evaclip.errors import UserError
from evaclip.model.config import ALIASES
from evaclip.tokenizer import Tokenizer
from evaclip.weights import to_open_clip


class Traffic(NamedTuple):
    """What the formulas leave out, and what is written beside the outputs."""

    negligible: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    outputs: bool = True


OPERATIONS = {
    "clip_loss": Traffic(("logit_scale",), outputs=False),
    "siglip_loss": Traffic(("logit_scale", "logit_bias"), outputs=False),
    "lamb_step": Traffic(written=("exp_avgs", "exp_avg_sqs", "steps")),
    "adamw_step": Traffic(written=("exp_avgs", "exp_avg_sqs", "steps")),
    "gradient_norm": Traffic(outputs=False),
    "encode_image": Traffic(),
    "encode_text": Traffic(),
    "clip_step": Traffic(("token_index",), outputs=False),
}
SMALL = {
    "lamb_step": ("tiny b1",),
    "adamw_step": ("tiny b1",),
    "gradient_norm": ("tiny b1",),
    "encode_image": ("tiny b2", "tiny@40 b1"),
    "encode_text": ("tiny:text b2", "tiny b1"),
    "clip_step": ("tiny b3", "tiny b2 drop50"),
}
CASES = [(op, shape) for op in OPERATIONS for shape in SMALL.get(op, ("tiny b7", "tiny:text b2"))]
# Gradients of a whole model have been through many layers, and the temperature's is a difference of large numbers.
TOLERANCES = {"clip_step": {torch.float32: 5e-5, torch.bfloat16: 0.15}}


@pytest.fixture(autouse=True)
def _few_parameters(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Optimizers over a handful of tensors instead of millions of embeddings."""
    if "whole_model" not in request.fixturenames:
        sizes = tuple(map(torch.Size, [(50, 16), (16,), (), (3, 5, 2), (1, 4, 8)]))
        monkeypatch.setattr(_optimizer, "sizes_of", lambda shape: sizes)


@pytest.fixture
def whole_model() -> None:
    """Optimizers over all parameters of the model, as it is measured."""


# --- what they compute ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("who", ["ours", "eager"])
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_ours_and_plain_torch_agree_with_float64(name: str, shape: str, who: str, dtype: torch.dtype) -> None:
    op = get_operation(name)
    tolerance = TOLERANCES.get(name, TOLERANCE)[dtype]
    assert_exact(op, getattr(op, who), parse_shape(shape), dtype, bool(op.gradients), tolerance)


@pytest.mark.parametrize("name", ["clip_loss", "siglip_loss"])
def test_losses_are_equal_in_float64(name: str) -> None:
    op = get_operation(name)
    exact = as_double(draw(op, parse_shape("tiny b7")))
    assert relative_error(outputs(op.ours, exact), outputs(op.eager, exact)) <= 1e-12
    assert relative_error(gradients(op, op.ours, exact), gradients(op, op.eager, exact)) <= 1e-12


def _moved(function: Function, inputs: Inputs) -> list[Tensor]:
    """How far one step moves each parameter, a hundredth of what it is."""
    before = [values.clone() for values in inputs["params"]]
    return [new.double() - old for new, old in zip(outputs(function, inputs), before, strict=True)]


def test_lamb_moves_parameters_and_state_alike() -> None:
    op, shape = get_operation("lamb_step"), parse_shape("tiny b1")
    ours, plain = draw(op, shape), as_double(draw(op, shape))
    sizes = torch.stack([w.norm() for w in plain["params"]])
    expected = _moved(op.eager, plain)
    assert relative_error(_moved(op.ours, ours), expected) <= 5e-5
    for name in ("exp_avgs", "exp_avg_sqs", "steps"):
        assert relative_error(ours[name], plain[name]) <= 1e-6, name
    assert {float(step) for step in ours["steps"]} == {11.0}
    matrices = torch.tensor([w.ndim > 1 for w in plain["params"]])
    ratios = torch.stack([move.norm() for move in expected]) / sizes
    torch.testing.assert_close(ratios[matrices], torch.full_like(ratios[matrices], 0.01))
    assert (ratios[~matrices] > 0.1).all()  # neither decayed nor brought to the size of the parameter


def test_adamw_moves_parameters_and_state_alike() -> None:
    op, shape = get_operation("adamw_step"), parse_shape("tiny b1")
    ours, plain = draw(op, shape), as_double(draw(op, shape))
    assert relative_error(_moved(op.ours, ours), _moved(op.eager, plain)) <= 5e-5
    for name in ("exp_avgs", "exp_avg_sqs", "steps"):
        assert relative_error(ours[name], plain[name]) <= 1e-6, name


@pytest.mark.usefixtures("whole_model")
def test_lamb_steps_over_every_parameter() -> None:
    shapes = [parameter.shape for parameter in create_model("tiny", device="meta").parameters()]
    assert [values.shape for values in draw(get_operation("lamb_step"), parse_shape("tiny b1"))["grads"]] == shapes


def test_pairs_have_length_one_in_the_space_of_the_model() -> None:
    inputs = draw(get_operation("clip_loss"), parse_shape("eva02-l14 b4"))
    for name in ("image_features", "text_features"):
        assert inputs[name].shape == (4, 768)
        torch.testing.assert_close(inputs[name].norm(dim=-1), torch.ones(4))
    assert inputs["logit_scale"].dtype == torch.float32


def test_models_are_given_the_same_parameters_and_other_samples() -> None:
    op, shape = get_operation("clip_step"), parse_shape("tiny b2")
    models._parameters.cache_clear()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        state = torch.random.get_rng_state()
        first, second = (draw(op, shape, seed=seed) for seed in (0, 1))
        assert torch.equal(torch.random.get_rng_state(), state)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(first["parameters"], second["parameters"], strict=True))
    assert not torch.equal(first["images"], second["images"])
    assert not torch.equal(first["texts"], second["texts"])
    assert all(values.is_leaf and values.abs().min() > 0 for values in first["parameters"])


def test_captions_are_as_long_as_in_use() -> None:
    texts = draw(get_operation("encode_text"), parse_shape("eva02-b16:text b256"))["samples"]
    assert texts.shape == (256, 77)
    assert (texts[:, 0] == Tokenizer().start_id).all()
    lengths = (texts != 0).sum(-1)
    assert torch.equal(texts.argmax(-1), lengths - 1)  # the end token is the largest
    assert 11 < lengths.double().mean() < 16


def test_the_step_that_recomputes_is_the_same_step() -> None:
    op, shape = get_operation("clip_step"), parse_shape("tiny b3")
    inputs = draw(op, shape)
    again = op.variants["recompute activations"]
    assert relative_error(gradients(op, again, inputs), gradients(op, op.ours, inputs)) <= 1e-6
    kept = [saved_bytes(partial(function, **inputs), torch.device("cpu")) for function in (again, op.ours)]
    assert kept[0] < 0.7 * kept[1]


def test_towers_have_their_own_parameters() -> None:
    shape = parse_shape("tiny b1")
    counts = {name: len(draw(get_operation(name), shape)["parameters"]) for name in MODEL_OPERATIONS}
    assert counts["clip_step"] == counts["encode_image"] + counts["encode_text"] + 1  # the temperature


def test_weights_are_float32_under_autocast_and_in_the_dtype_otherwise() -> None:
    shape = parse_shape("tiny b1")
    for name, dtype in (("encode_image", torch.bfloat16), ("clip_step", torch.float32)):
        inputs = draw(get_operation(name), shape, torch.bfloat16)
        assert {values.dtype for values in inputs["parameters"]} == {dtype}, name


@pytest.mark.parametrize("name", ["encode_image", "encode_text"])
def test_towers_refuse_dropped_patches(name: str) -> None:
    with pytest.raises(UserError, match="dropped in training only"):
        draw(get_operation(name), parse_shape("tiny b1 drop50"))


@pytest.mark.parametrize("name", MODEL_OPERATIONS)
def test_the_default_models_are_those_that_open_clip_has(name: str) -> None:
    op = get_operation(name)
    for shape in map(parse_shape, {*op.shapes["cpu"], *op.shapes["cuda"]}):
        models.check_comparable(shape)
    with pytest.raises(UserError, match=r"'emoji@48 b1': .* pools by mean and has 8,192; expected another model"):
        draw(op, parse_shape("emoji@48 b1"))


def test_whole_models_are_known_by_name() -> None:
    assert set(MODEL_OPERATIONS) <= set(operations())
    assert all(get_operation(name).registered is None for name in MODEL_OPERATIONS)


# --- the plain model ------------------------------------------------------------------------------------------------


# Of the published models none takes the mean of its patches, which the plain model can't.
@pytest.mark.parametrize("name", [name for name in list_models() if get_config(name).vision.pool == "token"])
def test_the_plain_model_has_the_parameters_of_ours(name: str) -> None:
    ours = create_model(name, device="meta", vision={"layers": 2}, text={"layers": 2})
    plain = PlainClip(ours.config, torch.device("cpu"))
    expected = {key: values.shape for key, values in to_open_clip(ours.state_dict()).items()}
    assert {key: values.shape for key, values in plain.named_parameters()} == expected
    assert not any(buffer.is_meta for buffer in plain.buffers())


@pytest.mark.parametrize(
    "name",
    [
        "EVA02-B-16",
        "EVA01-g-14",
        *(pytest.param(n, marks=pytest.mark.exhaustive) for n in ("EVA02-L-14-336", "EVA02-E-14")),
    ],
)
def test_the_plain_model_is_open_clips(name: str) -> None:
    """Layer by layer, as both print themselves."""
    theirs: Any = open_clip.get_model_config(name)
    vision, width = theirs["vision_cfg"], theirs["embed_dim"]
    plain = PlainClip(get_config(ALIASES[name]), torch.device("cpu"))
    with torch.device("meta"):
        trunk = timm.create_model(vision["timm_model_name"], num_classes=width, global_pool=vision["timm_pool"])
        text = open_clip.transformer.TextTransformer(**theirs["text_cfg"], output_dim=width)
    assert repr(plain.visual["trunk"]) == repr(trunk)
    assert repr(plain.text) == repr(text)


def test_the_plain_model_has_open_clips_tables() -> None:
    trunk: Any = timm.create_model("eva02_base_patch16_clip_224", depth=1)
    plain: Any = PlainClip(create_model("EVA02-B-16", device="meta", vision={"layers": 1}).config, torch.device("cpu"))
    assert torch.equal(plain.visual["trunk"].rope.pos_embed, trunk.rope.pos_embed)
    assert torch.equal(plain.text.attn_mask, open_clip.transformer.TextTransformer(layers=1).attn_mask)


# --- what they cost -------------------------------------------------------------------------------------------------


def _counted(function: Callable[[], object]) -> int:
    """FLOPs that torch counts. The counter doesn't know attention on a CPU, so it sees the products written out."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_flops_are_those_that_torch_counts(name: str, shape: str) -> None:
    op, sizes = get_operation(name), parse_shape(shape)
    inputs, work = draw(op, sizes), op.work(sizes, 4)
    # With gradients switched on: without them, the text tower's attention is one op that the counter doesn't know.
    for values in inputs.get("parameters", ()):
        values.requires_grad_()
    forward = _counted(lambda: op.eager(**inputs))
    assert work.forward.flops == forward
    if work.backward is not None:
        assert work.backward.flops == _counted(lambda: gradients(op, op.eager, inputs)) - forward


def _bytes(value: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors(value))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "shape"), CASES)
def test_bytes_are_those_of_inputs_and_outputs(name: str, shape: str, dtype: torch.dtype) -> None:
    op, sizes, traffic = get_operation(name), parse_shape(shape), OPERATIONS[name]
    inputs, work = draw(op, sizes, dtype), op.work(sizes, dtype.itemsize)
    read = sum(_bytes(value) for key, value in inputs.items() if key not in traffic.negligible)
    if name in ("encode_text", "clip_step"):  # of the token embedding, a row for each token of the captions is read
        rows, width = 49408 - sizes.batch * 16, 128
        read -= rows * width * inputs["parameters"][0].itemsize
    written = sum(_bytes(inputs[key]) for key in traffic.written)
    if traffic.outputs:
        written += _bytes(outputs(op.eager, inputs))
    assert work.forward.bytes == read + written
    if work.backward is not None:
        written = sum(_bytes(inputs[key]) for key in op.gradients if key not in traffic.negligible)
        assert work.backward.bytes == read + written


@pytest.mark.parametrize("name", [name for name, traffic in OPERATIONS.items() if traffic.negligible])
def test_what_is_not_counted_is_negligible(name: str) -> None:
    op = get_operation(name)
    for shape in map(parse_shape, op.shapes["cpu"]):
        inputs = draw(op, shape)
        assert sum(_bytes(inputs[key]) for key in OPERATIONS[name].negligible) <= 1e-4 * op.work(shape, 4).forward.bytes


def test_the_token_embedding_is_read_once_at_most() -> None:
    op, config = get_operation("encode_text"), get_config("tiny")
    small, large = (op.work(parse_shape(f"tiny:text b{batch}"), 4).forward.bytes for batch in (5000, 5001))
    assert large - small == 8 * config.text.context_length + 4 * config.embed_dim


# --- shapes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_default_shapes_have_names_that_are_read(name: str, device: str) -> None:
    names = get_operation(name).shapes[device]
    assert [parse_shape(shape).name for shape in names] == list(names)
    assert len(set(names)) == len(names) > 0


# --- peers ----------------------------------------------------------------------------------------------------------

HERE = [(op, peer.name) for op in OPERATIONS for peer in peers_of(op) if peer.absence("cpu") is None]


def test_the_peers_that_come_with_the_tests_are_all_here() -> None:
    expected = [("clip_loss", "open_clip_torch"), ("siglip_loss", "open_clip_torch"), ("lamb_step", "timm")]
    assert [*expected, ("adamw_step", "torch fused")] == HERE


@pytest.mark.parametrize(("name", "peer"), HERE)
def test_peers_on_a_cpu_agree_with_float64(name: str, peer: str) -> None:
    op, shape = get_operation(name), parse_shape("tiny b7")
    tolerance = TOLERANCES.get(name, TOLERANCE)[torch.float32]
    assert_exact(op, build(name, peer, shape), shape, training=bool(op.gradients), tolerance=tolerance)


@pytest.mark.parametrize("name", ["clip_loss", "siglip_loss"])
def test_open_clip_runs_under_autocast(name: str) -> None:
    op, shape = get_operation(name), parse_shape("tiny b7")
    function = build(name, "open_clip_torch", shape)
    assert_exact(op, function, shape, torch.bfloat16, tolerance=5e-2)
    seen: list[bool] = []
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append(torch.is_autocast_enabled("cpu"))
    )
    try:
        for dtype in (torch.bfloat16, torch.float32):
            function(**draw(op, shape, dtype))
    finally:
        handle.remove()
    assert seen == [True, False]


def _flash_loss(
    q: Tensor, k: Tensor, labels: Tensor | None = None, scale: Tensor | None = None, head_dim: int = 256
) -> Tensor:
    assert labels is None
    assert scale is not None
    return F.cross_entropy(scale * q @ k.T, torch.arange(len(q)), reduction="none")


def _linear_cross_entropy(
    e: Tensor, c: Tensor, targets: Tensor, reduction: str = "mean", filter_eps: float | str | None = "high"
) -> Tensor:
    assert filter_eps is None
    return F.cross_entropy(e @ c.T, targets, reduction=reduction)


class _LigerLoss(nn.Module):
    def forward(self, lin_weight: Tensor, _input: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(_input @ lin_weight.T, target)


def _multi_tensor_lamb(
    chunk: int,
    overflow: Tensor,
    lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    bias_correction: int,
    weight_decay: float,
    grad_averaging: int,
    mode: int,
    global_grad_norm: Tensor,
    max_grad_norm: float,
    use_nvlamb: bool | None,
) -> None:
    """The kernel's arithmetic; like the kernel, it leaves the direction in the gradients."""
    assert (bias_correction, grad_averaging, mode) == (1, 1, 1)
    assert float(global_grad_norm) <= max_grad_norm
    for g, p, m, v in zip(*lists, strict=True):
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).add_(g.square(), alpha=1 - beta2)
        g.copy_(m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + epsilon) + weight_decay * p)
        ratio = p.norm() / g.norm() if use_nvlamb or weight_decay != 0 else 1.0
        p.sub_(lr * ratio * g)


def _multi_tensor_adam(
    chunk: int,
    overflow: Tensor,
    lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """The kernel's arithmetic; mode 1 is AdamW."""
    assert (mode, bias_correction) == (1, 1)
    for g, p, m, v in zip(*lists, strict=True):
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).add_(g.square(), alpha=1 - beta2)
        p.sub_(lr * (m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + epsilon) + weight_decay * p))


def _multi_tensor_l2norm(
    chunk: int, overflow: Tensor, lists: list[list[Tensor]], per_tensor: bool
) -> tuple[Tensor, Tensor]:
    norms = torch.stack([values.float().norm() for values in lists[0]])
    return norms.norm().view(1), norms if per_tensor else norms.new_empty(0)


def _multi_tensor_applier(op: Any, overflow: Tensor, lists: list[list[Tensor]], *args: Any) -> Any:
    return op(2048 * 32, overflow, lists, *args)


# Stand-ins with the signatures and the meaning that the packages document.
STAND_INS: dict[str, dict[str, Any]] = {
    "inf_cl": {"cal_flash_loss": _flash_loss},
    "cut_cross_entropy": {"linear_cross_entropy": _linear_cross_entropy},
    "liger_kernel.transformers.fused_linear_cross_entropy": {"LigerFusedLinearCrossEntropyLoss": _LigerLoss},
    "amp_C": {
        "multi_tensor_lamb": _multi_tensor_lamb,
        "multi_tensor_adam": _multi_tensor_adam,
        "multi_tensor_l2norm": _multi_tensor_l2norm,
    },
    "apex.multi_tensor_apply": {"multi_tensor_applier": _multi_tensor_applier},
}
ELSEWHERE = [
    ("clip_loss", "inf-cl"),
    ("clip_loss", "cut-cross-entropy"),
    ("clip_loss", "liger-kernel"),
    ("lamb_step", "evakernels in one group"),
    ("lamb_step", "apex"),
    ("adamw_step", "apex"),
    ("gradient_norm", "apex"),
]

OPTIMIZER_PEERS = [("lamb_step", "timm"), ("lamb_step", "apex"), ("adamw_step", "torch fused"), ("adamw_step", "apex")]


@pytest.fixture
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, STAND_INS)


def test_every_peer_is_tested() -> None:
    assert sorted(HERE + ELSEWHERE) == sorted((op, peer.name) for op in OPERATIONS for peer in peers_of(op))


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize(("name", "peer"), ELSEWHERE)
def test_peers_of_the_gpu_are_asked_for_the_same_thing(name: str, peer: str) -> None:
    op, shape = get_operation(name), parse_shape("tiny b7")
    tolerance = TOLERANCES.get(name, TOLERANCE)[torch.float32]
    assert_exact(op, build(name, peer, shape), shape, training=bool(op.gradients), tolerance=tolerance)


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize(("name", "peer"), OPTIMIZER_PEERS)
def test_peers_of_optimizers_make_the_same_step(name: str, peer: str) -> None:
    op, shape = get_operation(name), parse_shape("tiny b1")
    inputs = as_double(draw(op, shape))
    expected = _moved(op.eager, as_double(draw(op, shape)))
    assert relative_error(_moved(build(name, peer, shape), inputs), expected) <= 1e-10


@pytest.mark.usefixtures("_stand_ins")
@pytest.mark.parametrize(("name", "peer"), OPTIMIZER_PEERS)
def test_peers_that_know_one_dtype_only_say_so(name: str, peer: str) -> None:
    op, shape = get_operation(name), parse_shape("tiny b1")
    with pytest.raises(TypeError, match=r"no moments in torch.float32 for parameters in torch.bfloat16"):
        outputs(build(name, peer, shape), draw(op, shape, torch.bfloat16))
