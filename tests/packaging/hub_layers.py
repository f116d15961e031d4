"""Kernelizes layers with the repository of the first argument; outputs and gradients must stay."""

import copy
import sys
from pathlib import Path
from typing import Any

import kernels
import torch
from kernels import LocalLayerRepository, Mode
from torch import nn
from transformers import DINOv3ViTConfig, LlamaConfig
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTAttention
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import evakernels

path = Path(sys.argv[1])
LAYERS: dict[str, type[nn.Module]] = {
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": LlamaRMSNorm,
    "GELU": nn.GELU,
    "SwiGLUMLP": LlamaMLP,
    "RotaryAttention": DINOv3ViTAttention,
}
config = DINOv3ViTConfig(hidden_size=32, num_attention_heads=4)
config._attn_implementation = "sdpa"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = DINOv3ViTAttention(config)
        self.mlp = nn.Sequential(
            nn.LayerNorm(32), LlamaMLP(LlamaConfig(hidden_size=32, intermediate_size=48)), LlamaRMSNorm(32), nn.GELU()
        )

    def forward(self, x: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor]) -> Any:
        return self.mlp(x + self.attention(x, position_embeddings=tables)[0])


def run(block: nn.Module) -> list[torch.Tensor | None]:
    out = block(x, tables)
    out.square().mean().backward()
    return [out.detach(), *(parameter.grad for parameter in block.parameters())]


torch.manual_seed(0)
for name, cls in LAYERS.items():
    kernels.replace_kernel_forward_from_hub(cls, name)
mapping: Any = {name: {"cpu": LocalLayerRepository(path, layer_name=name)} for name in LAYERS}
x, angles = torch.randn(2, 21, 32), torch.randn(16, 4).repeat(1, 2)
tables = angles.cos(), angles.sin()
expected = Block()
block = copy.deepcopy(expected)
with kernels.use_kernel_mapping(mapping):
    kernels.kernelize(block, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu", use_fallback=False)
module: Any = kernels.get_local_kernel(path)
assert module.__name__ != "evakernels" == evakernels.__name__
calls: set[tuple[str, str]] = set()
with module.backends.observed_by(lambda op, backend: calls.add((op, backend))):
    found = run(block)
for op in ("layer_norm", "gelu", "swiglu", "rope_attention"):
    assert {(f"{op}_forward", "cpu"), (f"{op}_backward", "cpu")} <= calls, calls
torch.testing.assert_close(found, run(expected), atol=1e-5, rtol=1e-5)
compiled = torch.compile(block, backend="aot_eager", fullgraph=True)(x, tables)
torch.testing.assert_close(compiled, found[0])
