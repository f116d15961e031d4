"""Masks become packing: towers that run without padding and vision towers of packed images, against untouched ones."""

import copy

import pytest
import timm
import torch
import transformers as hf
from dropin_families import assert_same_gradients, log_ops, randomised
from timm.models.naflexvit import NaFlexVit
from torch._dynamo.testing import CompileCounter
from torch.nn.modules.module import register_module_forward_pre_hook

import evakernels

BATCH, LENGTH, PATCH = 4, 12, 4
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 16, "projection_size": 64, "eos_token_id": 49}
NAFLEX = {
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 5,
    "patch_size": PATCH,
    "pos_embed_grid_size": (8, 8),
}
SIGLIP2 = {**SIZES, "patch_size": PATCH, "num_patches": 16}
BERT = {**SIZES, "vocab_size": 50, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def grids(generator, count=BATCH):
    """Heights and widths of up to `LENGTH` patches."""
    shapes = torch.tensor([(1, 3), (2, 2), (2, 4), (3, 3), (2, 6), (4, 3), (1, 7)])
    return shapes[torch.randint(len(shapes), (count,), generator=generator)]


def patches(generator):
    """Flattened patches `[B, N, 3 P^2]`, their real ones and the grids of the images."""
    shapes = grids(generator)
    real = torch.arange(LENGTH) < shapes.prod(1, keepdim=True)
    return torch.randn(BATCH, LENGTH, 3 * PATCH**2, generator=generator), real, shapes


def naflex_inputs(generator):
    values, real, shapes = patches(generator)
    places = torch.arange(LENGTH)
    coordinates = torch.stack((places // shapes[:, 1:], places % shapes[:, 1:]), -1) * real.unsqueeze(-1)
    return {"x": {"patches": values, "patch_coord": coordinates, "patch_valid": real}}


def siglip2_inputs(generator):
    values, real, shapes = patches(generator)
    return {"pixel_values": values, "pixel_attention_mask": real.int(), "spatial_shapes": shapes}


def captions(generator):
    lengths = torch.randint(2, LENGTH + 1, (BATCH, 1), generator=generator)
    real = torch.arange(LENGTH) < lengths
    tokens = torch.randint(3, 48, (BATCH, LENGTH), generator=generator).masked_fill(~real, 1)
    return {"input_ids": tokens.scatter(1, lengths - 1, 49), "attention_mask": real.long()}


def left_padded(generator):
    """The model pools the last token."""
    return {name: value.flip(1) for name, value in captions(generator).items()}


def image_batch(generator):
    """Patches of images of several sizes, as Qwen2-VL takes them; sides are a multiple of 2."""
    shapes = 2 * grids(generator, 3)
    values = torch.randn(int(shapes.prod(1).sum()), 3 * 2 * PATCH**2, generator=generator)
    return {"hidden_states": values, "grid_thw": torch.cat((torch.ones(3, 1, dtype=torch.int64), shapes), 1)}


def pixtral_inputs(generator):
    sizes = PATCH * grids(generator, 3)
    return {"pixel_values": torch.randn(3, 3, 28, 28, generator=generator), "image_sizes": sizes.tolist()}


def naflex(name):
    return lambda: timm.create_model(name, **NAFLEX)


def of_config(model, config, **sizes):
    return lambda: getattr(hf, model)(getattr(hf, config)(**sizes))


def module_of(name):
    """transformers exports no vision towers of VLMs."""
    return __import__(f"transformers.models.{name}.modeling_{name}", fromlist=["_"])


def vision_tower(name, tower, **sizes):
    def build():
        module = module_of(name)
        cls = getattr(module, tower)
        return cls(cls.config_class(**sizes))

    return build


QWEN = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "temporal_patch_size": 2, "in_channels": 3}
QWEN3 = {**QWEN, "hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 32}
QWEN25 = {**QWEN3, "window_size": 16, "fullatt_block_indexes": [1]}
PIXTRAL = {**SIZES, "patch_size": PATCH, "image_size": 28, "head_dim": 32}

PADDED = {
    **{name: (naflex(name), naflex_inputs) for name in timm.list_models("naflexvit*")},
    "naflex-rope": (
        lambda: NaFlexVit(**NAFLEX, rope_type="axial", rope_ref_feat_shape=(4, 4), reg_tokens=2),
        naflex_inputs,
    ),
    "naflex-key-mask": (lambda: NaFlexVit(**NAFLEX, use_key_only_attn_mask=True, reg_tokens=1), naflex_inputs),
    "siglip2": (of_config("Siglip2VisionModel", "Siglip2VisionConfig", **SIGLIP2), siglip2_inputs),
    "siglip-text": (of_config("SiglipTextModel", "SiglipTextConfig", **TEXT), left_padded),
    "siglip2-text": (of_config("Siglip2TextModel", "Siglip2TextConfig", **TEXT), left_padded),
    "clip-text": (of_config("CLIPTextModel", "CLIPTextConfig", **TEXT), captions),
    "bert": (of_config("BertModel", "BertConfig", **BERT), captions),
    "roberta": (of_config("RobertaModel", "RobertaConfig", **BERT), captions),
    "xlm-roberta": (of_config("XLMRobertaModel", "XLMRobertaConfig", **BERT), captions),
}
PACKED = {
    "qwen2-vl": (
        vision_tower("qwen2_vl", "Qwen2VisionTransformerPretrainedModel", **QWEN, embed_dim=64, hidden_size=32),
        image_batch,
    ),
    "qwen2.5-vl": (vision_tower("qwen2_5_vl", "Qwen2_5_VisionTransformerPretrainedModel", **QWEN25), image_batch),
    "qwen3-vl": (vision_tower("qwen3_vl", "Qwen3VLVisionModel", **QWEN3, deepstack_visual_indexes=[0]), image_batch),
    "pixtral": (of_config("PixtralVisionModel", "PixtralVisionConfig", **PIXTRAL), pixtral_inputs),
}
MODELS = PADDED | PACKED


def pair(name):
    """Inputs by seed, an accelerated model and an untouched one."""
    build, inputs = MODELS[name]
    untouched = randomised(build)
    model = copy.deepcopy(untouched)
    evakernels.accelerate(model, force=True, strict=True)
    return lambda seed: inputs(torch.Generator().manual_seed(seed)), model, untouched


def run(model, inputs, dtype=torch.float32):
    """All outputs of real tokens, `[..., C]` in one row each."""

    def cast(value):
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    given = {n: {k: cast(v) for k, v in x.items()} if isinstance(x, dict) else cast(x) for n, x in inputs.items()}
    out = model(**given)
    if isinstance(out, torch.Tensor):
        return out.double()
    hidden, pooled = out.last_hidden_state, out.get("pooler_output")
    mask = inputs.get("attention_mask", inputs.get("pixel_attention_mask"))
    hidden = hidden if mask is None else hidden[mask.bool()]
    return torch.cat([x.flatten() for x in (hidden, pooled) if x is not None]).double()


def gradients(model, inputs, dtype=torch.float32):
    model.zero_grad()
    out = run(model, inputs, dtype)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64))
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual, expected):
    bound = 1e-5 * float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


