"""Text towers of transformers: small encoders in folders, without the hub."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.tokenizer import HFTokenizer as PeerTokenizer
from small_tasks import OPTIONS
from tokenizers import Tokenizer as WordTokenizer
from tokenizers import models, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModel, BertConfig, DistilBertConfig, PreTrainedTokenizerFast, XLMRobertaConfig

import evaclip
from evaclip import CLIP, Encoder, create_model, get_tokenizer, load_weights
from evaclip.errors import UserError
from evaclip.export import export
from evaclip.loading import load_model
from evaclip.model.config import Savings
from evaclip.plan.step import plan_step
from evaclip.runs.log import read_log
from evaclip.train.config import TrainConfig
from evaclip.train.trainer import train
from evaclip.weights import start_text_tower, to_open_clip
from evaclip.weights.convert import convert
from evaclip.weights.files import read_tensors

Make = Callable[..., TrainConfig]
WORDS = ("<s>", "<pad>", "</s>", "<unk>", "a", "red", "green", "rotes", "Quadrat", "square", "ellipse", "photo", "of")
SIZES: dict[str, Any] = {"vocab_size": len(WORDS), "pad_token_id": 1, "max_position_embeddings": 32}
LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
CONFIGS = {
    "bert": BertConfig(**SIZES, **LAYERS),
    "xlm-roberta": XLMRobertaConfig(**SIZES, **LAYERS),
    "distilbert": DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=48, **SIZES),
}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of encoders with their tokenizer, by kind."""
    folders = {}
    words = WordTokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    for kind, config in CONFIGS.items():
        folder = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        AutoModel.from_config(config).save_pretrained(folder)
        PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
        folders[kind] = str(folder)
    return folders


def text_options(folder: str, **more: Any) -> dict[str, Any]:
    return {"context_length": 12, "hf_model_name": folder, **more}


def small(folder: str, pretrained: Any = None, **more: Any) -> CLIP:
    options = {**OPTIONS, "text": text_options(folder, **more)}
    return create_model("tiny", pretrained, **options).eval()


def captions() -> Tensor:
    return torch.tensor([[0, 4, 5, 9, 2, *[1] * 7], [0, 7, 8, 2, *[1] * 8], [0, *[6] * 10, 2]])


@pytest.mark.parametrize(
    ("kind", "pooler", "projection"),
    [
        ("xlm-roberta", "mean_pooler", "mlp"),
        ("xlm-roberta", "cls_last_hidden_state_pooler", "linear"),
        ("bert", "cls_pooler", "mlp"),
        ("bert", "mean_pooler", None),
    ],
)
def test_hf_text_equals_open_clip(kind, pooler, projection, encoders, tmp_path: Path) -> None:
    """A file of open_clip gives the embeddings of open_clip, and its names come back."""
    folder, width = encoders[kind], OPTIONS["embed_dim"] if projection else 32
    torch.manual_seed(1)
    peer = HFTextEncoder(folder, width, pooler_type=pooler, proj_type=projection, pretrained=False).eval()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    options = {**OPTIONS, "embed_dim": width}
    state = to_open_clip(create_model("tiny", **options).state_dict())
    state = {name: tensor for name, tensor in state.items() if not name.startswith("text.")}
    state |= {f"text.{name}": tensor for name, tensor in peer.state_dict().items()}
    torch.save(state, tmp_path / "open_clip.pt")
    options["text"] = text_options(folder, hf_pooler_type=pooler, hf_proj_type=projection)
    model = create_model("tiny", tmp_path / "open_clip.pt", **options).eval()
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(captions()), peer(captions()), atol=5e-6, rtol=0)
    assert to_open_clip(model.state_dict()).keys() == state.keys()


