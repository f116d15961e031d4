"""Masks become packing: towers that run without padding and vision towers of packed images, against untouched ones."""

import copy
from functools import partial
from importlib import import_module

import pytest
import timm
import torch
import transformers as hf
from dropin_families import accelerated, log_ops, randomised
from open_clip.hf_model import HFTextEncoder
from timm.models.naflexvit import NaFlexVit
from torch._dynamo.testing import CompileCounter
from torch.utils._pytree import tree_map

import evakernels

BATCH, LENGTH, PATCH = 4, 12, 4
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 50, "max_position_embeddings": 16, "projection_size": 64, "eos_token_id": 49}
NAFLEX = {"embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 5, "patch_size": PATCH}
NAFLEX["pos_embed_grid_size"] = 8, 8
ROPE = {"rope_type": "axial", "rope_ref_feat_shape": (4, 4)}
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


def of_config(model, config, **sizes):
    return lambda: getattr(hf, model)(getattr(hf, config)(**sizes))


def vision_tower(name, tower, **sizes):
    """transformers exports no vision towers of VLMs."""
    cls = getattr(import_module(f"transformers.models.{name}.modeling_{name}"), tower)
    return lambda: cls(cls.config_class(**sizes))


QWEN = {"depth": 2, "num_heads": 2, "patch_size": PATCH, "temporal_patch_size": 2, "in_channels": 3}
QWEN3 = {**QWEN, "hidden_size": 64, "intermediate_size": 96, "out_hidden_size": 32}
QWEN25 = {**QWEN3, "window_size": 16, "fullatt_block_indexes": [1]}
PIXTRAL = {**SIZES, "patch_size": PATCH, "image_size": 28, "head_dim": 32}

PADDED = {
    **{name: (partial(timm.create_model, name, **NAFLEX), naflex_inputs) for name in timm.list_models("naflexvit*")},
    "naflex-rope": (partial(NaFlexVit, **NAFLEX, **ROPE, reg_tokens=2), naflex_inputs),
    "naflex-key-mask": (partial(NaFlexVit, **NAFLEX, use_key_only_attn_mask=True, reg_tokens=1), naflex_inputs),
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
    """Inputs by seed, an accelerated model, an untouched one, and the report."""
    build, inputs = MODELS[name]
    untouched = randomised(build)
    model = copy.deepcopy(untouched)
    report = evakernels.accelerate(model, force=True, strict=True)
    return lambda seed: inputs(torch.Generator().manual_seed(seed)), model, untouched, report


def run(model, inputs, dtype=torch.float32):
    """All outputs, the last of real tokens alone, in one row."""

    def cast(value):
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    out = model(**tree_map(cast, inputs))
    if isinstance(out, torch.Tensor):
        return out.double()
    hidden, others = out.last_hidden_state, (out.get("pooler_output"), *(out.get("hidden_states") or ()))
    mask = inputs.get("attention_mask", inputs.get("pixel_attention_mask"))
    hidden = hidden if mask is None else hidden[mask.bool()]
    return torch.cat([x.flatten() for x in (hidden, *others) if x is not None]).double()


def gradients(model, inputs, dtype=torch.float32):
    model.zero_grad()
    out = run(model, inputs, dtype)
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64))
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(actual, expected):
    bound = 1e-5 * float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, rtol=0, atol=bound)


def assert_gradients(model, untouched, given):
    """At most three times the untouched model's error."""
    exact = gradients(copy.deepcopy(untouched).double(), given, torch.float64)
    found = [gradients(m, given) for m in (model, untouched)]
    assert found[0].keys() == found[1].keys()
    errors = [torch.cat([(g[n] - exact[n]).flatten() for n in exact]).norm() for g in found]
    assert errors[0] <= 3 * errors[1]


