"""An ONNX graph, written node by node: what a tower's own export adds to the `onnx` package."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

from evaclip.portable.probe import OPSET

Dtype = Literal["fp32", "fp16", "bf16"]
DTYPES: tuple[Dtype, ...] = ("fp32", "fp16", "bf16")

# A protobuf message ends at 2 GiB; beyond this the weights lie in a file of their own.
_LARGEST_MESSAGE = 1_900_000_000
_IR_VERSION = 10


class Graph:
    """Nodes and constants so far. Names of values are strings, and every method that computes returns one.

    Args:
        dtype: of the weights. `fp16` is computed in; `bf16` is widened to float32 by nodes, so no
            runtime needs kernels of bfloat16.
    """

    def __init__(self, dtype: Dtype) -> None:
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Appends a node of the operator `kind`; the name of its output, or a list of several."""
        names = [f"{kind}_{len(self.nodes)}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, inputs, names, name=f"{kind}_{len(self.nodes)}", **attributes))
        return names if outputs > 1 else names[0]

    def weight(self, values: ArrayLike) -> str:
        """A float constant, rounded to the graph's dtype once."""
        array = np.ascontiguousarray(values, dtype=np.float32)
        if self.dtype == "bf16":
            kept = helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16)
            return str(self.op("Cast", self._constant(array.astype(kept)), to=TensorProto.FLOAT))
        return self._constant(array.astype(np.float16) if self.dtype == "fp16" else array)

    def scalar(self, value: float) -> str:
        """A float32 constant of no dimension."""
        return self._constant(np.array(value, dtype=np.float32))

    def integers(self, *values: int) -> str:
        """An int64 constant, 1-D."""
        return self._constant(np.array(values, dtype=np.int64))

    def cast(self, x: str, to: Literal["computed", "float32"]) -> str:
        """`x` in float32, or in the dtype that is computed in."""
        if self.dtype != "fp16":
            return x
        return str(self.op("Cast", x, to=TensorProto.FLOAT if to == "float32" else TensorProto.FLOAT16))

    def linear(self, x: str, weight: NDArray[np.float32], bias: NDArray[np.float32] | None) -> str:
        """`x @ weight.T + bias`, `weight` `[out, in]` as in torch."""
        product = str(self.op("MatMul", x, self.weight(weight.T)))
        return product if bias is None else str(self.op("Add", product, self.weight(bias)))

    def reshape(self, x: str, *shape: int) -> str:
        """`x` in another shape; 0 keeps a dimension, -1 is what is left."""
        return str(self.op("Reshape", x, self.integers(*shape)))

    def transpose(self, x: str, *order: int) -> str:
        """`x` with its dimensions in another order."""
        return str(self.op("Transpose", x, perm=order))

    def split(self, x: str, sizes: Sequence[int], axis: int) -> list[str]:
        """Parts of `x` along a dimension."""
        return list(self.op("Split", x, self.integers(*sizes), outputs=len(sizes), axis=axis))

    def slice(self, x: str, start: int, end: int, axis: int) -> str:
        """`x[start:end]` along a dimension."""
        return str(self.op("Slice", x, self.integers(start), self.integers(end), self.integers(axis)))

    def model(
        self, inputs: onnx.ValueInfoProto, output: str, named: str, columns: int, metadata: dict[str, str]
    ) -> onnx.ModelProto:
        """The file's contents: float32 `output` `[batch, columns]` under the name `named`."""
        self.nodes.append(helper.make_node("Identity", [output], [named], name="result"))
        result = helper.make_tensor_value_info(named, TensorProto.FLOAT, ["batch", columns])
        graph = helper.make_graph(self.nodes, "tower", [inputs], [result], self.weights)
        opset = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opset, ir_version=_IR_VERSION, producer_name="evaclip")
        helper.set_model_props(model, metadata)
        return model

    def _constant(self, array: NDArray[Any]) -> str:
        name = f"constant_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name


def save(model: onnx.ModelProto, path: Path, external: bool = False) -> None:
    """Writes a file, and beside it `NAME.data` with the weights if asked for or where they are too many for one."""
    if external or sum(len(tensor.raw_data) for tensor in model.graph.initializer) > _LARGEST_MESSAGE:
        onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data")
    else:
        onnx.save_model(model, path)
