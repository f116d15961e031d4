"""transformers' models with `attn_implementation="evakernels"` compared with "sdpa"."""

import importlib.util
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from evakernels.backends import observed_by

transformers = pytest.importorskip("transformers")

import evakernels.transformers  # noqa: E402 - needs transformers

pytestmark = pytest.mark.cpu_only("compares whole models")

_LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT = _LAYERS | {"vocab_size": 90}
_VISION = _LAYERS | {"image_size": 32, "patch_size": 8}
_GROUPED = _TEXT | {"num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 89, "bos_token_id": 1}
_BERT = _TEXT | {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
_QWEN_VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 4, "out_hidden_size": 32}
_QWEN_VISION |= {"patch_size": 4, "window_size": 16, "spatial_merge_size": 2, "fullatt_block_indexes": [1]}
_RIGHT = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] + [0] * 8])
_LEFT = _RIGHT.flip(1)
_WITH_HOLES = torch.tensor([[1, 0, 1, 1, 0, 1, 1, 1, 0]] * 3)


def _randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def _tokens(mask: torch.Tensor | None = None, **options: Any) -> dict[str, Any]:
    tokens = torch.randint(3, 80, (3, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "attention_mask": mask, **options}


_IMAGES = {"pixel_values": _randn(2, 3, 32, 32)}
_NAFLEX = {
    "pixel_values": _randn(2, 16, 3 * 8 * 8),
    "pixel_attention_mask": torch.tensor([[1] * 16, [1] * 6 + [0] * 10]),
    "spatial_shapes": torch.tensor([[4, 4], [2, 3]]),
}
_QWEN_IMAGES = {"hidden_states": _randn(24, 3 * 2 * 4 * 4), "grid_thw": torch.tensor([[1, 4, 4], [1, 2, 4]])}
_ROPE = "rope_attention_forward"
_ATTENTION = {_ROPE, "packed_attention_forward"}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "clip_vision": ("clip_vision_model", _VISION, _IMAGES),
    "clip_text": ("clip_text_model", _TEXT, _tokens()),
    "vit": ("vit", _VISION, _IMAGES),
    "dinov2": ("dinov2", _VISION, _IMAGES),
    "qwen2_5_vl": ("qwen2_5_vl_vision", _QWEN_VISION, _QWEN_IMAGES),
    "bert": ("bert", _BERT, _tokens()),
    "llama": ("llama", _GROUPED, _tokens()),
}


_OF_TEXT = {"siglip_text_model": transformers.SiglipTextModel, "owlvit_text_model": transformers.OwlViTTextModel}
"""Classes that `AutoModel` lacks."""


def _models(kind: str, sizes: dict[str, Any], auto: Any = transformers.AutoModel) -> tuple[Any, Any]:
    """The model with sdpa attention, and with ours."""

    def build(name: str) -> Any:
        torch.manual_seed(0)
        build = _OF_TEXT[kind]._from_config if kind in _OF_TEXT else auto.from_config
        return build(transformers.AutoConfig.for_model(kind, **sizes), attn_implementation=name).eval()

    return build("sdpa"), build("evakernels")


def _run(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, set[str]]:
    """The last hidden states and the pooled tokens in one row, and the attention ops that ran."""
    ops: set[str] = set()
    with observed_by(lambda op, backend: ops.add(op)):
        out = model(**inputs)
    pooled = out.get("pooler_output")
    return torch.cat([part.flatten() for part in (out[0], pooled) if part is not None]), ops & _ATTENTION


@pytest.mark.parametrize("name", CASES)
def test_model_matches_sdpa(name: str) -> None:
    kind, sizes, inputs = CASES[name]
    outs, gradients = [], []
    for model in _models(kind, sizes):
        with torch.inference_mode():
            inferred, _ = _run(model, inputs)
        out, ops = _run(model.train(), inputs)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        outs.append((out, inferred))
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert ops == {_ROPE}
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(gradients[1], gradients[0], atol=2e-5, rtol=1e-4)


