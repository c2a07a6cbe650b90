"""What TensorRT would get wrong without a word, or end the process over: refused while it is still an ONNX graph.

All measured with TensorRT-RTX 1.7.1: its parser looks for a plugin where it does not know an operator, and a registered
one aborts the process; it drops the number of valid keys of an Attention; it has no circular TensorScatter.
"""

from collections.abc import Iterator
from pathlib import Path

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto

from cfrt.errors import ExportError

STANDARD = ("", "ai.onnx")
"""Domains of ONNX's own operators."""

VALID_KEYS = 6
"""Which input of Attention is `nonpad_kv_seqlen`."""


def check(model: ModelProto, name: str) -> None:
    """ExportError with every rule that the graph breaks, and the node that breaks it."""
    own = {(function.domain, function.name) for function in model.functions}
    graph_nodes = list(_nodes(model.graph))
    nodes = graph_nodes + [node for function in model.functions for node in function.node]
    broken = [reason for node in nodes if (reason := _broken(node, own)) is not None]
    broken += [f"input {dead!r} leads nowhere" for dead in _dead_inputs(model.graph, graph_nodes)]
    if broken:
        raise ExportError(f"TensorRT would not run the graph of {name!r} as it is meant: " + "; ".join(broken))


def load(path: Path) -> ModelProto:
    """A graph without the weights that lie beside it. ExportError when it is none."""
    try:
        return onnx.load(str(path), load_external_data=False)
    except Exception as error:  # of protobuf, whose classes differ between its implementations
        raise ExportError(f"{path} is not an ONNX graph ({error}); export it again") from error


def _broken(node: NodeProto, own: set[tuple[str, str]]) -> str | None:
    where = f"node {node.name or node.output[0]!r}"
    if node.domain not in STANDARD and (node.domain, node.op_type) not in own:
        return f"{where} is {node.domain}.{node.op_type}, which is no ONNX operator and has no body in the file"
    if node.op_type == "Attention" and len(node.input) > VALID_KEYS and node.input[VALID_KEYS]:
        return f"{where} limits the keys of an Attention by {node.input[VALID_KEYS]!r}, which would be ignored"
    if node.op_type == "Attention" and len(node.output) > 1:
        return f"{where} is an Attention with a cache inside, where only one output is supported"
    if node.op_type == "TensorScatter" and _text(node, "mode", "linear") != "linear":
        return f"{where} is a TensorScatter that goes round, where only the linear one is supported"
    return None


def _text(node: NodeProto, name: str, default: str) -> str:
    return next((attribute.s.decode() for attribute in node.attribute if attribute.name == name), default)


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Of the graph and of the bodies of its Ifs and Loops."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _dead_inputs(graph: GraphProto, nodes: list[NodeProto]) -> list[str]:
    """Inputs that no output depends on: what an in-place change of a buffer leaves behind when it is exported."""
    wanted = {output.name for output in graph.output}
    for node in reversed(nodes):
        if wanted.intersection(node.output) or any(a.type == AttributeProto.GRAPH for a in node.attribute):
            wanted.update(node.input)
    initial = {tensor.name for tensor in graph.initializer}
    return [value.name for value in graph.input if value.name not in wanted | initial]
