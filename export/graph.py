"""ONNX graphs, built node by node, and what a graph must keep to before anything may run it.

A graph is built for one format of numbers. Weights are initializers of that format, linear layers are products with a
transposed weight whose node carries the layer's name, so that a quantiser finds each by it. Only the standard
operators: an engine builder aborts on others, and ONNX Runtime has none of them either.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from cfrt.bundle import OUT, Segment
from cfrt.errors import ExportError

from . import graph_rules
from .quantize import Product, Ranges, product_of, row_of

OPSET = 23
"""The first with Attention and RMSNormalization, each one node that engine builders fuse."""
IR_VERSION = 11
LIMIT = 2_000_000_000
"""Bytes of one file: protobuf ends at 2 GiB."""

NUMPY: dict[str, Any] = {
    "fp32": np.float32,
    "bf16": ml_dtypes.bfloat16,
    "fp16": np.float16,
    "uint8": np.uint8,
}
ONNX = {
    "fp32": TensorProto.FLOAT,
    "bf16": TensorProto.BFLOAT16,
    "fp16": TensorProto.FLOAT16,
    "uint8": TensorProto.UINT8,
}

Value = str
"""The name of a tensor in a graph."""


class Graph:
    """The graph of one segment while it is built. `weights` gives the model's tensors by name, fp32; eps is that of all
    norms, which are over the last axis. precision: of the products that the table of `quantize` names for it, if any;
    `ranges` are those of their inputs."""

    def __init__(
        self,
        segment: Segment,
        weights: Mapping[str, np.ndarray],
        dtype: str,
        eps: float,
        precision: str,
        ranges: Ranges | None = None,
    ) -> None:
        self.segment, self.dtype, self.eps = segment, dtype, eps
        self._weights = weights
        self._precision, self._ranges = precision, ranges or {}
        self._products: dict[tuple[str, ...], Product] = {}
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}

    # ------------------------------------------------------------------ nodes

    def op(self, kind: str, *inputs: Value, name: str | None = None, **attributes: Any) -> Value:
        """A node with one output, which is called as the node is."""
        name = name or f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [name], name=name, **attributes))
        return name

    def weight(self, name: str, *shape: int, factors: np.ndarray | None = None) -> Value:
        """A tensor of the model, as it is or in another shape, or times factors."""
        array = self._weights[name] if factors is None else self._weights[name] * factors
        return self.constant(name, array.reshape(shape) if shape else array)

    def stacked(self, name: str, weights: Sequence[str]) -> Value:
        """Tensors of the model on top of each other."""
        return self.constant(name, np.stack([self._weights[weight] for weight in weights]))

    def constant(self, name: str, array: np.ndarray) -> Value:
        """An array in the graph's format; whole numbers as they are."""
        if name not in self._initializers:
            plain = array.dtype != NUMPY[self.dtype] and np.issubdtype(array.dtype, np.floating)
            stored = _stored(name, array, self.dtype) if plain else array
            self._initializers[name] = numpy_helper.from_array(np.ascontiguousarray(stored), name)
        return name

    def integers(self, *values: int) -> Value:
        return self.constant("shape_" + "x".join(str(value) for value in values), np.array(values, dtype=np.int64))

    # ------------------------------------------------------------------ layers

    def linear(self, x: Value, *layers: str) -> Value:
        """x W^T + b; of several layers side by side. In 8 bits where the table says so."""
        name = layers[0] if len(layers) == 1 else "+".join(layers)
        bias = np.concatenate([self._weights[f"{layer}.bias"] for layer in layers])
        product = self._product(layers)
        if product is None:
            weight = self.constant(
                f"{name}.weight", np.concatenate([self._transposed(layer) for layer in layers], axis=1)
            )
        else:
            x = x if product.is_folded else self._less(x, name, product)
            x, weight = self._narrowed(name, x, product), self._widened(name, product)
            bias = bias + product.shift
        return self.op("Add", self.op("MatMul", x, weight, name=name), self.constant(f"{name}.bias", bias))

    def inverse_factors(self, *layers: str) -> np.ndarray | None:
        """What the input of these layers must have been multiplied by, [in]: None for nothing."""
        product = self._product(layers)
        return None if product is None else product.inverse_factors

    def less_offset(self, x: Value, *layers: str) -> Value:
        """The shift `x` of a norm, [in], without what must be off the input of these layers."""
        product = self._product(layers)
        return x if product is None else self._less(x, layers[0], product)

    def _less(self, x: Value, name: str, product: Product) -> Value:
        if product.offset is None:
            return x
        return self.op("Sub", x, self.constant(f"{name}.offset", product.offset))

    def _product(self, layers: tuple[str, ...]) -> Product | None:
        row = row_of(self._precision, *layers)
        if row is None:
            return None
        if layers not in self._products:
            weight = np.concatenate([self._weights[f"{layer}.weight"] for layer in layers]).T
            if not np.isfinite(weight).all():
                raise ExportError(f"{layers[0]}.weight holds values that are not finite; mend the file")
            self._products[layers] = product_of(row, layers, weight, self._ranges, self._precision)
        return self._products[layers]

    def _narrowed(self, name: str, x: Value, product: Product) -> Value:
        """To 8 bits and back."""
        scale = self.constant(f"{name}.input_scale", np.asarray(product.input_scale))
        zero = self.constant("zero", np.zeros((), product.weight.dtype))  # which says the format
        narrow = self.op("QuantizeLinear", x, scale, zero, name=f"{name}.input_quantised")
        return self.op("DequantizeLinear", narrow, scale, zero, name=f"{name}.input")

    def _widened(self, name: str, product: Product) -> Value:
        weight = self.constant(f"{name}.weight", product.weight)
        scale = self.constant(f"{name}.weight_scale", product.weight_scale)
        zeros = self.constant(f"{name}.zeros", np.zeros(product.weight.shape[1], product.weight.dtype))
        return self.op("DequantizeLinear", weight, scale, zeros, axis=1, name=f"{name}.weight_dequantised")

    def _transposed(self, layer: str) -> np.ndarray:
        """[in, out], in the graph's format: narrowed before it is put beside others, which is most of the work."""
        name = f"{layer}.weight"
        weight = self._weights[name]
        return _stored(name, weight.reshape(len(weight), -1), self.dtype).T

    def layer_norm(self, x: Value, scale: Value, shift: Value) -> Value:
        return self.op("LayerNormalization", x, scale, shift, axis=-1, epsilon=self.eps)

    def rms_norm(self, x: Value, scale: Value) -> Value:
        return self.op("RMSNormalization", x, scale, axis=-1, epsilon=self.eps)

    def silu(self, x: Value) -> Value:
        return self.op("Mul", x, self.op("Sigmoid", x))

    def reshape(self, x: Value, *shape: int) -> Value:
        return self.op("Reshape", x, self.integers(*shape))

    def cast(self, x: Value, dtype: str) -> Value:
        return self.op("Cast", x, to=ONNX[dtype])

    # ------------------------------------------------------------------ the whole

    def finish(self, outputs: Mapping[str, Value]) -> ModelProto:
        """The model, checked. `outputs`: the value of every output of the segment."""
        nodes = [*self._nodes, *(helper.make_node("Identity", [v], [OUT + name]) for name, v in outputs.items())]
        segment = self.segment
        graph = helper.make_graph(
            nodes,
            segment.name,
            [helper.make_tensor_value_info(p.name, ONNX[p.dtype], p.shape) for p in segment.inputs],
            [helper.make_tensor_value_info(OUT + p.name, ONNX[p.dtype], p.shape) for p in segment.outputs],
            list(self._initializers.values()),
        )
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="cfrt")
        check(model, segment)
        return model


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """As a graph of that format holds it, in fp32."""
    stored: np.ndarray = array.astype(NUMPY[dtype]).astype(np.float32)
    return stored


