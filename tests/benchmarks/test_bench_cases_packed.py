"""The operation of packed captions: what it computes, what it costs, and who is compared."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from bench_case_checks import TOLERANCE, assert_exact, build, draw, gradients, outputs, pretend_installed
from torch import Tensor

import benchmarks.cases  # noqa: F401  registers the operations
from benchmarks.cases.packed_attention import lengths_of
from benchmarks.operation import get_operation, peers_of
from benchmarks.shapes import parse_shape
from evaclip.errors import UserError

OP, SHAPE = get_operation("packed_attention"), parse_shape("tiny:text b5")


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("who", ["ours", "eager"])
def test_ours_and_plain_torch_agree_with_float64(who: str, dtype: torch.dtype) -> None:
    assert_exact(OP, getattr(OP, who), SHAPE, dtype)


def test_plain_torch_is_attention_of_each_caption() -> None:
    inputs = draw(OP, SHAPE, torch.float64)
    expected = _each_alone(inputs["q"], inputs["k"], inputs["v"], inputs["offsets"])
    torch.testing.assert_close(OP.eager(**inputs), expected)


def test_captions_are_packed_views_of_one_projection() -> None:
    lengths, inputs = lengths_of(SHAPE), draw(OP, SHAPE)
    assert inputs["offsets"].diff().tolist() == lengths.tolist()
    assert inputs["max_length"] == lengths.max() < SHAPE.tokens
    assert len(set(lengths.tolist())) > 1
    assert len({inputs[name].untyped_storage().data_ptr() for name in "qkv"}) == 1
    more = lengths_of(parse_shape("tiny:text b1000"))
    assert torch.equal(more[:5], lengths)
    assert len(more) == 1000


def test_the_cost_is_that_of_the_captions() -> None:
    """A query sees half of the keys of its caption."""
    work, inputs = OP.work(SHAPE, 2), draw(OP, SHAPE, torch.bfloat16)
    products = [2 * length**2 * SHAPE.heads * SHAPE.head_dim / 2 for length in lengths_of(SHAPE).tolist()]
    assert work.backward is not None
    assert (work.forward.flops, work.backward.flops) == (2 * sum(products), 5 * sum(products))
    assert work.forward.bytes == 4 * inputs["q"].numel() * 2
    assert work.backward.bytes == 2 * work.forward.bytes


def test_an_image_has_no_captions() -> None:
    with pytest.raises(UserError, match="packed_attention works on captions, and 'tiny@32 b1' has none"):
        draw(OP, parse_shape("tiny@32 b1"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_default_shapes_have_names_that_are_read(device: str) -> None:
    assert [parse_shape(shape).name for shape in OP.shapes[device]] == list(OP.shapes[device])


# --- peers ----------------------------------------------------------------------------------------------------------


def _each_alone(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor) -> Tensor:
    parts = []
    for begin, end in zip(offsets.tolist()[:-1], offsets.tolist()[1:], strict=True):
        caption = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*caption, is_causal=True).transpose(0, 1))
    return torch.cat(parts)


# Stand-ins with the signatures and the meaning that the packages document.


def _varlen_2_11(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
) -> Tensor:
    assert is_causal
    assert max_q == max_k == cu_seq_q.diff().max()
    return _each_alone(query, key, value, cu_seq_k)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
) -> Tensor:
    return _varlen_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window_size == (-1, 0))


def _flash_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
) -> Tensor:
    assert cu_seqlens_q.dtype == torch.int32
    return _varlen_2_11(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)


class _BlockDiagonalCausalMask:
    def __init__(self, lengths: list[int]) -> None:
        self.offsets = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))

    @classmethod
    def from_seqlens(cls, q_seqlen: list[int]) -> "_BlockDiagonalCausalMask":
        return cls(q_seqlen)


def _memory_efficient(query: Tensor, key: Tensor, value: Tensor, attn_bias: Any = None) -> Tensor:
    return _each_alone(query[0], key[0], value[0], attn_bias.offsets)[None]


FLEX = "FlexAttention"
STAND_INS: dict[str, dict[str, dict[str, Any]]] = {
    "flash-attn": {"flash_attn": {"flash_attn_varlen_func": _flash_varlen}},
    "xformers": {
        "xformers.ops": {"memory_efficient_attention": _memory_efficient},
        "xformers.ops.fmha.attn_bias": {"BlockDiagonalCausalMask": _BlockDiagonalCausalMask},
    },
}


def test_every_peer_is_tested() -> None:
    assert {peer.name for peer in peers_of(OP.name)} == {*STAND_INS, FLEX, "torch varlen"}


@pytest.mark.parametrize("name", STAND_INS)
def test_peers_of_the_gpu_are_asked_for_the_same_thing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_installed(monkeypatch, STAND_INS[name])
    assert_exact(OP, build(OP.name, name, SHAPE), SHAPE)


@pytest.mark.parametrize("function", [_varlen, _varlen_2_11])
def test_torchs_own_is_asked_for_the_same_thing(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", function)
    assert_exact(OP, build(OP.name, "torch varlen", SHAPE), SHAPE)


def test_torchs_own_takes_what_it_is_given() -> None:
    """By its real signature, on tensors without data; there is no kernel of it for a CPU."""
    inputs = {name: x.to("meta") if isinstance(x, Tensor) else x for name, x in draw(OP, SHAPE, torch.bfloat16).items()}
    (out,) = outputs(build(OP.name, "torch varlen", SHAPE), inputs)
    assert out.shape == inputs["q"].shape


def test_flex_attention_agrees_with_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not compiled here: what it is asked for is the same."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    assert_exact(OP, build(OP.name, FLEX, SHAPE), SHAPE, training=False)


def test_gradients_have_the_places_of_the_inputs() -> None:
    inputs = draw(OP, SHAPE)
    assert [g.shape for g in gradients(OP, OP.ours, inputs)] == [inputs[name].shape for name in "qkv"]
