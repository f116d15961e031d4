"""flash-attn's and xformers' attention beside torch's, and what of it is refused, with which words."""

import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from evakernels.compat import flash_attn
from evakernels.compat import xformers as xops

B, N, H, D = 2, 11, 3, 8
LENGTHS = [5, 0, 7, 1]
OFFSETS = torch.tensor([0, 5, 5, 12, 13], dtype=torch.int32)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(*shape: int) -> list[Tensor]:
    return [randn(*shape, seed=seed).requires_grad_() for seed in range(3)]


def by_torch(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    """Causal as flash-attn has it: the last query sees all keys."""
    mask = torch.ones(q.shape[-3], k.shape[-3], dtype=torch.bool).tril(k.shape[-3] - q.shape[-3]) if causal else None
    turned = (x.transpose(-3, -2) for x in (q, k, v))
    shared = q.shape[-2] != k.shape[-2]
    out = F.scaled_dot_product_attention(*turned, attn_mask=mask, scale=scale, enable_gqa=shared)
    return out.transpose(-3, -2)


def packed_by_torch(q: Tensor, k: Tensor, v: Tensor, causal: bool = False, scale: float | None = None) -> Tensor:
    parts = zip(*(x.split(LENGTHS) for x in (q, k, v)), strict=True)
    return torch.cat([by_torch(*part, causal, scale) for part in parts if len(part[0])])


def assert_same(ours: Tensor, theirs: Tensor, leaves: list[Tensor]) -> None:
    torch.testing.assert_close(ours, theirs)
    gradients = (torch.autograd.grad(out.square().sum(), leaves) for out in (ours, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def refused(call, *words: str, kind: type[Exception] = NotImplementedError) -> None:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert re.search(word, message), (word, message)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
def test_flash_attn_is_attention(scale, causal):
    q, k, v = heads(B, N, H, D)
    expected = by_torch(q, k, v, causal, scale)
    options = {"softmax_scale": scale, "causal": causal, "deterministic": True, "window_size": [-1, -1]}
    assert_same(flash_attn.flash_attn_func(q, k, v, **options), expected, [q, k, v])
    packed = flash_attn.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), 0.0, scale, causal)
    torch.testing.assert_close(packed, expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("kv_heads", [H, 1])
def test_flash_attn_of_packed_sequences(kv_heads, scale, causal):
    q, k, v = (randn(sum(LENGTHS), h, D, seed=seed).requires_grad_() for seed, h in enumerate((H, kv_heads, kv_heads)))
    for keys in (OFFSETS, OFFSETS.clone()):
        out = flash_attn.flash_attn_varlen_func(q, k, v, OFFSETS, keys, 7, 7, 0.0, scale, causal)
        assert_same(out, packed_by_torch(q, k, v, causal, scale), [q, k, v])


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attn_of_packed_sequences_in_one_tensor(causal):
    q, k, v = heads(sum(LENGTHS), H, D)
    expected = packed_by_torch(q, k, v, causal, 0.3)
    three = flash_attn.flash_attn_varlen_qkvpacked_func(torch.stack((q, k, v), 1), OFFSETS, 7, 0.0, 0.3, causal)
    assert_same(three, expected, [q, k, v])
    two = flash_attn.flash_attn_varlen_kvpacked_func
    kv = torch.stack((k, v), 1)
    out, lse, _ = two(q, kv, OFFSETS, OFFSETS, 7, 7, 0.0, 0.3, causal, return_attn_probs=True)
    torch.testing.assert_close(out, expected)
    assert lse.shape == (H, sum(LENGTHS))
    refused(lambda: two(q, kv, OFFSETS, OFFSETS, 7, 9), "flash_attn_varlen_kvpacked_func: max_seqlen_k is 9")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("keys", "kv_heads"), [(N, 1), (N + 4, H), (N + 1, 1)])
def test_flash_attn_of_shared_heads_and_more_keys(keys, kv_heads, causal):
    q, k, v = randn(B, N, H, D), *(randn(B, keys, kv_heads, D, seed=seed) for seed in (1, 2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    for given in ({}, {"softmax_scale": 0.3}):
        out = flash_attn.flash_attn_func(q, k, v, causal=causal, **given)
        assert_same(out, by_torch(q, k, v, causal, given.get("softmax_scale")), leaves)
        in_one = flash_attn.flash_attn_kvpacked_func(q, torch.stack((k, v), 2), causal=causal, **given)
        assert_same(in_one, by_torch(q, k, v, causal, given.get("softmax_scale")), leaves)


def test_flash_attn_returns_lse_where_probabilities_are_asked_for():
    q, k, v = heads(B, N, H, D)
    out, lse, probabilities = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    torch.testing.assert_close(out, by_torch(q, k, v))
    torch.testing.assert_close(lse, (D**-0.5 * torch.einsum("bnhd,bmhd->bhnm", q, k)).logsumexp(-1))
    assert not lse.requires_grad
    assert probabilities.numel() == 0
    again, same, _ = flash_attn.flash_attn_qkvpacked_func(torch.stack((q, k, v), 2), return_attn_probs=True)
    assert torch.equal(again, out)
    assert torch.equal(same, lse)
    lengths = torch.tensor([0, N, B * N], dtype=torch.int32)
    packed = (x.flatten(0, 1) for x in (q, k, v))
    _, lse_of_packed, _ = flash_attn.flash_attn_varlen_func(*packed, lengths, lengths, N, N, return_attn_probs=True)
    torch.testing.assert_close(lse_of_packed.unflatten(1, (B, N)).transpose(0, 1), lse)


def test_flash_attn_compiles_without_graph_break():
    q, k, v = heads(B, N, H, D)
    compiled = torch.compile(flash_attn.flash_attn_func, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, causal=True), by_torch(q, k, v, True))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dropout_p": 0.1}, "dropout_p is 0.1; accepted: 0.0"),
        ({"window_size": (128, 0)}, r"window_size is \(128, 0\); accepted: \(-1, -1\)"),
        ({"softcap": 30.0}, "softcap is 30.0; accepted: 0.0"),
        ({"alibi_slopes": torch.ones(H)}, "alibi_slopes is a torch.Tensor; accepted: None"),
    ],
)
def test_options_of_flash_attn_that_are_not_served_are_named(options, words):
    q, k, v = heads(B, N, H, D)
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    where = OFFSETS, OFFSETS, 7, 7
    refused(lambda: flash_attn.flash_attn_func(q, k, v, **options), f"flash_attn_func: {words}")
    refused(lambda: flash_attn.flash_attn_varlen_func(*packed, *where, **options), f"flash_attn_varlen_func: {words}")
    qkv = torch.stack((q, k, v), 2)
    refused(lambda: flash_attn.flash_attn_qkvpacked_func(qkv, **options), f"flash_attn_qkvpacked_func: {words}")
    kv = torch.stack((k, v), 2)
    refused(lambda: flash_attn.flash_attn_kvpacked_func(q, kv, **options), f"flash_attn_kvpacked_func: {words}")
    of_two, of_three = flash_attn.flash_attn_varlen_kvpacked_func, flash_attn.flash_attn_varlen_qkvpacked_func
    refused(lambda: of_two(packed[0], kv.flatten(0, 1), *where, **options), f"flash_attn_varlen_kvpacked_func: {words}")
    refused(lambda: of_three(qkv.flatten(0, 1), OFFSETS, 7, **options), f"flash_attn_varlen_qkvpacked_func: {words}")