OFTEN = {*MODELS} - {*timm.list_models("naflexvit*")} | {"naflexvit_base_patch16_gap", "naflexvit_base_patch16_siglip"}


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.exhaustive) for n in MODELS])
def test_packed_model_matches_untouched(name):
    inputs, model, untouched, _ = pair(name)
    model.train(), untouched.train()
    for seed in range(4):
        given = inputs(seed)
        with log_ops() as ops:
            actual = run(model, given)
        assert ops >= {"packed_attention"}
        assert "rope_attention" not in ops
        expected = run(untouched, given)
        assert_close(actual, expected)
        assert_gradients(model, untouched, given)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = [run(m, given) for m in (model, untouched)]
    outputs[0].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    errors = [(out - expected).norm() for out in outputs]
    assert errors[0] <= 2 * errors[1]


def test_packed_layers_are_checkpointed():
    inputs, model, untouched, _ = pair("siglip2")
    model.gradient_checkpointing_enable()
    assert_gradients(model.train(), untouched.train(), inputs(3))


# --- calls that keep the model's own code -----------------------------------------------------------------------------


def flip(model, given):
    """SigLIP's text model pools its last token, BERT its first."""
    return {name: value.flip(1) for name, value in given.items()}


def hide_end(model, given):
    """CLIP pools the end token."""
    return given | {"attention_mask": (given["input_ids"] != 49).long() & given["attention_mask"]}


def hide_pooled(model, given):
    """timm pools by `patch_valid`."""
    return {"x": given["x"] | {"attn_mask": (torch.arange(LENGTH + 4) < 5).expand(BATCH, 1, 1, -1)}}


def drop(model, given):
    for layer in model.train().encoder.layer:
        layer.attention.self.dropout.p = 0.5
    return given


def drop_paths(model, given):
    for block in model.train().blocks:
        block.drop_path1 = timm.layers.DropPath(0.5)
    return given


def hook(model, given):
    model.encoder.layers[1].self_attn.register_forward_hook(lambda *args: None)
    return given


def record_states(model, given):
    return given | {"output_hidden_states": True}


def use_eager(model, given):
    model.set_attn_implementation("eager")
    return given


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("siglip-text", flip),
        ("bert", flip),
        ("clip-text", hide_end),
        ("naflexvit_base_patch16_gap", hide_pooled),
        ("bert", drop),
        ("naflexvit_base_patch16_gap", drop_paths),
        ("siglip2", hook),
        ("bert", record_states),
        ("siglip2", use_eager),
    ],
)
def test_refused_call_matches_untouched(name, change):
    inputs, model, untouched, _ = pair(name)
    outputs = []
    for m in (untouched, model):
        given = change(m.eval(), inputs(0))
        torch.manual_seed(1)
        with log_ops() as ops:
            outputs.append(run(m, given))
    assert_close(outputs[1], outputs[0])
    assert "packed_attention" not in ops
    if change in (drop, drop_paths):
        with log_ops() as ops:
            run(model.eval(), given)
        assert "packed_attention" in ops


def test_hook_on_rotary_function_is_called():
    """Hugging Face's `kernels` turns the function into modules: one of the file, which calls one of each attention."""
    inputs, model, untouched, _ = pair("pixtral")
    in_file = import_module("transformers.models.pixtral.modeling_pixtral").apply_rotary_pos_emb
    if not isinstance(in_file, torch.nn.Module):
        pytest.skip("this transformers takes another release of kernels")
    (in_layer,) = model.transformer.layers[1].attention._kernel_funcs.values()
    for function in (in_file, in_layer):
        calls = []
        hook = function.register_forward_hook(lambda *args, calls=calls: calls.append(args))
        with hook, log_ops() as ops:
            actual = run(model, inputs(0))
        assert calls
        assert "packed_attention" not in ops
        assert_close(actual, run(untouched, inputs(0)))


