"""Matrix products of 8-bit integers."""

from pathlib import Path

from onnxruntime.quantization import QuantType, quantize_dynamic


def quantize(path: Path) -> None:
    """Replaces the weights of an ONNX file's matrix products by 8-bit integers with a scale for each output channel.

    What meets them is scaled while the model runs, from what it holds: no pictures are needed for that. Weights take 7
    of the 8 bits: processors without VNNI add pairs of products in 16 bits, which overflow with all 8.
    """
    quantize_dynamic(
        path,
        path,
        op_types_to_quantize=["MatMul"],
        per_channel=True,
        reduce_range=True,
        weight_type=QuantType.QInt8,
        extra_options={"MatMulConstBOnly": True},
    )