def norm(values):
    return float(torch.cat([value.flatten() for value in values]).norm())


OFTEN = {*MODELS} - {*timm.list_models("naflexvit*")} | {"naflexvit_base_patch16_gap", "naflexvit_base_patch16_siglip"}


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.exhaustive) for n in MODELS])
def test_packed_model_matches_untouched(name):
    """Outputs, and gradients with at most three times the untouched model's error."""
    inputs, model, untouched = pair(name)
    exact = copy.deepcopy(untouched).double()
    model.train(), untouched.train(), exact.train()
    for seed in range(4):
        given = inputs(seed)
        with log_ops() as ops:
            actual = run(model, given)
        assert ops >= {"packed_attention"}
        assert "rope_attention" not in ops
        assert_close(actual, run(untouched, given))
        found, theirs = gradients(model, given), gradients(untouched, given)
        truth = gradients(exact, given, torch.float64)
        assert_same_gradients({n: g.float() for n, g in found.items()}, {n: g.float() for n, g in theirs.items()})
        errors = [norm(g[n] - truth[n] for n in truth) for g in (found, theirs)]
        assert errors[0] <= 3 * errors[1]


AUTOCAST = ["naflexvit_base_patch16_gap", "siglip2", "clip-text", "bert", "qwen2.5-vl", "pixtral"]


@pytest.mark.parametrize("name", AUTOCAST)
def test_packed_model_under_autocast(name):
    inputs, model, untouched = pair(name)
    exact, errors = run(untouched, inputs(1)).detach(), []
    for m in (model, untouched):
        with torch.autocast("cpu", torch.bfloat16):
            out = run(m, inputs(1))
        out.sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in m.parameters())
        errors.append(float((out.detach() - exact).norm()))
    assert errors[0] <= 2 * errors[1]


