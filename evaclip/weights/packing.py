"""Parameters that timm keeps in one tensor and models here in several.

The two smallest EVA-02 models have both matrices of their SwiGLU in one, and EVA-L has one bias for q, k and v. That of
k is 0 here: it adds the same to all scores of a query, which changes no result.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_FC1 = re.compile(r"(?P<mlp>.*mlp\.)fc1\.(?P<kind>weight|bias)")
_FC2 = re.compile(r"(?P<mlp>.*mlp\.)fc2\.(?P<kind>weight|bias)")
_GATE = re.compile(r"(?P<mlp>.*mlp\.)w1\.(?P<kind>weight|bias)")
_JOINT_BIAS = re.compile(r"(?P<attn>.*attn\.)qkv\.bias")
_QUERY_BIAS = re.compile(r"(?P<attn>.*attn\.)q_bias")


def unpack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which every matrix and bias stands by itself."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if (match := _FC1.fullmatch(name)) and _is_gated(state, match["mlp"]):
            gate, up = tensor.chunk(2)
            found |= {f"{match['mlp']}w1.{match['kind']}": gate, f"{match['mlp']}w2.{match['kind']}": up}
        elif (match := _FC2.fullmatch(name)) and _is_gated(state, match["mlp"]):
            found[f"{match['mlp']}w3.{match['kind']}"] = tensor
        elif match := _JOINT_BIAS.fullmatch(name):
            q, _, v = tensor.chunk(3)
            found |= {f"{match['attn']}q_bias": q, f"{match['attn']}v_bias": v}
        else:
            found[name] = tensor
    return found


def pack(state: Mapping[str, Tensor], joint_bias: bool = False) -> dict[str, Tensor]:
    """The inverse of `unpack`, under timm's names; biases of q and v are joined if asked."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if (match := _GATE.fullmatch(name)) and f"{match['mlp']}ffn_ln.weight" not in state:
            up = state[f"{match['mlp']}w2.{match['kind']}"]
            found[f"{match['mlp']}fc1.{match['kind']}"] = torch.cat([tensor, up])
            found[f"{match['mlp']}fc2.{match['kind']}"] = state[f"{match['mlp']}w3.{match['kind']}"]
        elif joint_bias and (match := _QUERY_BIAS.fullmatch(name)):
            joined = [tensor, torch.zeros_like(tensor), state[f"{match['attn']}v_bias"]]
            found[f"{match['attn']}qkv.bias"] = torch.cat(joined)
        else:
            found[name] = tensor
    replaced = [name for name in found if _is_replaced(name, found, joint_bias)]
    return {name: tensor for name, tensor in found.items() if name not in replaced}


def _is_gated(state: Mapping[str, Tensor], mlp: str) -> bool:
    first, last = state.get(f"{mlp}fc1.weight"), state.get(f"{mlp}fc2.weight")
    return first is not None and last is not None and first.shape[0] == 2 * last.shape[1]


def _is_replaced(name: str, found: Mapping[str, Tensor], joint_bias: bool) -> bool:
    if joint_bias and name.endswith("attn.v_bias"):
        return True
    mlp, _, rest = name.rpartition("mlp.")
    return rest.split(".")[0] in ("w2", "w3") and f"{mlp}mlp.fc1.weight" in found
