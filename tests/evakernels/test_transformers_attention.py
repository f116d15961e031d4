"""transformers' models with `attn_implementation="evakernels"` compared with "sdpa"."""

import copy
import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from evakernels.backends import observed_by

transformers = pytest.importorskip("transformers")

import evakernels.transformers  # noqa: E402 - needs transformers

pytestmark = pytest.mark.cpu_only("compares whole models")

_TEXT: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_VISION = {key: value for key, value in _TEXT.items() if key != "vocab_size"} | {"image_size": 32, "patch_size": 8}
_GROUPED = _TEXT | {"num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 89, "bos_token_id": 1}
_BERT = _TEXT | {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
_RIGHT = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8])
_LEFT = _RIGHT.flip(1)
_WITH_HOLES = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 0]] * 3)


def _tokens(mask: torch.Tensor | None = None, **options: Any) -> dict[str, Any]:
    tokens = torch.randint(3, 80, (3, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "attention_mask": mask, **options}


def _images() -> dict[str, Any]:
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}


def _naflex() -> dict[str, Any]:
    patches = torch.randn(2, 16, 3 * 8 * 8, generator=torch.Generator().manual_seed(1))
    shapes = torch.tensor([[4, 4], [2, 3]])
    mask = torch.arange(16)[None] < shapes.prod(1, keepdim=True)
    return {"pixel_values": patches, "pixel_attention_mask": mask.long(), "spatial_shapes": shapes}


def _qwen_images() -> dict[str, Any]:
    patches = torch.randn(24, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
    return {"hidden_states": patches, "grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4]])}


def _qwen_tower() -> Any:
    sizes = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
    sizes |= {"patch_size": 4, "window_size": 16, "spatial_merge_size": 2, "fullatt_block_indexes": [1]}
    from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl

    return configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(**sizes)


def _qwen_class() -> Any:
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

    return modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel


Case = tuple[Callable[[], Any], str | Callable[[], Any], Callable[[], dict[str, Any]], set[str]]
_ROPE, _PACKED = "rope_attention_forward", "packed_attention_forward"
CASES: dict[str, Case] = {
    "clip_vision": (lambda: transformers.CLIPVisionConfig(**_VISION), "CLIPVisionModel", _images, {_ROPE}),
    "clip_text": (lambda: transformers.CLIPTextConfig(**_TEXT), "CLIPTextModel", _tokens, {_ROPE}),
    "clip_text_padded": (
        lambda: transformers.CLIPTextConfig(**_TEXT),
        "CLIPTextModel",
        lambda: _tokens(_RIGHT),
        {_PACKED},
    ),
    "siglip2": (
        lambda: transformers.Siglip2VisionConfig(**_VISION | {"num_patches": 16}),
        "Siglip2VisionModel",
        _naflex,
        {_PACKED},
    ),
    "vit": (lambda: transformers.ViTConfig(**_VISION), "ViTModel", _images, {_ROPE}),
    "dinov2": (lambda: transformers.Dinov2Config(**_VISION), "Dinov2Model", _images, {_ROPE}),
    "qwen2_5_vl": (_qwen_tower, _qwen_class, _qwen_images, {_ROPE}),
    "bert": (lambda: transformers.BertConfig(**_BERT), "BertModel", _tokens, {_ROPE}),
    "bert_padded": (lambda: transformers.BertConfig(**_BERT), "BertModel", lambda: _tokens(_RIGHT), {_PACKED}),
    "llama": (lambda: transformers.LlamaConfig(**_GROUPED), "LlamaModel", _tokens, {_ROPE}),
    "llama_right": (lambda: transformers.LlamaConfig(**_GROUPED), "LlamaModel", lambda: _tokens(_RIGHT), {_PACKED}),
    "qwen2_left": (lambda: transformers.Qwen2Config(**_GROUPED), "Qwen2Model", lambda: _tokens(_LEFT), {_PACKED}),
    "llama_holes": (
        lambda: transformers.LlamaConfig(**_GROUPED),
        "LlamaModel",
        lambda: _tokens(_WITH_HOLES),
        {_PACKED},
    ),
}


def _models(config: Any, of_model: str | Callable[[], Any]) -> tuple[Any, Any]:
    """The model with sdpa attention, and its copy with ours."""
    cls = getattr(transformers, of_model) if isinstance(of_model, str) else of_model()
    torch.manual_seed(0)
    sdpa = cls._from_config(copy.deepcopy(config), attn_implementation="sdpa")
    ours = cls._from_config(copy.deepcopy(config), attn_implementation="evakernels")
    ours.load_state_dict(sdpa.state_dict())
    return sdpa, ours


def _run(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, set[str]]:
    """The last hidden states, and the ops that ran."""
    ops: set[str] = set()
    with observed_by(lambda op, backend: ops.add(op)):
        return model(**inputs)[0], ops


def _real(inputs: dict[str, Any], out: torch.Tensor) -> torch.Tensor:
    mask = inputs.get("attention_mask", inputs.get("pixel_attention_mask"))
    return out if mask is None else out[mask.bool()]


@pytest.mark.parametrize("name", CASES)
def test_model_matches_sdpa(name: str) -> None:
    make_config, of_model, make_inputs, expected = CASES[name]
    inputs = make_inputs()
    outs, gradients = [], []
    for model in _models(make_config(), of_model):
        out, ops = _run(model.train(), inputs)
        real = _real(inputs, out)
        (real * torch.linspace(-1, 1, real.numel()).view_as(real)).sum().backward()
        outs.append(real)
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert ops & {_ROPE, _PACKED} == expected
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], atol=2e-5, rtol=1e-4)


