"""Matrix products of 8-bit integers."""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from onnxruntime.quantization import QuantType, quantize_dynamic


def quantize(path: Path) -> None:
    """Replaces the weights of an ONNX file's matrix products by 8-bit integers with a scale for each output channel.

    What meets them is scaled while the model runs, from what it holds: no pictures are needed for that. Weights take 7
    of the 8 bits: processors without VNNI add pairs of products in 16 bits, which overflow with all 8.
    """
    external = path.with_name(f"{path.name}.data").exists()
    with TemporaryDirectory(dir=path.parent) as folder:
        quantize_dynamic(
            path,
            Path(folder) / path.name,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=external,
            extra_options={"MatMulConstBOnly": True},
        )
        for made in Path(folder).iterdir():
            shutil.move(made, path.with_name(made.name))
