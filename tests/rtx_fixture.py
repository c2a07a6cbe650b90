"""Small graphs for TensorRT-RTX, made without PyTorch: each is built in about a tenth of a second."""

from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, parser

KINDS = {"bfloat16": TensorProto.BFLOAT16, "float16": TensorProto.FLOAT16, "float": TensorProto.FLOAT}
QUANTISED = {"float8e4m3fn": TensorProto.FLOAT8E4M3FN, "int8": TensorProto.INT8}


def graph(text: str, *, opset: int = 24, functions: str = "", domain: str = "") -> ModelProto:
    """`text` as `(float[4] x) => (float[4] y) { y = Relu(x) }`."""
    return parser.parse_model(f'<ir_version: 11, opset_import: ["" : {opset}{domain}]> g {text} {functions}')


def save(model: ModelProto, folder: Path, name: str) -> Path:
    path = folder / f"{name}.onnx"
    onnx.save(model, str(path))
    return path


def feed_forward(dtype: str = "bfloat16", tokens: int = 64, d: int = 64, ffn: int = 128) -> ModelProto:
    """Two products with a GELU between, with weights."""
    model = graph(f"""({dtype}[{tokens},{d}] x) => ({dtype}[{tokens},{d}] y) {{
        a = MatMul(x, w1)  b = Add(a, b1)  c = Gelu<approximate="tanh">(b)  e = MatMul(c, w2)  y = Add(e, b2) }}""")
    numbers = np.random.default_rng(0)
    for name, shape in {"w1": (d, ffn), "b1": (ffn,), "w2": (ffn, d), "b2": (d,)}.items():
        values = numbers.normal(size=int(np.prod(shape)))
        model.graph.initializer.append(helper.make_tensor(name, KINDS[dtype], shape, values))
    return model


def attention(dtype: str = "bfloat16", keys: int = 128) -> ModelProto:
    """Two heads of 64, which fused kernels take in half precision."""
    kv = f"{dtype}[1,2,{keys},64]"
    return graph(f"({dtype}[1,2,64,64] q, {kv} k, {kv} v) => ({dtype}[1,2,64,64] y) {{ y = Attention(q, k, v) }}")


def quantised(kind: str, tokens: int = 64, d: int = 64, n: int = 128) -> ModelProto:
    """A product of 8-bit numbers in bf16 surroundings, by QuantizeLinear and DequantizeLinear."""
    model = graph(f"""(bfloat16[{tokens},{d}] x) => (bfloat16[{tokens},{n}] y) {{
        xq = QuantizeLinear(x, xs, xz)  xd = DequantizeLinear(xq, xs, xz)
        wd = DequantizeLinear<axis = 1>(wq, ws, wz)  y = MatMul(xd, wd) }}""")
    weights = np.random.default_rng(0).integers(0, 100, d * n, dtype=np.int8).tobytes()
    for tensor in (
        helper.make_tensor("xs", TensorProto.BFLOAT16, [], [0.05]),
        helper.make_tensor("ws", TensorProto.BFLOAT16, [n], [0.01] * n),
        helper.make_tensor("xz", QUANTISED[kind], [], b"\0", raw=True),
        helper.make_tensor("wz", QUANTISED[kind], [n], bytes(n), raw=True),
        helper.make_tensor("wq", QUANTISED[kind], [d, n], weights, raw=True),
    ):
        model.graph.initializer.append(tensor)
    return model