def _assert_falls_back(config: Any, of_model: str, inputs: dict[str, Any], **options: Any) -> None:
    """Asserts equal outputs at all tokens and that no op ran."""
    sdpa, ours = _models(config, of_model)
    out, ops = _run(ours.eval(), inputs)
    assert ops <= options.get("ops", set())
    torch.testing.assert_close(out, _run(sdpa.eval(), inputs)[0], atol=1e-5, rtol=1e-5)


def test_packed_position_ids_match_sdpa() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]] * 3)
    inputs = _tokens(position_ids=positions, use_cache=False)
    _assert_falls_back(transformers.LlamaConfig(**_GROUPED), "LlamaModel", inputs)


@pytest.mark.parametrize("kind", ["prefix", "window", "additive", "blocks"])
def test_other_masks_match_sdpa(kind: str) -> None:
    query, key = torch.arange(9)[:, None], torch.arange(9)
    masks = {
        "prefix": (key <= query) | (key < 3),
        "window": (key <= query) & (key > query - 3),
        "additive": torch.linspace(-1, 1, 81).view(9, 9),
        "blocks": (key // 4 == query // 4) & (key <= query),
    }
    inputs = _tokens(masks[kind].expand(3, 1, 9, 9))
    _assert_falls_back(transformers.LlamaConfig(**_GROUPED), "LlamaModel", inputs)
    _assert_falls_back(transformers.BertConfig(**_BERT), "BertModel", inputs)


def test_sliding_window_matches_sdpa() -> None:
    config = transformers.MistralConfig(**_GROUPED, sliding_window=3)
    _assert_falls_back(config, "MistralModel", _tokens(use_cache=False))


def test_cross_attention_of_equal_lengths() -> None:
    config = transformers.BertConfig(**_BERT, is_decoder=True, add_cross_attention=True)
    states = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(2))
    inputs = _tokens(encoder_hidden_states=states, encoder_attention_mask=_RIGHT, use_cache=False)
    _assert_falls_back(config, "BertModel", inputs, ops={_ROPE})


def test_mask_changed_in_place_is_read_again() -> None:
    sdpa, ours = _models(transformers.BertConfig(**_BERT), "BertModel")
    mask = _RIGHT.bool()[:, None, None].repeat(1, 1, 9, 1)
    for keys in (_RIGHT, _LEFT):
        mask.copy_(keys.bool()[:, None, None])
        outs = [_run(model.eval(), _tokens(mask))[0][keys.bool()] for model in (sdpa, ours)]
        torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=1e-5)


def test_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    evakernels.transformers._log_once.cache_clear()
    model = _models(transformers.ViTConfig(**_VISION | {"attention_probs_dropout_prob": 0.1}), "ViTModel")[1]
    with caplog.at_level(logging.WARNING, "evakernels.transformers"):
        assert not _run(model.train(), _images())[1]
        assert not _run(model.eval().double(), {"pixel_values": _images()["pixel_values"].double()})[1]
    dropout, dtype = (record.message for record in caplog.records)
    assert "attention dropout" in dropout
    assert "float64" in dtype


def test_softcap_is_an_error() -> None:
    config = transformers.Gemma2Config(**_GROUPED, head_dim=8)
    model = transformers.AutoModel.from_config(config, attn_implementation="evakernels")
    with pytest.raises(NotImplementedError, match="softcap"):
        model(**_tokens())


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}])
@pytest.mark.parametrize("mask", [None, _LEFT])
def test_generate_gives_equal_tokens(mask: torch.Tensor | None, options: dict[str, Any]) -> None:
    models = _models(transformers.LlamaConfig(**_GROUPED), "LlamaForCausalLM")
    found = [model.eval().generate(**_tokens(mask), max_new_tokens=5, do_sample=False, **options) for model in models]
    assert torch.equal(*found)


def test_inference_mode_matches_sdpa() -> None:
    with torch.inference_mode():
        outs = [
            _run(model.eval(), _tokens(_RIGHT))[0][_RIGHT.bool()]
            for model in _models(transformers.BertConfig(**_BERT), "BertModel")
        ]
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["vit", "bert_padded", "llama"])
def test_compiles_without_graph_breaks(name: str) -> None:
    make_config, of_model, make_inputs, _ = CASES[name]
    model, inputs = _models(make_config(), of_model)[1].eval(), make_inputs()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    out = compiled(**inputs)[0]
    torch.testing.assert_close(_real(inputs, out), _real(inputs, model(**inputs)[0]), atol=1e-5, rtol=1e-5)


def test_trainer_with_checkpointing_follows_sdpa(tmp_path: Path) -> None:
    """Two steps of models of `from_pretrained`."""
    pytest.importorskip("accelerate")
    cls = transformers.AutoModelForSequenceClassification
    _models(transformers.BertConfig(**_BERT), "BertForSequenceClassification")[0].save_pretrained(tmp_path / "start")
    tokens = _tokens(_RIGHT)
    rows = [{key: tokens[key][i] for key in tokens} | {"labels": i % 2} for i in range(3)]
    options = {"max_steps": 2, "gradient_checkpointing": True, "use_cpu": True, "save_strategy": "no", "report_to": []}
    args = transformers.TrainingArguments(tmp_path / "run", learning_rate=0.01, disable_tqdm=True, **options)
    trained = []
    for name in ("sdpa", "evakernels"):
        model = cls.from_pretrained(tmp_path / "start", attn_implementation=name)
        transformers.Trainer(model, args, train_dataset=rows).train()
        trained.append(dict(model.named_parameters()))
    start = cls.from_pretrained(tmp_path / "start").classifier.weight
    assert not torch.allclose(trained[0]["classifier.weight"], start)
    torch.testing.assert_close(trained[1], trained[0], atol=1e-4, rtol=1e-3)


def test_old_transformers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    spec = importlib.util.spec_from_file_location("evakernels._old", evakernels.transformers.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match="transformers must be"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
