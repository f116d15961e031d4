"""Predicted times of backends, by compute capability and op, until a GPU's file has measured ones.

They are the least times of the audit's roofline (`benchmarks/audit/roofline.py`) on an A100 and H100: matmuls of
padded tiles, with `mma.sync` at 62 % of the peak on 9.0, exponentials, and bytes of memory. Triton rotates keys in a
separate pass, and its backward pass has two kernels with seven matmuls instead of five. Packed sequences are of equal
length, causal and not rotated, in tiles of 16 tokens, with Triton of 64 (in backward on an H100 of 32, by `mma.sync`).
Contrastive losses are of 32,768 pairs; where both backends have `mma.sync`, shared memory limits Triton's smaller tiles
of a warp. Gradients include the two matmuls with the features at the peak. On a B200,
Triton's times count the matmuls only.
"""

from typing import Any


def row(head_dim: int, tokens: int, heads: int, **microseconds: float) -> dict[str, Any]:
    """An entry of attention in 16 bits; `python -m evakernels.tuning run` measures the same sizes."""
    return {"shape": {"head_dim": head_dim, "tokens": tokens, "heads": heads}, "config": microseconds}


LOSSES = "contrastive_forward", "contrastive_kept_forward", "contrastive_backward", "siglip_forward", "siglip_value"


def loss_entries(*microseconds: tuple[float, float]) -> dict[str, list[dict[str, Any]]]:
    """The entries of contrastive losses in 16 bits, from the times of CUDA and Triton for each of `LOSSES`."""
    shape = {"depth": 768, "itemsize": 2}
    times = [{"cuda": cuda, "triton": triton} for cuda, triton in microseconds]
    return {op: [{"shape": shape, "config": config}] for op, config in zip(LOSSES, times, strict=True)}


_LOSSES_BY_MMA_SYNC = loss_entries((5690, 7450), (5690, 7450), (16500, 17970), (16420, 20640), (5630, 6930))

MICROSECONDS: dict[int, dict[str, list[dict[str, Any]]]] = {
    80: {
        "rope_attention_forward": [
            row(64, 257, 4096, cuda=264, triton=396),
            row(64, 577, 4096, cuda=1178, triton=1475),
            row(64, 1025, 4096, cuda=3635, triton=4162),
            row(112, 257, 4096, cuda=463, triton=694),
            row(112, 577, 4096, cuda=2061, triton=2581),
            row(112, 1025, 4096, cuda=6361, triton=7284),
        ],
        "rope_attention_backward": [
            row(64, 257, 4096, cuda=622, triton=1092),
            row(64, 577, 4096, cuda=2945, triton=4419),
            row(64, 1025, 4096, cuda=9088, triton=13250),
            row(112, 257, 4096, cuda=1088, triton=1911),
            row(112, 577, 4096, cuda=5153, triton=7734),
            row(112, 1025, 4096, cuda=15903, triton=23187),
        ],
        "packed_attention_forward": [
            row(64, 77, 4096, cuda=79, triton=79),
            row(64, 257, 4096, cuda=264, triton=264),
            row(64, 577, 4096, cuda=605, triton=757),
            row(64, 1025, 4096, cuda=1845, triton=2106),
        ],
        "packed_attention_backward": [
            row(64, 77, 4096, cuda=158, triton=238),
            row(64, 257, 4096, cuda=529, triton=809),
            row(64, 577, 4096, cuda=1512, triton=2650),
            row(64, 1025, 4096, cuda=4614, triton=7372),
        ],
        **_LOSSES_BY_MMA_SYNC,
    },
    90: {
        "rope_attention_forward": [
            row(64, 257, 4096, cuda=161, triton=241),
            row(64, 577, 4096, cuda=599, triton=610),
            row(64, 1025, 4096, cuda=1850, triton=1516),
            row(112, 257, 4096, cuda=282, triton=422),
            row(112, 577, 4096, cuda=1049, triton=1037),
            row(112, 1025, 4096, cuda=3237, triton=2568),
        ],
        "rope_attention_backward": [
            row(64, 257, 4096, cuda=322, triton=603),
            row(64, 577, 4096, cuda=1498, triton=1636),
            row(64, 1025, 4096, cuda=4624, triton=4334),
            row(112, 257, 4096, cuda=563, triton=1056),
            row(112, 577, 4096, cuda=2622, triton=2723),
            row(112, 1025, 4096, cuda=8092, triton=7585),
        ],
        "packed_attention_forward": [
            row(64, 77, 4096, cuda=48, triton=48),
            row(64, 257, 4096, cuda=161, triton=161),
            row(64, 577, 4096, cuda=361, triton=361),
            row(64, 1025, 4096, cuda=939, triton=664),
        ],
        "packed_attention_backward": [
            row(64, 77, 4096, cuda=96, triton=145),
            row(64, 257, 4096, cuda=322, triton=483),
            row(64, 577, 4096, cuda=769, triton=1207),
            row(64, 1025, 4096, cuda=2348, triton=3438),
        ],
        **loss_entries((3320, 2700), (3320, 2700), (6790, 5350), (6740, 6090), (3270, 1680)),
    },
    # No times of attention: Triton's kernels for 10.0 are compiled, but not run by an interpreter, and CUDA stays first
    # until measured.
    100: loss_entries((2990, 730), (2990, 730), (4650, 2200), (5180, 2200), (3440, 730)),
    120: _LOSSES_BY_MMA_SYNC,  # as on 8.0: both use `mma.sync`
}
