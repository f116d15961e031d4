"""Run models on the repository `argv[1]`, by `kernelize` and by `use_kernels=True`: same losses and gradients."""

import copy
import sys
import tempfile
from pathlib import Path
from typing import Any

import kernels
import torch
import transformers
from kernels import LocalLayerRepository, Mode
from torch import nn
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3
from transformers.models.llama import modeling_llama as llama

import evakernels

path = Path(sys.argv[1])
LAYERS: dict[str, type[nn.Module]] = {
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": llama.LlamaRMSNorm,
    "GELU": nn.GELU,
    "SwiGLUMLP": llama.LlamaMLP,
    "RotaryAttention": dinov3.DINOv3ViTAttention,
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
config = transformers.DINOv3ViTConfig(**SIZES)
config._attn_implementation = "sdpa"
llama_config = transformers.LlamaConfig(**SIZES, vocab_size=50)
x, angles = torch.randn(2, 21, 32), torch.randn(16, 4).repeat(1, 2)
tables, tokens = (angles.cos(), angles.sin()), torch.randint(50, (2, 9))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = dinov3.DINOv3ViTAttention(config)
        self.mlp = nn.Sequential(nn.LayerNorm(32), llama.LlamaMLP(llama_config), llama.LlamaRMSNorm(32), nn.GELU())

    def forward(self) -> Any:
        return self.mlp(x + self.attention(x, position_embeddings=tables)[0]).square().mean()


def check(model: nn.Module, expected: nn.Module, ops: set[str], *, loss: Any) -> None:
    """Compare losses and gradients of a model on the repository with those of a model without it."""
    calls: set[tuple[str, str]] = set()
    with module.backends.observed_by(lambda op, backend: calls.add((op, backend))):
        losses = [loss(each) for each in (model, expected)]
        sum(losses).backward()
    assert calls == {(f"{op}_{way}", "cpu") for op in ops for way in ("forward", "backward")}, calls
    torch.testing.assert_close(*losses)
    gradients = [{name: p.grad for name, p in each.named_parameters()} for each in (model, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


torch.manual_seed(0)
for name in LAYERS.keys() - {"RMSNorm"}:  # transformers names its own norms
    kernels.replace_kernel_forward_from_hub(LAYERS[name], name)
mapping: Any = {name: {"cpu": LocalLayerRepository(path, layer_name=name)} for name in LAYERS}
module: Any = kernels.get_local_kernel(path)
assert module.__name__ != "evakernels"
assert sys.modules["evakernels"] is evakernels

expected = Block()
block = copy.deepcopy(expected)
with kernels.use_kernel_mapping(mapping):
    kernels.kernelize(block, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")
check(block, expected, {"layer_norm", "gelu", "swiglu", "rope_attention"}, loss=lambda each: each())
torch.testing.assert_close(torch.compile(block, backend="aot_eager", fullgraph=True)(), block())

model = llama.LlamaForCausalLM(llama_config)
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    kernels.register_kernel_mapping({name: mapping[name] for name in ("RMSNorm", "SwiGLUMLP")})
    loaded = llama.LlamaForCausalLM.from_pretrained(folder, use_kernels=True)
for training in (False, True):
    loaded.train(training)
    model.train(training)
    check(loaded, model, {"layer_norm", "swiglu"}, loss=lambda each: each(input_ids=tokens, labels=tokens).loss)