def test_shapes_of_flash_attn_that_are_not_served_are_named():
    q, k, v = heads(B, N, H, D)
    two, wrong = (k[:, :, :2], v[:, :, :2]), {"kind": ValueError}
    refused(lambda: flash_attn.flash_attn_func(q, *two), "k has 2 heads and q has 3; accepted: a number that", **wrong)
    refused(lambda: flash_attn.flash_attn_func(q[0], k, v), r"q has shape \(11, 3, 8\); expected \[B, N, H", **wrong)
    refused(lambda: flash_attn.flash_attn_qkvpacked_func(q), r"qkv has shape .* \[B, N, 3, H, D\]", **wrong)
    refused(lambda: flash_attn.flash_attn_kvpacked_func(q, q), r"kv has shape .* \[B, N, 2, H, D\]", **wrong)
    of_three = flash_attn.flash_attn_varlen_qkvpacked_func
    refused(lambda: of_three(q, OFFSETS, 7), r"qkv has shape .* \[T, 3, H, D\]", **wrong)
    refused(lambda: flash_attn.flash_attn_func("q", k, v), "flash_attn_func: q is a str", kind=TypeError)


def test_packed_keys_that_lie_otherwise_are_named():
    q, k, v = heads(sum(LENGTHS), H, D)
    varlen, other = flash_attn.flash_attn_varlen_func, OFFSETS + torch.tensor([0, 1, 0, 0, 0], dtype=torch.int32)
    refused(lambda: varlen(q, k, v, OFFSETS, OFFSETS, 7, 9), "max_seqlen_k is 9 and max_seqlen_q is 7; accepted: as")
    refused(lambda: varlen(q, k, v, OFFSETS, other, 7, 7), "cu_seqlens_k isn't cu_seqlens_q .pass one tensor for both")
    refused(lambda: varlen(q, k, v, OFFSETS, OFFSETS.to("meta"), 7, 7), "cu_seqlens_k isn't cu_seqlens_q")
    fewer = k[:4], v[:4]
    refused(lambda: varlen(q, *fewer, OFFSETS, OFFSETS, 7, 7), "k has 4 tokens and q has 13; accepted: as many keys")
    refused(lambda: varlen(q, k, v, OFFSETS, OFFSETS, 7, 7, block_table=OFFSETS), "block_table is a torch.Tensor")


