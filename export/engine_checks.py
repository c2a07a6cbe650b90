"""Is an engine the one that its graph asked for? Read in the engine's own bytes, without a GPU.

What is compared: targets and version, inputs and outputs, whether each attention and each GELU is in a fused kernel,
whether the products that were quantised multiply 8-bit numbers, whether the engine can be captured in a CUDA graph, and
whether its scratch memory is that of fused kernels. What cannot be seen here is whether it computes the right numbers:
that is for the graph's verification, which comes first, and for a GPU.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from math import prod

from onnx import ModelProto, NodeProto

from cfrt.bundle import OUT, Port, Segment
from cfrt.errors import ExportError

from .engine_report import Port as Found
from .engine_report import Report

HALF = ("bf16", "fp16")
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "uint8": 1}
EIGHT_BITS = ("fp8", "int8")
SPARE = 32 << 20
"""Bytes of scratch that engines of any size have; measured: 8 MB."""


def check(segment: Segment, model: ModelProto, report: Report, targets: Sequence[str], version: str) -> None:
    """ExportError with everything that the engine is not."""
    wrong = list(_differences(segment, model, report, targets, version))
    if wrong:
        raise ExportError(f"the engine of {segment.name!r} is not what was asked for: {'; '.join(wrong)}")


def _differences(
    segment: Segment, model: ModelProto, report: Report, targets: Sequence[str], version: str
) -> Iterator[str]:
    if sorted(report.targets) != sorted(targets):
        yield f"expected it to be for {', '.join(targets)}, found {', '.join(report.targets)}"
    if report.version != version:
        yield f"expected it to be of TensorRT {version}, found {report.version}"
    for what, expected, found in (
        ("input", _ports("", segment.inputs), report.inputs),
        ("output", _ports(OUT, segment.outputs), report.outputs),
    ):
        for name in sorted(expected.keys() | found.keys()):
            if expected.get(name) != found.get(name):
                yield f"expected {what} {name} to be {expected.get(name)}, found {found.get(name)}"
    if not report.stream_capturable:
        yield "it cannot be captured in a CUDA graph"
    yield from _fusions(segment, model, report)
    yield from _quantised(model, report)
    if is_transformer(segment) and report.device_memory > (most := _scratch(segment, model)):
        yield f"expected scratch memory of at most {most / 1e6:.0f} MB, found {report.device_memory / 1e6:.0f} MB"


def _ports(prefix: str, ports: Sequence[Port]) -> dict[str, Found]:
    return {prefix + port.name: Found(port.shape, port.dtype) for port in ports}


def is_transformer(segment: Segment) -> bool:
    return not segment.kind.startswith(("decoder", "encoder"))


def _fusions(segment: Segment, model: ModelProto, report: Report) -> Iterator[str]:
    """Of the transformer in half precision: no kernel takes attention in fp32, nor the wide heads of a decoder."""
    if not is_transformer(segment) or all(port.dtype not in HALF for port in (*segment.inputs, *segment.outputs)):
        return
    attentions = sum(node.op_type == "Attention" for node in model.graph.node)
    gelus = Counter(_gelus(model))
    for what, expected, found in (
        ("attentions in one kernel each", attentions, report.attentions),
        ("GELUs in the kernel of their product", gelus["fused"], report.fused_gelu),
        ("GELUs in the kernel that rounds them", gelus["rounded"], report.rounded_gelu),
        ("GELUs in the kernel that scales their product of 8 bits", gelus["scaled"], report.scaled_gelu),
    ):
        if found != expected:
            yield f"expected {expected} {what}, found {found}"


def _gelus(model: ModelProto) -> Iterator[str]:
    """Where each belongs. An 8-bit product ends before its scales, so that a GELU is never in its kernel."""
    nodes = model.graph.node
    rounded = {node.input[0] for node in nodes if node.op_type == "QuantizeLinear"}
    rounded |= {node.input[0] for node in nodes if node.op_type == "Sub" and node.output[0] in rounded}
    products = {node.output[0] for node in quantised_products(model)}
    sums = {node.output[0] for node in nodes if node.op_type == "Add" and products.intersection(node.input)}
    for node in nodes:
        if node.op_type == "Gelu":
            yield "rounded" if node.output[0] in rounded else "scaled" if node.input[0] in sums else "fused"


def _quantised(model: ModelProto, report: Report) -> Iterator[str]:
    for node in quantised_products(model):
        types = report.gemms.get(node.name or f"node_of_{node.output[0]}", ())
        if len(types) != 2 or types[0] != types[1] or types[0] not in EIGHT_BITS:
            found = " x ".join(types) or "none of that name"
            yield f"expected {node.name} to be a product of 8-bit numbers, found {found}"


def quantised_products(model: ModelProto) -> list[NodeProto]:
    """The products of two factors that were quantised: they must be products of 8-bit numbers in an engine."""
    dequantised = {name for node in model.graph.node if node.op_type == "DequantizeLinear" for name in node.output}
    products = (node for node in model.graph.node if node.op_type in ("MatMul", "Gemm"))
    return [node for node in products if dequantised.issuperset(node.input[:2])]


def _scratch(segment: Segment, model: ModelProto) -> int:
    """Bytes that fused kernels hand to each other, at most: twice the largest row of weights for every token, and once
    what comes in and goes out. An attention that has fallen apart has all its scores besides."""
    ports = (*segment.inputs, *segment.outputs)
    tokens = max(port.shape[0] for port in ports if len(port.shape) == 2)
    widest = max((max(tensor.dims, default=1) for tensor in model.graph.initializer), default=1)
    return SPARE + 2 * 2 * tokens * widest + sum(prod(port.shape) * BYTES[port.dtype] for port in ports)