_QUERY, _KEY = torch.arange(9)[:, None], torch.arange(9)
_MASKS = {
    "prefix": (_KEY <= _QUERY) | (_KEY < 3),
    "window": (_KEY <= _QUERY) & (_KEY > _QUERY - 3),
    "additive": torch.linspace(-1, 1, 81).view(9, 9),
    "blocks": (_KEY // 4 == _QUERY // 4) & (_KEY <= _QUERY),
}
_POSITIONS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]] * 3)
_ENCODER = {"encoder_hidden_states": _randn(3, 9, 32), "encoder_attention_mask": _RIGHT}
OTHER: dict[str, tuple[str, dict[str, Any], dict[str, Any], set[str]]] = {
    f"{kind}_{name}": (kind, sizes, _tokens(mask.expand(3, 1, 9, 9)), set())
    for kind, sizes in (("llama", _GROUPED), ("bert", _BERT))
    for name, mask in _MASKS.items()
}
_PADDED = {"right": _RIGHT, "left": _LEFT, "holes": _WITH_HOLES}
_TEXTS = {"clip_text_model": _TEXT, "siglip_text_model": _TEXT, "bert": _BERT, "llama": _GROUPED, "qwen2": _GROUPED}
OTHER |= {
    f"{kind}_{name}": (kind, sizes, _tokens(mask), set())
    for kind, sizes in _TEXTS.items()
    for name, mask in _PADDED.items()
}
OTHER |= {
    "owlvit_right": ("owlvit_text_model", _TEXT, _tokens(_RIGHT), set()),
    "siglip2": ("siglip2_vision_model", _VISION | {"num_patches": 16}, _NAFLEX, set()),
    "position_ids": ("llama", _GROUPED, _tokens(position_ids=_POSITIONS, use_cache=False), set()),
    "sliding_window": ("mistral", _GROUPED | {"sliding_window": 3}, _tokens(use_cache=False), set()),
    # The decoder's self-attention has no mask.
    "cross_attention": (
        "bert",
        _BERT | {"is_decoder": True, "add_cross_attention": True},
        _tokens(**_ENCODER, use_cache=False),
        {_ROPE},
    ),
}


@pytest.mark.parametrize("name", OTHER)
def test_other_masks_match_sdpa(name: str) -> None:
    """Every token has sdpa's values, the padded and pooled ones too."""
    kind, sizes, inputs, expected = OTHER[name]
    sdpa, ours = _models(kind, sizes)
    out, ops = _run(ours, inputs)
    assert ops == expected
    torch.testing.assert_close(out, _run(sdpa, inputs)[0], atol=1e-5, rtol=1e-5)


class _SelfAttention(torch.nn.Module):
    is_causal = False

    def forward(self, hidden_states: torch.Tensor) -> None: ...


_SHAPE = 2, 2, 5, 8
_MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()[:, None, None]
CALLS: dict[str, tuple[dict[str, tuple[int, ...]], dict[str, Any], set[str]]] = {
    "scaling": ({}, {"scaling": 0.9}, {_ROPE}),
    "mask": ({}, {"scaling": 0.9, "attention_mask": _MASK}, set()),
    "position_bias": ({}, {"position_bias": _randn(1, 2, 5, 5)}, set()),
    "width_of_values": ({"value": (2, 2, 5, 4)}, {}, set()),
    "one_sample_of_keys": ({"key": (1, 2, 5, 8), "value": (1, 2, 5, 8)}, {}, set()),
}


@pytest.mark.parametrize("name", CALLS)
def test_attend_matches_sdpa_forward(name: str) -> None:
    shapes, options, expected = CALLS[name]
    torch.manual_seed(0)
    tokens = [torch.randn(shapes.get(part, _SHAPE)) for part in ("query", "key", "value")]
    call = {"attention_mask": None, **options}
    ops: set[str] = set()
    with observed_by(lambda op, backend: ops.add(op)):
        out = evakernels.transformers.attend(_SelfAttention(), *tokens, **call)[0]
    sdpa = evakernels.transformers.sdpa_attention_forward(_SelfAttention(), *tokens, **call)[0]
    torch.testing.assert_close(out, sdpa, atol=1e-5, rtol=1e-5)
    assert ops & _ATTENTION == expected