@pytest.mark.parametrize("name", ["naflexvit_base_patch16_gap", "siglip2", "bert"])
def test_packed_layers_see_no_padding(name):
    """Linear layers of the blocks compute as many tokens as there are."""
    inputs, model, _ = pair(name)
    given, rows = inputs(0), set()

    def note(module, args):
        if isinstance(module, torch.nn.Linear) and module in layers:
            rows.add(args[0].shape[:-1])

    layers = {*(model.blocks if hasattr(model, "blocks") else model.encoder).modules()}
    handle = register_module_forward_pre_hook(note)
    run(model, given)
    handle.remove()
    masks = "patch_valid", "attention_mask", "pixel_attention_mask"
    real = next(mask for name, mask in (given | given.get("x", {})).items() if name in masks)
    assert rows == {(1, int(real.sum()) + BATCH * getattr(model, "num_prefix_tokens", 0))}


# --- calls that keep the model's own code -----------------------------------------------------------------------------


def reason_of(model, report, given, tower):
    """The outputs of a call, and why the tower ran its own code; None if it packed."""
    with report.watch():
        out = run(model, given)
    return out, next((idle.reason for idle in report.idle if idle.name == tower), None)


def encoder_pair(name, **options):
    build, inputs = MODELS[name]
    torch.manual_seed(0)
    untouched = build().eval()
    for key, value in options.items():
        setattr(untouched, key, value)
    model = copy.deepcopy(untouched)
    return inputs(torch.Generator().manual_seed(0)), model, untouched, evakernels.accelerate(model, force=True)


def test_packing_refuses_other_masks():
    """A mask with a bias, keys that differ by query, in two and four dimensions, and a window."""
    _, model, untouched, report = encoder_pair("siglip2")
    tokens = torch.randn(LENGTH, LENGTH, 64)  # a mask `[N, N]` could be one of keys
    window = torch.ones(LENGTH, LENGTH).tril(2).triu(-2).bool()
    bias, keys = torch.randn(LENGTH, 1, 1, LENGTH).clamp(min=0), torch.rand(LENGTH, LENGTH) > 0.3
    for mask in (bias, keys, keys[None, None], window[None, None]):
        with report.watch(), log_ops() as ops:
            actual = model.encoder(tokens, mask).last_hidden_state
        assert_close(actual, untouched.encoder(tokens, mask).last_hidden_state)
        assert "packed_attention" not in ops
        assert "mask" in next(idle.reason for idle in report.idle if idle.name == "encoder")


def test_packing_refuses_padded_pooled_token():
    """SigLIP's text model pools its last token, BERT its first, CLIP the end token, which may be hidden as padding."""
    for name in ("siglip-text", "bert", "clip-text"):
        given, model, untouched, report = encoder_pair(name)
        if name == "clip-text":
            given["attention_mask"] = (given["input_ids"] != 49).long() & given["attention_mask"]
        else:
            given = {key: value.flip(1) for key, value in given.items()}
        out, reason = reason_of(model, report, given, "encoder")
        assert_close(out, run(untouched, given))
        assert reason == "mask"


def test_packing_refuses_dropout():
    given, model, untouched, report = encoder_pair("bert")
    for m in (model, untouched):
        m.train()
        for layer in m.encoder.layer:
            layer.attention.self.dropout.p = 0.5
    torch.manual_seed(1)
    out, reason = reason_of(model, report, given, "encoder")
    torch.manual_seed(1)
    assert_close(out, run(untouched, given))
    assert reason == "dropout"
    assert reason_of(model.eval(), report, given, "encoder")[1] is None


def test_packing_refuses_stochastic_depth():
    given = naflex_inputs(torch.Generator().manual_seed(0))
    untouched = randomised(lambda: NaFlexVit(**NAFLEX, drop_path_rate=0.5)).train()
    model = copy.deepcopy(untouched)
    report = evakernels.accelerate(model, force=True)
    torch.manual_seed(1)
    out, reason = reason_of(model, report, given, "")
    torch.manual_seed(1)
    assert_close(out, run(untouched, given))
    assert reason == "dropout"