def mask(name: str, offsets: Tensor = OFFSETS, keys: Tensor | None = None) -> object:
    """What `memory_efficient_attention` sees of xformers' mask of this name."""
    infos = [
        SimpleNamespace(seqstart=starts, seqstart_py=starts.tolist(), max_seqlen=7)
        for starts in (offsets, offsets if keys is None else keys)
    ]
    return type(name, (), {"q_seqinfo": infos[0], "k_seqinfo": infos[1]})()


@pytest.mark.parametrize(
    ("bias", "causal"),
    [
        (None, False),
        (xops.LowerTriangularMask(), True),
        (mask("LowerTriangularMask"), True),
        (mask("LowerTriangularFromBottomRightMask"), True),
    ],
)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_xformers_is_attention(scale, bias, causal):
    q, k, v = heads(B, N, H, D)
    out = xops.memory_efficient_attention(q, k, v, bias, scale=scale)
    assert_same(out, by_torch(q, k, v, causal, scale), [q, k, v])
    one = (x[:, :, 0] for x in (q, k, v))
    torch.testing.assert_close(xops.memory_efficient_attention(*one, bias, 0.0, scale), out[:, :, 0])


@pytest.mark.parametrize(
    ("name", "causal"),
    [("BlockDiagonalMask", False), ("BlockDiagonalCausalMask", True), ("BlockDiagonalCausalFromBottomRightMask", True)],
)
def test_xformers_of_packed_sequences(name, causal):
    q, k, v = heads(1, sum(LENGTHS), H, D)
    out = xops.memory_efficient_attention(q, k, v, mask(name), output_dtype=q.dtype)
    expected = packed_by_torch(q[0], k[0], v[0], causal).unsqueeze(0)
    assert_same(out, expected, [q, k, v])


def test_what_xformers_has_beyond_is_named():
    q, k, v = heads(B, N, H, D)
    attention = xops.memory_efficient_attention
    refused(lambda: attention(q, k, v, p=0.2), "memory_efficient_attention: p is 0.2; accepted: 0.0")
    refused(lambda: attention(q, k, v, op=(1, 2)), r"op is \(1, 2\); accepted: None")
    refused(lambda: attention(q, k, v, output_dtype=torch.float16), "output_dtype is torch.float16; .* torch.float32")
    refused(lambda: attention(q, k, v, torch.zeros(N, N)), "attn_bias is a Tensor; accepted: None, LowerTriangularMask")
    refused(lambda: attention(q, k, v, mask("PagedBlockDiagonalPaddedKeysMask")), "attn_bias is a PagedBlockDiagonal")
    corner, fewer = xops.LowerTriangularMask(), (k[:, :3], v[:, :3])
    refused(lambda: attention(q, *fewer, corner), "key has 3 tokens and query has 11 under a LowerTriangularMask; acc")
    lies = mask("BlockDiagonalMask", keys=OFFSETS[[0, 1, 3, 3, 4]])
    refused(lambda: attention(q, k, v, lies), "BlockDiagonalMask of keys in other places than the queries; accepted")
    refused(lambda: attention(q, k, v, mask("BlockDiagonalMask")), r"expected \[1, T, H, K\]", kind=ValueError)
    refused(lambda: attention(q[0, 0], k, v), r"query has shape .* expected \[B, N, H, D\]", kind=ValueError)