@pytest.mark.parametrize("pooler", ["max_pooler", "last_pooler"])
def test_hf_text_pools_tokens(pooler: str, encoders) -> None:
    model = small(encoders["distilbert"], hf_pooler_type=pooler, hf_proj_type="linear")
    with torch.no_grad():
        found = model.encode_text(captions())
        for row, tokens in enumerate(captions()):
            used = tokens[tokens != 1][None]
            hidden = model.text.transformer(input_ids=used).last_hidden_state[0]
            pooled = hidden.amax(0) if pooler == "max_pooler" else hidden[-1]
            torch.testing.assert_close(found[row], model.text.proj(pooled), atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", CONFIGS)
def test_hf_text_starts_from_the_encoder(kind: str, encoders) -> None:
    source = AutoModel.from_pretrained(encoders[kind]).state_dict()
    model, random = small(encoders[kind]), small(encoders[kind], hf_model_pretrained=False)
    state = model.text.transformer.state_dict()
    assert all(torch.equal(tensor, source[name]) for name, tensor in state.items())
    assert not all(map(torch.equal, state.values(), random.text.transformer.state_dict().values()))
    # Buffers outside the state dict are right, however the model was made.
    load_weights(random, model.state_dict())
    direct = CLIP(model.config).eval()
    load_weights(direct, model.state_dict())
    with torch.no_grad():
        expected = model.encode_text(captions())
        assert torch.equal(random.encode_text(captions()), expected)
        assert torch.equal(direct.encode_text(captions()), expected)


def test_start_text_tower_of_an_hf_encoder(encoders) -> None:
    source, model = (small(encoders["xlm-roberta"], hf_model_pretrained=False) for _ in range(2))
    projection = [parameter.clone() for parameter in model.text.proj.parameters()]
    start_text_tower(model.text, source.state_dict())
    assert all(map(torch.equal, source.text.transformer.parameters(), model.text.transformer.parameters()))
    assert all(map(torch.equal, projection, model.text.proj.parameters()))


def test_hf_text_ignores_padding(encoders) -> None:
    model, plain = (small(encoders["xlm-roberta"]) for _ in range(2))
    load_weights(plain, model.state_dict())
    plain.set_savings(Savings(pack_text=False))
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(captions()), plain.encode_text(captions()), atol=1e-6, rtol=1e-5)
        short = model.encode_text(captions()[:2, :5])
    torch.testing.assert_close(short, model.encode_text(captions()[:2]), atol=1e-6, rtol=1e-5)


def test_hf_text_recompute_keeps_gradients(encoders) -> None:
    """With dropout, which draws the same numbers again."""
    model, found = small(encoders["xlm-roberta"]).train(), []
    for savings in (Savings(), Savings(recompute="block"), Savings()):
        model.set_savings(savings)
        model.zero_grad()
        torch.manual_seed(0)
        model.encode_text(captions()).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.text.parameters() if parameter.grad is not None])
    for gradients in found[1:]:
        assert all(map(torch.equal, found[0], gradients))


@pytest.mark.parametrize(
    ("unlocked", "expected"),
    [(0, {"proj"}), (1, {"proj", "layer.1"}), (3, {"proj", "layer.1", "layer.0", "embeddings"})],
)
def test_lock_hf_text_tower(unlocked: int, expected: set[str], encoders) -> None:
    model = small(encoders["xlm-roberta"])
    model.lock_text_tower(unlocked)
    parts = ("proj", "layer.1", "layer.0", "embeddings")
    trained = [name for name, parameter in model.text.named_parameters() if parameter.requires_grad]
    assert {part for part in parts for name in trained if part in name} == expected
    assert [model.text.layer_id(f"transformer.encoder.layer.{i}.x") for i in range(2)] == [1, 2]


def test_hf_tokenizer_equals_open_clip(encoders) -> None:
    folder = encoders["bert"]
    texts = ["a red square", "  rotes   Quadrat &amp; a photo", "", "a " * 20]
    config = create_model("tiny", device="meta", text=text_options(folder)).config
    found = evaclip.factory.tokenizer_of(config.text)(texts)
    assert torch.equal(found, PeerTokenizer(folder, context_length=12)(texts))
    assert found.dtype == torch.int64