def test_packing_refuses_given_naflex_mask():
    """timm pools by `patch_valid`, so that a mask of the caller may hide tokens that are pooled."""
    given, model, untouched, report = encoder_pair("naflexvit_base_patch16_gap")
    given["x"]["attn_mask"] = (torch.arange(LENGTH + 4) < 5).expand(BATCH, 1, 1, -1)
    out, reason = reason_of(model, report, given, "")
    assert_close(out, run(untouched, given))
    assert reason == "mask"


def test_packing_refuses_hooks():
    given, model, untouched, report = encoder_pair("siglip2")
    shapes = []
    model.encoder.layers[1].self_attn.register_forward_hook(lambda module, args, out: shapes.append(out[0].shape))
    out, reason = reason_of(model, report, given, "encoder")
    assert_close(out, run(untouched, given))
    assert (reason, shapes) == ("hooks", [(BATCH, LENGTH, 64)])


def test_packing_keeps_hidden_states():
    """transformers records them by hooks."""
    given, model, untouched, _ = encoder_pair("bert")
    states = [m(**given, output_hidden_states=True).hidden_states for m in (model, untouched)]
    for actual, expected in zip(*states, strict=True):
        assert_close(actual, expected)


def test_packing_refuses_eager_attention():
    given, model, untouched, report = encoder_pair("siglip2")
    for m in (model, untouched):
        m.set_attn_implementation("eager")
    out, reason = reason_of(model, report, given, "encoder")
    assert_close(out, run(untouched, given))
    assert "eager" in reason


def test_packing_follows_excluded_attention():
    """Layers of a tower pack only if all of them do."""
    given, model, untouched, report = encoder_pair("siglip2")
    assert {done.module for done in report.replaced} >= {"Siglip2Encoder"}
    report = evakernels.accelerate(model, force=True, exclude="encoder.layers.1.self_attn")
    assert "Siglip2Encoder" in {left.module for left in report.left}
    assert_close(run(model, given), run(untouched, given))


def test_packing_checkpoints_layers():
    inputs, model, untouched = pair("siglip2")
    model.gradient_checkpointing_enable()
    actual, expected = (gradients(m.train(), inputs(3)) for m in (model, untouched))
    assert_same_gradients({n: g.float() for n, g in actual.items()}, {n: g.float() for n, g in expected.items()})


# --- torch.compile ----------------------------------------------------------------------------------------------------


more = [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("siglip2", "clip-text")]


@pytest.mark.parametrize("name", ["bert", *more])
def test_compiled_masks_need_no_recompile(name):
    """Compiled towers keep the padding: one program for all masks of a length, one more for all other lengths."""
    inputs, model, untouched = pair(name)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed, length in enumerate([LENGTH, LENGTH, LENGTH, 11, 10, 9]):
        given = {k: x[:, :length] if x.shape[1] == LENGTH else x for k, x in inputs(seed).items()}
        if "spatial_shapes" in given:
            given["spatial_shapes"] = torch.tensor([[1, min(int(n), length)] for n in given["spatial_shapes"].prod(1)])
        with torch.no_grad():
            assert_close(run(compiled, given), run(untouched, given))
        assert counter.frame_count == 1 + (length < LENGTH)


@pytest.mark.exhaustive
def test_compiled_naflex_recompiles_as_untouched():
    inputs, *models = pair("naflexvit_base_patch16_gap")
    counts = []
    for m in models:
        torch._dynamo.reset()
        counter = CompileCounter()
        compiled = torch.compile(m, backend=counter)
        with torch.no_grad():
            outputs = [run(compiled, inputs(seed)) for seed in range(3)]
            assert_close(outputs[2], run(models[1], inputs(2)))
        counts.append(counter.frame_count)
    assert counts[0] <= counts[1]


def test_compiled_images_of_any_size():
    """Attention of packed images compiles as one graph for all numbers and sizes of images but the first."""
    _, model, untouched = pair("qwen2.5-vl")
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model.blocks[0], backend=counter, fullgraph=True)
    for lengths in ([4, 8], [6, 2, 3], [5, 9, 1, 2], [16, 2, 2], [7, 3, 9, 1, 1]):
        bounds = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        angles = torch.randn(sum(lengths), 16).repeat(1, 2)
        tokens, tables = torch.randn(sum(lengths), 64), (angles.cos(), angles.sin())
        actual = compiled(tokens, cu_seqlens=bounds, position_embeddings=tables)
        assert_close(actual, untouched.blocks[0](tokens, cu_seqlens=bounds, position_embeddings=tables))
    assert counter.frame_count <= 2
