"""flash-attn's and xformers' attention compared with torch's, and the errors for unsupported arguments."""

import importlib
import inspect
import operator
import re
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import evakernels
from evakernels.compat import flash_attn
from evakernels.compat import xformers as xops

B, N, H, D = 2, 11, 3, 8
LENGTHS = [5, 0, 7, 1]
OFFSETS = torch.tensor([0, 5, 5, 12, 13], dtype=torch.int32)
PACKED = OFFSETS, OFFSETS.clone(), 7, 7


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(*shape: int) -> list[Tensor]:
    return [randn(*shape, seed=seed).requires_grad_() for seed in range(3)]


def by_torch(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    """Causal as in flash-attn: the last query attends to all keys."""
    mask = torch.ones(q.shape[-3], k.shape[-3], dtype=torch.bool).tril(k.shape[-3] - q.shape[-3]) if causal else None
    transposed = (x.transpose(-3, -2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*transposed, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(-3, -2)


def packed_by_torch(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    parts = zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True)
    return torch.cat([by_torch(*part, causal, scale) for part in parts if len(part[0])])


def assert_same(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs)
    gradients = (torch.autograd.grad(out.square().sum(), leaves, retain_graph=True) for out in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def functions(packed: bool) -> dict[str, Callable[..., Any]]:
    """The three functions of a layout by name, as functions of q, k and v."""
    kind, lengths, dim = ("varlen_", PACKED, 1) if packed else ("", (), 2)
    names = [f"flash_attn_{kind}{suffix}func" for suffix in ("", "kvpacked_", "qkvpacked_")]
    three, two, one = (getattr(flash_attn, name) for name in names)
    return {
        names[0]: lambda q, k, v, **options: three(q, k, v, *lengths, **options),
        names[1]: lambda q, k, v, **options: two(q, torch.stack((k, v), dim), *lengths, **options),
        names[2]: lambda *qkv, **options: one(torch.stack(qkv, dim), *lengths[1::2], **options),
    }


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("packed", [False, True])
def test_flash_attn_matches_torch(packed, scale, causal):
    q, k, v = heads(*((sum(LENGTHS),) if packed else (B, N)), H, D)
    expected = (packed_by_torch if packed else by_torch)(q, k, v, causal, scale)
    options = {"softmax_scale": scale, "causal": causal, "deterministic": True, "window_size": [-1, -1]}
    for function in functions(packed).values():
        assert_same(function(q, k, v, **options), expected, [q, k, v])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("packed", "more", "kv_heads"), [(False, 0, 1), (False, 4, H), (False, 1, 1), (True, 0, 1)])
def test_flash_attn_shared_heads_and_more_keys(packed, more, kv_heads, causal):
    shape, reference = ((sum(LENGTHS),), packed_by_torch) if packed else ((B, N), by_torch)
    q = randn(*shape, H, D)
    k, v = (randn(*shape[:-1], shape[-1] + more, kv_heads, D, seed=seed) for seed in (1, 2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for function in (*functions(packed).values(),)[:2]:
        assert_same(function(q, k, v, causal=causal), reference(q, k, v, causal), leaves)


@pytest.mark.parametrize("packed", [False, True])
def test_flash_attn_returns_lse(packed):
    q, k, v = heads(*((sum(LENGTHS),) if packed else (B, N)), H, D)
    scores = D**-0.5 * torch.einsum("...nhd,...mhd->...hnm", q, k)
    if packed:  # scores of other sequences
        sequence = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
        scores = scores.masked_fill(sequence[:, None] != sequence, float("-inf"))
    for function in functions(packed).values():
        out, lse, probabilities = function(q, k, v, return_attn_probs=True)
        torch.testing.assert_close(out, function(q, k, v))
        torch.testing.assert_close(lse, scores.logsumexp(-1))
        assert not lse.requires_grad
        assert probabilities.numel() == 0


def test_flash_attn_compiles_without_graph_break():
    q, k, v = heads(B, N, H, D)
    compiled = torch.compile(flash_attn.flash_attn_func, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, causal=True), by_torch(q, k, v, True))


@pytest.mark.parametrize(
    "option",
    [{"dropout_p": 0.1}, {"window_size": (128, 0)}, {"softcap": 30.0}, {"alibi_slopes": torch.ones(H)}],
    ids=lambda option: next(iter(option)),
)
@pytest.mark.parametrize("packed", [False, True])
def test_flash_attn_unsupported_option_raises(packed, option):
    q, k, v = heads(*((sum(LENGTHS),) if packed else (B, N)), H, D)
    for function in functions(packed).values():
        with pytest.raises(NotImplementedError, match=f"^flash_attn_.*func: {next(iter(option))} must be .*, got .*$"):
            function(q, k, v, **option)


# --- xformers -------------------------------------------------------------------------------------------------------


def mask(name: str, keys: Tensor = OFFSETS) -> object:
    """An object with the class name and the attributes of xformers' mask."""
    infos = [SimpleNamespace(seqstart=s, seqstart_py=s.tolist(), max_seqlen=7) for s in (OFFSETS, keys)]
    return type(name, (), {"q_seqinfo": infos[0], "k_seqinfo": infos[1]})()


@pytest.mark.parametrize(
    "bias",
    [
        None,
        xops.LowerTriangularMask(),
        xops.LowerTriangularFromBottomRightMask(),
        mask("LowerTriangularMask"),
        mask("LowerTriangularFromBottomRightMask"),
    ],
)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_xformers_matches_torch(scale, bias):
    q, k, v = heads(B, N, H, D)
    out = xops.memory_efficient_attention(q, k, v, bias, scale=scale)
    assert_same(out, by_torch(q, k, v, bias is not None, scale), [q, k, v])
    one_head = (x[:, :, 0] for x in (q, k, v))
    torch.testing.assert_close(xops.memory_efficient_attention(*one_head, bias, 0.0, scale), out[:, :, 0])


@pytest.mark.parametrize(
    "name", ["BlockDiagonalMask", "BlockDiagonalCausalMask", "BlockDiagonalCausalFromBottomRightMask"]
)
def test_xformers_packed_matches_torch(name):
    q, k, v = heads(1, sum(LENGTHS), H, D)
    expected = packed_by_torch(q[0], k[0], v[0], "Causal" in name).unsqueeze(0)
    for bias in (mask(name), getattr(xops, name).from_seqlens(LENGTHS)):
        out = xops.memory_efficient_attention(q, k, v, bias, output_dtype=q.dtype)
        assert_same(out, expected, [q, k, v])


def test_xformers_shared_heads_and_more_keys():
    q, k, v = randn(B, N, 6, D), *(randn(B, N + 3, 2, D, seed=seed) for seed in (1, 2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = xops.memory_efficient_attention(q, k, v, xops.LowerTriangularFromBottomRightMask())
    assert_same(out, by_torch(q, k, v, True), leaves)


def test_block_diagonal_mask_splits_batches():
    """As DINOv2 uses the mask: two crops of four tokens and one of six in one attention, then split by crop size."""
    bias = xops.BlockDiagonalMask.from_seqlens([4, 4, 6])
    x = randn(1, 14, H, D)
    out = xops.memory_efficient_attention(x, x, x, bias)
    assert [part.shape[:2] for part in bias.split(out)] == [(1, 4), (1, 4), (1, 6)]
    bias._batch_sizes = [2, 1]
    crops = x[:, :8].unflatten(1, (2, 4))[0], x[:, 8:]
    for part, crop in zip(bias.split(out), crops, strict=True):
        torch.testing.assert_close(part, by_torch(crop, crop, crop))


# --- wrong input ------------------------------------------------------------------------------------------------------

q, k, v = heads(B, N, H, D)
tokens = [x.detach().flatten(0, 1)[: sum(LENGTHS)] for x in (q, k, v)]
varlen, others = partial(flash_attn.flash_attn_varlen_func, *tokens), OFFSETS + torch.tensor([0, 1, 0, 0, 0])
attention = xops.memory_efficient_attention
other_keys = mask("BlockDiagonalMask", OFFSETS[[0, 1, 3, 3, 4]])


@pytest.mark.parametrize(
    ("call", "error", "argument"),
    [
        (lambda: flash_attn.flash_attn_func(q, k[:, :, :2], v[:, :, :2]), ValueError, "k must have"),
        (lambda: flash_attn.flash_attn_func(q[0], k, v), ValueError, "q must have"),
        (lambda: flash_attn.flash_attn_qkvpacked_func(q), ValueError, r"qkv must have shape \[B, N, 3, H, D\]"),
        (lambda: flash_attn.flash_attn_varlen_qkvpacked_func(q, OFFSETS, 7), ValueError, r"qkv must .* \[T, 3, H, D\]"),
        (lambda: flash_attn.flash_attn_func("q", k, v), TypeError, "q must be"),
        (lambda: varlen(OFFSETS, OFFSETS, 7, 9), NotImplementedError, "max_seqlen_k=9"),
        (lambda: varlen(OFFSETS, others, 7, 7), NotImplementedError, "cu_seqlens_k"),
        (lambda: varlen(*PACKED, block_table=OFFSETS), NotImplementedError, "block_table must be None"),
        (lambda: attention(q, k, v, p=0.2), NotImplementedError, "p must be 0.0"),
        (lambda: attention(q, k, v, op=(1, 2)), NotImplementedError, "op must be None"),
        (
            lambda: attention(q, k, v, output_dtype=torch.half),
            NotImplementedError,
            "output_dtype must .* torch.float32",
        ),
        (lambda: attention(q, k, v, torch.zeros(N, N)), NotImplementedError, "attn_bias must be .*, got Tensor"),
        (lambda: attention(q, k, v, mask("PagedMask")), NotImplementedError, "attn_bias must be .*, got PagedMask"),
        (lambda: attention(q, k[:, :3], v[:, :3], xops.LowerTriangularMask()), NotImplementedError, "key of 3 tokens"),
        (lambda: attention(q, k, v, other_keys), NotImplementedError, "attn_bias, a BlockDiagonalMask"),
        (lambda: attention(q[:, :, None], k[:, :, None], v[:, :, None]), ValueError, r"query must .* \[B, N, H, K\]"),
        (lambda: attention(q, k, v, mask("BlockDiagonalMask")), ValueError, r"query must have shape \[1, T, H, K\]"),
    ],
)
def test_wrong_input_raises(call, error, argument):
    with pytest.raises(error, match=argument):
        call()


# --- names ------------------------------------------------------------------------------------------------------------

MISSING = {
    "apex": ["fused_layer_norm_affine", "fused_rms_norm", "FusedSGD"],
    "flash_attn": ["flash_attn_with_kvcache", "apply_rotary_emb", "unpad_input"],
    "xformers": ["RMSNorm", "AttentionBias", "SwiGLU", "memory_efficient_attention_forward", "rope_padded"],
}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in MISSING for name in MISSING[module]])
def test_missing_name_has_replacement(module, name):
    with pytest.raises(ImportError, match=f"^evakernels.compat.{module} has no {name}: ") as caught:
        exec(f"from evakernels.compat.{module} import {name}")
    for path in re.findall(r"evakernels\.([\w.]+)", str(caught.value).partition(": ")[2]):
        operator.attrgetter(path)(evakernels)


@pytest.mark.parametrize("module", MISSING)
def test_unknown_name_raises_attribute_error(module):
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = importlib.import_module(f"evakernels.compat.{module}").no_such_name


OPTIONS = "window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False"
OPTIONS = f"dropout_p=0.0, softmax_scale=None, causal=False, {OPTIONS}"
SEQUENCES = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
FLASH_ATTN = {  # of flash-attn 2.8, which has no wheel
    "flash_attn_func": f"q, k, v, {OPTIONS}",
    "flash_attn_varlen_func": f"q, k, v, {SEQUENCES}, {OPTIONS}, block_table=None",
}


@pytest.mark.parametrize("name", FLASH_ATTN)
def test_flash_attn_signature(name):
    parameters = inspect.signature(getattr(flash_attn, name)).parameters.values()
    plain = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]
    assert str(inspect.Signature(plain)) == f"({FLASH_ATTN[name]})"