@pytest.mark.parametrize("name", ["s_aux", "sinks", "softcap"])
def test_attend_refuses_eager_options(name: str) -> None:
    tokens = [torch.randn(_SHAPE) for _ in range(3)]
    with pytest.raises(NotImplementedError, match=name):
        evakernels.transformers.attend(_SelfAttention(), *tokens, None, **{name: torch.zeros(2)})


def test_mask_of_other_length_fails_as_sdpa() -> None:
    """A mask of the queries' length, with more keys."""
    tokens = torch.randn(_SHAPE), torch.randn(2, 2, 10, 8), torch.randn(2, 2, 10, 8)
    for attend in (evakernels.transformers.attend, evakernels.transformers.sdpa_attention_forward):
        with pytest.raises(RuntimeError, match=r"size|shape|expand"):
            attend(_SelfAttention(), *tokens, _MASK)


@pytest.mark.parametrize("kind", ["gemma2", "bridgetower"])
def test_model_without_sdpa_refuses_name(kind: str) -> None:
    """When the model is built, and when the name is set later."""
    config = transformers.AutoConfig.for_model(kind)
    with pytest.raises(ValueError, match="attn_implementation"), torch.device("meta"):
        transformers.AutoModel.from_config(config, attn_implementation="evakernels")
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config, attn_implementation="eager")
    if model._can_set_attn_implementation():
        with pytest.raises(ValueError, match="attn_implementation"):
            model.set_attn_implementation("evakernels")


def test_reason_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    evakernels.transformers._log_once.cache_clear()
    model = _models("vit", _VISION | {"attention_probs_dropout_prob": 0.1})[1]
    with caplog.at_level(logging.WARNING, "evakernels.transformers"):
        assert not _run(model.train(), _IMAGES)[1]
        assert not _run(model.eval().double(), {"pixel_values": _IMAGES["pixel_values"].double()})[1]
    dropout, dtype = (record.message for record in caplog.records)
    assert "attention dropout" in dropout
    assert "float64" in dtype


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}])
@pytest.mark.parametrize("mask", [None, _LEFT])
def test_generate_gives_equal_tokens(mask: torch.Tensor | None, options: dict[str, Any]) -> None:
    models = _models("llama", _GROUPED, transformers.AutoModelForCausalLM)
    found = [model.generate(**_tokens(mask), max_new_tokens=5, do_sample=False, **options) for model in models]
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["vit", "bert", "llama"])
def test_compiles_without_graph_breaks(name: str) -> None:
    kind, sizes, inputs = CASES[name]
    model = _models(kind, sizes)[1]
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(_run(compiled, inputs)[0], _run(model, inputs)[0], atol=1e-5, rtol=1e-5)


def test_trainer_with_checkpointing_follows_sdpa(tmp_path: Path) -> None:
    """Two steps of models of `from_pretrained`."""
    pytest.importorskip("accelerate")
    cls = transformers.AutoModelForSequenceClassification
    start = _models("bert", _BERT, cls)[0]
    start.save_pretrained(tmp_path / "start")
    tokens = _tokens(_RIGHT)
    rows = [{key: tokens[key][i] for key in tokens} | {"labels": i % 2} for i in range(3)]
    options = {"max_steps": 2, "gradient_checkpointing": True, "use_cpu": True, "save_strategy": "no", "report_to": []}
    args = transformers.TrainingArguments(tmp_path / "run", learning_rate=0.01, disable_tqdm=True, **options)
    trained = []
    for name in ("sdpa", "evakernels"):
        model = cls.from_pretrained(tmp_path / "start", attn_implementation=name)
        transformers.Trainer(model, args, train_dataset=rows).train()
        trained.append(dict(model.named_parameters()))
    assert not torch.allclose(trained[0]["classifier.weight"], start.classifier.weight)
    torch.testing.assert_close(trained[1], trained[0], atol=1e-4, rtol=1e-3)


def test_old_transformers_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    spec = importlib.util.spec_from_file_location("evakernels._old", evakernels.transformers.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match="transformers must be"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