def test_train_and_resume_with_hf_text(encoders, run_config: Make, tmp_path: Path) -> None:
    """A run resumes bit-exactly; its folder loads, encodes, and converts to open_clip's names and back."""

    def config(name: str, steps: int) -> TrainConfig:
        text = json.dumps(text_options(encoders["xlm-roberta"]))
        return run_config(
            f"model.options.text={text}", "model.lock_text=true", "model.lock_text_unlocked_layers=1",
            "optim.text.layer_decay=0.5", "accumulation_steps=2", "data.workers=1",
            "eval.sets.val={data: {num_samples: 48, workers: 0}, skip: 40}",
            f"name={name}", f"schedule={{name: constant, steps: {steps}}}",
        )  # fmt: skip

    straight = train(config("straight", 4))
    train(config("resumed", 2))
    resumed = train(config("resumed", 4), resume="auto")
    last = "checkpoints/step_00000004"
    for file in ("model.safetensors", "optimizer/00000.safetensors"):
        expected, found = (read_tensors(run.folder / last / file) for run in (straight, resumed))
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert {"val/zero_shot_top1", "val/loss"} <= straight.metrics.keys()
    assert all(
        record["tokens_per_second"] > 0 for record in read_log(straight.folder / "log.jsonl") if "loss" in record
    )

    run, texts = str(straight.folder), ["a red square", "rotes Quadrat"]
    loaded = load_model(run)
    tokens = get_tokenizer(run)(texts)
    assert torch.equal(tokens, loaded.tokenizer(texts))
    with torch.no_grad():
        expected = loaded.model.eval().encode_text(tokens, normalize=True)
    torch.testing.assert_close(Encoder(run, precision="fp32").texts(texts), expected, atol=1e-5, rtol=0)

    weights = straight.folder / last / "model.safetensors"
    convert(weights, tmp_path / "open_clip.pt", "open_clip")
    convert(tmp_path / "open_clip.pt", tmp_path / "back.safetensors", "safetensors")
    before, after = read_tensors(weights), read_tensors(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    with pytest.raises(UserError, match="tower"):
        export(loaded.model, "text", tmp_path / "text.onnx")


def test_run_keeps_its_tokenizer(encoders, run_config: Make, tmp_path: Path, monkeypatch) -> None:
    """A run works without the folder of its encoder; another tokenizer is refused with the differences."""
    shutil.copytree(encoders["xlm-roberta"], tmp_path / "encoder")
    monkeypatch.chdir(tmp_path)
    text = f"model.options.text={json.dumps(text_options('encoder', hf_model_pretrained=False))}"
    run = train(run_config(text, "schedule={name: constant, steps: 2}")).folder
    tokenizer = tmp_path / "encoder" / "tokenizer.json"
    content = json.loads(tokenizer.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["red"], vocabulary["green"] = vocabulary["green"], vocabulary["red"]
    tokenizer.write_text(json.dumps(content))
    config = run_config(text, "schedule={name: constant, steps: 4}")
    with pytest.raises(UserError, match=r"tokenizer\.json: model\.vocab\.red: 5 -> 6"):
        train(config, resume="auto")
    shutil.copyfile(Path(encoders["xlm-roberta"]) / "tokenizer.json", tokenizer)
    settings = json.loads((tmp_path / "encoder" / "config.json").read_text())
    (tmp_path / "encoder" / "config.json").write_text(json.dumps({**settings, "layer_norm_eps": 0.1}))
    with pytest.raises(UserError, match=r"config\.json: layer_norm_eps: .* -> 0\.1"):
        train(config, resume="auto")
    (tmp_path / "encoder" / "config.json").write_text(json.dumps(settings))
    assert train(config, resume="auto").steps == 4

    tokens = get_tokenizer(str(run))("a red square")
    monkeypatch.chdir(encoders["bert"])
    shutil.rmtree(tmp_path / "encoder")
    assert torch.equal(get_tokenizer(str(run))("a red square"), tokens)
    loaded = load_model(str(run))
    assert torch.equal(loaded.tokenizer("a red square"), tokens)
    assert create_model("tiny", run).config.text.hf_model_name == "encoder"


def test_hf_text_in_open_clips_configuration(encoders, tmp_path: Path) -> None:
    options = text_options(encoders["xlm-roberta"], hf_pooler_type="cls_pooler", hf_proj_type="linear")
    model = create_model("EVA02-CLIP-B-16", device="meta", text=options)
    evaclip.save_for_hf(model, save_directory=tmp_path, skip_weights=True)
    text = json.loads((tmp_path / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert text == {**options, "hf_tokenizer_name": encoders["xlm-roberta"]}
    assert get_tokenizer(f"local-dir:{tmp_path}")(["a"]).shape == (1, 12)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("bert", {"hf_model_name": "/nowhere/at-all"}, "hf_model_name .*local folder.*asking the hub failed"),
        ("bert", {"context_length": 77}, "context_length must be at most 32, got 77"),
        ("xlm-roberta", {"context_length": 31}, "context_length must be at most 30, got 31"),
        ("bert", {"hf_proj_type": None}, "hf_proj_type"),
        ("bert", {"hf_proj_type": "conv"}, "hf_proj_type"),
        ("bert", {"hf_pooler_type": "mean"}, "hf_pooler_type.*mean_pooler"),
    ],
)
def test_hf_text_errors_name_the_option(kind: str, options: dict[str, Any], message: str, encoders) -> None:
    text = text_options(encoders[kind]) | options
    with pytest.raises(UserError, match=message):
        create_model("tiny", text=text)


def test_missing_transformers_names_its_extra(encoders, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"transformers .*evakernels\[hf\]"):
        small(encoders["bert"])


def test_hf_text_is_neither_sharded_nor_planned(encoders, run_config: Make) -> None:
    text = f"model.options.text={json.dumps(text_options(encoders['bert']))}"
    with pytest.raises(UserError, match=r"parallel\.mode"):
        train(run_config(text, "parallel.mode=shard"))
    with pytest.raises(UserError, match="hf_model_name"):
        plan_step(run_config(text))