def test_encoder_refuses_other_arguments():
    """A mask with a bias, keys that differ by query, in two and four dimensions, a window, and an untried argument."""
    _, model, untouched, _ = pair("siglip2")
    tokens = torch.randn(LENGTH, LENGTH, 64)  # a mask `[N, N]` could be one of keys
    window = torch.ones(LENGTH, LENGTH).tril(2).triu(-2).bool()
    bias, keys = torch.randn(LENGTH, 1, 1, LENGTH).clamp(min=0), torch.rand(LENGTH, LENGTH) > 0.3
    for mask in (bias, keys, keys[None, None], window[None, None]):
        with log_ops() as ops:
            actual = model.encoder(tokens, mask).last_hidden_state
        assert_close(actual, untouched.encoder(tokens, mask).last_hidden_state)
        assert "packed_attention" not in ops
    with log_ops() as ops:
        model.encoder(tokens, keys[:, None, None], untried=keys)
    assert "packed_attention" not in ops


def config_of(name, sizes):
    cls = getattr(hf, name)
    parts = {"text_config": TEXT, "vision_config": {**SIGLIP2, "image_size": 16}}
    return cls(**(sizes if sizes is not None else parts))


def with_images(generator):
    return left_padded(generator) | siglip2_inputs(generator) | {"pixel_values": patches(generator)[0]}


def with_pixels(generator):
    return captions(generator) | {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}


def choices(generator):
    return {name: value.unflatten(0, (2, 2)) for name, value in captions(generator).items()}


CROPPED = {**BERT, "max_position_embeddings": 16, "num_labels": 3, "classifier_dropout": 0.0}
HOLDERS = {
    **{f"{kind}ForSequenceClassification": (kind, CROPPED, captions) for kind in ("Bert", "Roberta", "XLMRoberta")},
    **{f"{kind}ForMultipleChoice": (kind, CROPPED, choices) for kind in ("Bert", "Camembert", "XLMRobertaXL")},
    "CamembertForSequenceClassification": ("Camembert", CROPPED, captions),
    "XLMRobertaXLForSequenceClassification": ("XLMRobertaXL", CROPPED, captions),
    "RobertaForMultipleChoice": ("Roberta", CROPPED, choices),
    "XLMRobertaForMultipleChoice": ("XLMRoberta", CROPPED, choices),
    "BertForNextSentencePrediction": ("Bert", CROPPED, captions),
    "ChineseCLIPTextModel": ("ChineseCLIPText", CROPPED, captions),
    "CLIPTextModelWithProjection": ("CLIPText", TEXT, captions),
    "CLIPModel": ("CLIP", None, with_pixels),
    "ChineseCLIPModel": ("ChineseCLIP", None, with_pixels),
    "SiglipModel": ("Siglip", None, lambda g: with_pixels(g) | left_padded(g)),
    "Siglip2Model": ("Siglip2", None, with_images),
    "Siglip2ForImageClassification": ("Siglip2", None, siglip2_inputs),
}
"""Models of the list whose outputs need no padded token: configuration and inputs."""