def _stored(name: str, array: np.ndarray, dtype: str) -> np.ndarray:
    """In a graph's format; ExportError when a number is not finite there."""
    with np.errstate(over="ignore"):
        stored: np.ndarray = array.astype(NUMPY[dtype])
    if not np.isfinite(stored.astype(np.float32)).all():
        raise ExportError(f"{name} holds values that are not finite in {dtype}; use --precision bf16, or mend the file")
    return stored


# ---------------------------------------------------------------------- what a graph must keep to


def check(model: ModelProto, segment: Segment) -> None:
    """ExportError, which names the node or the port, unless the graph is fit to be an engine's: by the rules of
    `graph_rules`, by ONNX's own checker, with the ports of the segment in names, shapes and formats, and with every
    output computed: what replaces a buffer comes from what is new, the first input. An exporter drops a state that was
    changed in place without a word."""
    graph = model.graph
    graph_rules.check(model, segment.name)
    _check_ports("input", {p.name: (ONNX[p.dtype], p.shape) for p in segment.inputs}, graph.input, segment.name)
    outputs = {OUT + p.name: (ONNX[p.dtype], p.shape) for p in segment.outputs}
    _check_ports("output", outputs, graph.output, segment.name)
    _check_flow(graph, segment)
    if model.ByteSize() >= LIMIT:
        raise ExportError(f"{segment.name} is {model.ByteSize()} bytes; a file of a bundle has less than {LIMIT}")
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{segment.name} is no valid graph: {error}") from error


def _check_ports(what: str, expected: Mapping[str, Any], got: Sequence[onnx.ValueInfoProto], where: str) -> None:
    found = {
        value.name: (value.type.tensor_type.elem_type, tuple(d.dim_value for d in value.type.tensor_type.shape.dim))
        for value in got
    }
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise ExportError(f"{where}: {what}s are missing: {missing}, and not asked for: {unknown}")
    for name, port in expected.items():
        if found[name] != port:
            raise ExportError(f"{where}: expected {what} {name} to be {port}, got {found[name]}")


def _check_flow(graph: onnx.GraphProto, segment: Segment) -> None:
    """Every output comes from an input, and what replaces a buffer from the first one."""
    fed: dict[str, frozenset[str]] = {value.name: frozenset([value.name]) for value in graph.input}
    for node in graph.node:
        came = frozenset().union(*(fed.get(name, frozenset()) for name in node.input))
        fed |= dict.fromkeys(node.output, came)
    names = [port.name for port in segment.inputs]
    for port in segment.outputs:
        sources = fed.get(OUT + port.name, frozenset())
        if not sources or (port.name in names and names[0] not in sources):
            what = names[0] if port.name in names else "any input"
            raise ExportError(f"{segment.name}: output {port.name} does not come from {what}: a change was lost")