def test_nested_batches_of_dinov2():
    """Its calls: samples of several batches, one attention over all of them, and what it gives added to each."""
    batches, rows = [randn(3, 4, H * D), randn(2, 6, H * D)], [torch.tensor([2, 0]), torch.tensor([1])]
    mask = xops.fmha.BlockDiagonalMask.from_seqlens([4, 4, 6])
    mask._batch_sizes = [2, 1]
    x = xops.index_select_cat([x.flatten(1) for x in batches], rows).view(1, -1, H * D)
    q, k, v = xops.unbind(torch.stack([x.unflatten(2, (H, D))] * 3, 2), 2)
    parts = mask.split(xops.fmha.memory_efficient_attention(q, k, v, attn_bias=mask).flatten(2))
    scaling = randn(H * D)
    for batch, chosen, part in zip(batches, rows, parts, strict=True):
        alone = batch[chosen].unflatten(2, (H, D))
        torch.testing.assert_close(part, by_torch(alone, alone, alone).flatten(2))
        expected = batch.index_add(0, chosen, 1.5 * scaling * part)
        assert xops.scaled_index_add(batch, chosen, part, scaling=scaling, alpha=1.5) is batch
        torch.testing.assert_close(batch, expected)
    assert [x.shape[:2] for x in xops.BlockDiagonalMask.from_seqlens([4, 0, 6]).split(x[:, :10])] == [
        (1, 4),
        (1, 0),
        (1, 6),
    ]
    longer = xops.BlockDiagonalMask.from_seqlens([4, 4, 6], [4, 5, 5])
    refused(lambda: xops.memory_efficient_attention(q, k, v, longer), "keys in other places than the queries")


@pytest.mark.parametrize("expanded", ["kv", "k", ""])
def test_xformers_of_groups_of_heads_and_more_keys(expanded):
    """`[B, N, G, H, K]`, two groups of three heads."""
    q, k, v = randn(B, N, 2, 3, D), *(randn(B, N + 3, 2, 1, D, seed=seed) for seed in (1, 2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    given = [x.expand(B, N + 3, 2, 3, D) for x in (k, v)]
    given = [x if name in expanded else x.clone() for name, x in zip("kv", given, strict=True)]
    out = xops.memory_efficient_attention(q, *given, mask("LowerTriangularFromBottomRightMask"))
    assert_same(out, by_torch(q.flatten(2, 3), k[:, :, :, 0], v[:, :, :, 0], True).unflatten(2, (2, 3)), leaves)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_xformers_swiglu(packed, bias):
    module = xops.SwiGLU(6, 10, 4, bias, _pack_weights=packed)
    parts = module.w12.weight.chunk(2) if packed else (module.w1.weight, module.w2.weight)
    biases = (module.w12.bias.chunk(2) if packed else (module.w1.bias, module.w2.bias)) if bias else (None, None)
    x = randn(2, 3, 6)
    hidden = F.silu(F.linear(x, parts[0], biases[0])) * F.linear(x, parts[1], biases[1])
    expected = F.linear(hidden, module.w3.weight, module.w3.bias)
    torch.testing.assert_close(module(x), expected)
    arguments = parts[0], biases[0], parts[1], biases[1], module.w3.weight, module.w3.bias
    torch.testing.assert_close(xops.swiglu(x, *arguments), expected)
    refused(lambda: xops.swiglu(x, *arguments, op="eager"), "swiglu: op is 'eager'; accepted: None")
    assert xops.SwiGLU(6, 10)(x).shape == x.shape