def holder(name):
    kind, sizes, inputs = HOLDERS[name]
    untouched = randomised(lambda: getattr(hf, name)(config_of(f"{kind}Config", sizes))).eval()
    return untouched, inputs(torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", HOLDERS)
def test_pooling_model_packs_with_equal_outputs(name):
    untouched, given = holder(name)
    with log_ops() as ops:
        actual = accelerated(untouched, strict=True)(**given)
    assert "packed_attention" in ops
    expected = untouched(**given)
    for key in {"logits", "pooler_output", "text_embeds", "image_embeds", "logits_per_text"} & expected.keys():
        assert_close(actual[key], expected[key])


def open_clip_text():
    config = hf.BertConfig(**BERT, pad_token_id=1)
    return HFTextEncoder("", 8, config, pooler_type="mean_pooler", proj_type="linear", pretrained=False)


def test_open_clip_text_packs_with_equal_outputs():
    untouched = randomised(open_clip_text)
    tokens = captions(torch.Generator().manual_seed(0))["input_ids"]
    with log_ops() as ops:
        actual = accelerated(untouched, strict=True)(tokens)
    assert "packed_attention" in ops
    assert_close(actual, untouched(tokens))


class Reader(torch.nn.Module):
    """A model that averages padded tokens, too."""

    def __init__(self):
        super().__init__()
        self.text = hf.BertModel(hf.BertConfig(**BERT))

    def forward(self, **given):
        return {"logits": self.text(**given).last_hidden_state.mean(1)}


READERS = {
    "BertForQuestionAnswering": lambda: hf.BertForQuestionAnswering(hf.BertConfig(**BERT)),
    "BertForTokenClassification": lambda: hf.BertForTokenClassification(hf.BertConfig(**BERT)),
    "Reader": Reader,
}


@pytest.mark.parametrize("name", READERS)
def test_model_that_may_read_padding_is_equal(name):
    untouched = randomised(READERS[name]).eval()
    model = copy.deepcopy(untouched)
    report = evakernels.accelerate(model, force=True)
    given = captions(torch.Generator().manual_seed(0))
    assert [left.reason for left in report.left if left.module == "BertEncoder"] == [f"{name} may read padding"]
    actual, expected = model(**given), untouched(**given)
    for key in expected:
        assert_close(actual[key], expected[key])


@pytest.mark.parametrize("kind", ["Idefics3", "SmolVLM"])
def test_padded_patches_of_connector_are_equal(kind):
    """The connector mixes real and padded patches."""
    vision = {**SIZES, "image_size": 32, "patch_size": 8}
    text = {**SIZES, "vocab_size": 50, "num_key_value_heads": 2, "pad_token_id": 0, "model_type": "llama"}
    sizes = {"vision_config": vision, "text_config": text, "image_token_id": 49, "scale_factor": 2}
    config = getattr(hf, f"{kind}Config")(**sizes)
    untouched = randomised(lambda: getattr(hf, f"{kind}Model")(config))
    pixels, mask = torch.randn(1, 2, 3, 32, 32), torch.ones(1, 2, 32, 32, dtype=torch.bool)
    mask[0, 1, 16:] = False
    given = {"pixel_values": pixels, "pixel_attention_mask": mask}
    assert_close(
        *(torch.cat(list(m.get_image_features(**given).pooler_output)) for m in (accelerated(untouched), untouched))
    )


@pytest.mark.parametrize("sizes", [{}, {"global_pool": ""}])
def test_unpooled_naflex_features_are_equal(sizes):
    """Features that the tower doesn't pool itself keep their padded tokens."""
    untouched = randomised(partial(NaFlexVit, **NAFLEX | sizes))
    given = naflex_inputs(torch.Generator().manual_seed(0))["x"]
    run_features = (lambda m: m(given)) if sizes else (lambda m: m.forward_features(**given)["patches"])
    assert_close(run_features(accelerated(untouched, strict=True)), run_features(untouched))


def test_packing_follows_excluded_attention():
    """Layers of a tower pack only if all of them do."""
    inputs, model, untouched, report = pair("siglip2")
    assert {done.module for done in report.replaced} >= {"Siglip2Encoder"}
    report = evakernels.accelerate(model, force=True, exclude="encoder.layers.1.self_attn")
    assert "Siglip2Encoder" in {left.module for left in report.left}
    assert_close(run(model, inputs(0)), run(untouched, inputs(0)))


# --- torch.compile ----------------------------------------------------------------------------------------------------


more = [pytest.param(name, marks=pytest.mark.exhaustive) for name in ("siglip2", "clip-text")]


@pytest.mark.parametrize("name", ["bert", *more])
def test_compiled_masks_need_no_recompile(name):
    """Compiled towers keep the padding: one program for all masks of a length, one more for all other lengths."""
    inputs, model, untouched, _ = pair(name)
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
    inputs, *models, _ = pair("naflexvit_base_patch16_gap")
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
    _, model, untouched, _ = pair("qwen2.5-vl")
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
