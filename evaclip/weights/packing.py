"""Parameters that timm keeps in one tensor and models here in several.

The two smallest EVA-02 models have both matrices of their SwiGLU in one, in the authors' files too, and EVA-L has one
bias for q, k and v. That of k is 0 here: it adds the same to all scores of a query, which changes no result.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_FC1 = re.compile(r"(?P<mlp>.*mlp\.)fc1\.(?P<kind>weight|bias)")
_FC2 = re.compile(r"(?P<mlp>.*mlp\.)fc2\.(?P<kind>weight|bias)")
_GATES = re.compile(r"(?P<mlp>.*mlp\.)w12\.(?P<kind>weight|bias)")
_GATE = re.compile(r"(?P<mlp>.*mlp\.)w1\.(?P<kind>weight|bias)")
_LAST = re.compile(r"(?P<mlp>.*mlp\.)w3\.(?P<kind>weight|bias)")
_JOINT_BIAS = re.compile(r"(?P<attn>.*attn\.)qkv\.bias")
_QUERY_BIAS = re.compile(r"(?P<attn>.*attn\.)q_bias")


def unpack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in which every matrix and bias stands by itself."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _GATES.fullmatch(name) or _FC1.fullmatch(name)
        if match and (match.re is _GATES or _is_gated(state, match["mlp"])):
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


def pack_gates(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both matrices of each SwiGLU without a norm in one, `w12`, as in the authors' files."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        gate = _GATE.fullmatch(re.sub(r"mlp\.w2\.", "mlp.w1.", name))
        if gate is None or f"{gate['mlp']}ffn_ln.weight" in state:
            found[name] = tensor
        elif name == gate[0]:
            up = state[f"{gate['mlp']}w2.{gate['kind']}"]
            found[f"{gate['mlp']}w12.{gate['kind']}"] = torch.cat([tensor, up])
    return found


def pack(state: Mapping[str, Tensor], joint_bias: bool = False) -> dict[str, Tensor]:
    """The inverse of `unpack`, under timm's names; biases of q and v are joined if asked."""
    found: dict[str, Tensor] = {}
    packed = pack_gates(state)
    for name, tensor in packed.items():
        if match := _GATES.fullmatch(name):
            found[f"{match['mlp']}fc1.{match['kind']}"] = tensor
        elif (match := _LAST.fullmatch(name)) and f"{match['mlp']}w12.weight" in packed:
            found[f"{match['mlp']}fc2.{match['kind']}"] = tensor
        elif joint_bias and (match := _QUERY_BIAS.fullmatch(name)):
            joined = [tensor, torch.zeros_like(tensor), state[f"{match['attn']}v_bias"]]
            found[f"{match['attn']}qkv.bias"] = torch.cat(joined)
        elif not (joint_bias and name.endswith("attn.v_bias")):
            found[name] = tensor
    return found


def _is_gated(state: Mapping[str, Tensor], mlp: str) -> bool:
    first, last = state.get(f"{mlp}fc1.weight"), state.get(f"{mlp}fc2.weight")
    return first is not None and last is not None and first.shape[0] == 2 * last.shape[1]
