"""The fp32 twin of an ONNX graph: the same nodes and weights, every half-precision format widened to fp32.

ONNX Runtime's CPU kernels know hardly any bf16. A number that was rounded to bf16 or fp16 is an fp32 number too, so a
twin holds exactly the weights of its graph; only the roundings between its nodes are gone. Quantised weights and the
nodes that quantise stay as they are.
"""

from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, ModelProto, TensorProto, numpy_helper

HALF = (TensorProto.BFLOAT16, TensorProto.FLOAT16)


def fp32_twin(path: Path) -> bytes:
    """The twin of the graph in a file, serialised."""
    model = onnx.load(path)
    widen(model)
    twin: bytes = model.SerializeToString()
    return twin


def widen(model: ModelProto) -> None:
    """Makes the model its own twin."""
    graph = model.graph
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in HALF:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == AttributeProto.TENSOR:
                _widen_tensor(attribute.t)
            elif attribute.name in ("to", "dtype", "output_dtype", "softmax_precision") and attribute.i in HALF:
                attribute.i = TensorProto.FLOAT


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type in HALF:
        wide = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(wide, tensor.name))
