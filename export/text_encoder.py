"""umT5's encoder (arXiv:2304.09151) as an ONNX graph with int8 weights, for the CPU beside the GPU that denoises.

A weight is int8 with one scale for each output, made fp32 again right before its product: the weights of 5.7 billion
parameters take 5.7 GB of disk and memory, and activations, whose outliers T5 is known for, keep fp32. Tensors are read,
rounded and written one at a time into one file beside the graph.

Legend: n tokens of a prompt, d width, H heads, D numbers a head.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from cfrt.checkpoint import open_checkpoint, read_torch
from cfrt.config import TextConfig
from cfrt.errors import ExportError, WeightsError
from cfrt.exported_text import session
from cfrt.text import OFFICIAL_WEIGHTS, TOKENIZER_PLACES, WEIGHTS_PLACES
from cfrt.weights import match_shapes, umt5_from_official

from .draft import Draft, key, write_bytes
from .graph import IR_VERSION, OPSET
from .sources import Lazy, Tensors

FOLDER = "text"
GRAPH, DATA, TOKENIZER = f"{FOLDER}/encoder.onnx", f"{FOLDER}/encoder.data", f"{FOLDER}/tokenizer.json"
LEVELS = 127
EXACT = 1e-4
"""Relative error (L2) of the graph against the same arithmetic in PyTorch."""
SMALL = 1 << 30
"""Bytes of weights up to which that is asked."""
ALIGNED = 4096
"""Bytes that a tensor in the file of weights starts at a multiple of, so that it can be mapped."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What transformers' UMT5Config calls by these names."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Of UMT5EncoderModel, its two names for the words once."""
        d, inner = self.d_model, self.num_heads * self.d_kv
        shapes: dict[str, tuple[int, ...]] = {"shared.weight": (self.vocab_size, d)}
        for i in range(self.num_layers):
            attention, feed = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
            shapes |= {f"{attention}.SelfAttention.{name}.weight": (inner, d) for name in "qkv"}
            shapes[f"{attention}.SelfAttention.o.weight"] = (d, inner)
            buckets = (self.relative_attention_num_buckets, self.num_heads)
            shapes[f"{attention}.SelfAttention.relative_attention_bias.weight"] = buckets
            shapes |= {f"{feed}.DenseReluDense.{name}.weight": (self.d_ff, d) for name in ("wi_0", "wi_1")}
            shapes[f"{feed}.DenseReluDense.wo.weight"] = (d, self.d_ff)
            shapes |= {f"{part}.layer_norm.weight": (d,) for part in (attention, feed)}
        return shapes | {"encoder.final_layer_norm.weight": (d,)}


@dataclass(frozen=True, kw_only=True)
class TextEncoder:
    """An encoder and its tokenizer, found and checked."""

    shape: Shape
    length: int
    tensors: Tensors
    tokenizer: Path

    @property
    def bytes(self) -> int:
        """About what it takes in a bundle."""
        return sum(math.prod(shape) for shape in self.shape.tensors().values())

    def make(self, draft: Draft) -> str:
        """Its files in a bundle's draft; gives their folder."""
        content = key(repr(self.shape), str(self.length), *_fingerprint(self.tensors))
        draft.make(DATA, content, self._write)
        graph = build(self.shape, self.length)
        written = {GRAPH: graph.SerializeToString(deterministic=True), TOKENIZER: self.tokenizer.read_bytes()}
        for name, data in written.items():
            draft.make(name, key(data), partial(write_bytes, data))
        return FOLDER

    def check(self, folder: Path) -> dict[str, Any]:
        """How far the encoder in a bundle's folder was verified, and with what result. ExportError when it is wrong.

        Small ones against `transformers`, in fp32 with the same rounded weights; one of several gigabytes, which would
        take four times its size in memory, only for finite rows, and any where that library is not installed."""
        ids = np.arange(min(16, self.length, self.shape.vocab_size))
        (rows,) = session(folder / GRAPH).run(["rows"], {"ids": ids})
        if not np.isfinite(rows).all():
            raise ExportError("verification failed: the text encoder gives rows that are not finite")
        if self.bytes > SMALL or find_spec("transformers") is None:
            return {"level": "finite rows"}
        expected = reference(self.shape, self.tensors, ids)
        error = float(np.linalg.norm(rows - expected) / np.linalg.norm(expected))
        if not error <= EXACT:
            raise ExportError(f"verification failed: the text encoder is off by {error:.3g} (at most {EXACT:g})")
        return {"level": "rows", "error": float(f"{error:.3g}"), "limit": EXACT}

    def _write(self, path: Path) -> None:
        with path.open("wb") as file:
            for name, array in _stored(self.shape, self.tensors):
                offset, _ = places(self.shape)[name]
                file.write(b"\0" * (offset - file.tell()))
                file.write(np.ascontiguousarray(array).tobytes())


def find(folder: Path, config: TextConfig) -> TextEncoder:
    """umT5 in `folder`, in the layout of either release. WeightsError when a file is missing or damaged, or it is not
    the encoder that the model reads; ExportError for a relative of umT5 that this cannot export."""
    if config.kind != "umt5":
        raise ExportError("this model reads prompts through its own table: leave --text-encoder out")
    weights = next((folder / place for place in WEIGHTS_PLACES if (folder / place).is_file()), None)
    tokenizer = next((folder / place for place in TOKENIZER_PLACES if (folder / place).is_file()), None)
    if weights is None or tokenizer is None:
        places = WEIGHTS_PLACES if weights is None else TOKENIZER_PLACES
        raise WeightsError(f"expected {' or '.join(places)} in {folder}")
    if weights.name == OFFICIAL_WEIGHTS:
        from cfrt.nn.umt5 import XXL

        sizes: dict[str, Any] = dict(XXL)
        shape, state = Shape(**sizes), {umt5_from_official(name): x for name, x in read_torch(weights).items()}
        tensors = Lazy({n: tuple(x.shape) for n, x in state.items()}, lambda n: state[n].float().numpy())
    else:
        shape, opened = _shape(weights), open_checkpoint(weights.parent)
        tensors = Lazy(opened.shapes, lambda n: opened.tensor(n).float().numpy())
    found = {name: shape for name, shape in tensors.shapes.items() if name != "encoder.embed_tokens.weight"}
    match_shapes(shape.tensors(), found)
    if shape.d_model != config.width:
        raise WeightsError(f"expected a text encoder of width {config.width}, got {shape.d_model} in {folder}")
    return TextEncoder(shape=shape, length=config.length, tensors=tensors, tokenizer=tokenizer)


def _shape(path: Path) -> Shape:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        shape = Shape(**{name: said[name] for name in Shape.__dataclass_fields__ if name in said})
    except (OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{path} does not describe umT5 ({error}); fetch it again") from error
    if shape.feed_forward_proj != "gated-gelu":
        raise ExportError(f"expected a feed-forward of gated-gelu in {path}, got {shape.feed_forward_proj!r}")
    return shape


# ---------------------------------------------------------------------- weights


def quantised(weight: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 of the same shape and fp32 scales along `axis`, by the largest number of each row; zeros stay zeros."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.abs(weight).max(axis=others, keepdims=True) / np.float32(LEVELS)
    scale[scale == 0] = 1
    return np.rint(weight / scale).astype(np.int8), scale.reshape(-1).astype(np.float32)


def _stored(shape: Shape, tensors: Tensors) -> Iterator[tuple[str, np.ndarray]]:
    """Every array of the file of weights, in its order."""
    for name, size in shape.tensors().items():
        if not _is_large(name, size):
            yield name, np.asarray(tensors[name], dtype=np.float32)
        elif name == "shared.weight":
            yield from zip((name, f"{name}.scale"), quantised(tensors[name], 0), strict=True)
        else:
            values, scale = quantised(tensors[name], 0)
            yield from ((name, values.T), (f"{name}.scale", scale))


def _is_large(name: str, size: tuple[int, ...]) -> bool:
    return len(size) == 2 and "bias" not in name


def places(shape: Shape) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Where each array of the file of weights starts, and its shape there; products want [in, out]."""
    found: dict[str, tuple[int, tuple[int, ...]]] = {}
    end = 0
    for name, size in shape.tensors().items():
        large = _is_large(name, size)
        own = size if not large or name == "shared.weight" else size[::-1]
        for part, dims, width in [(name, own, 1 if large else 4)] + ([(f"{name}.scale", size[:1], 4)] if large else []):
            start = -(-end // ALIGNED) * ALIGNED
            found[part] = (start, dims)
            end = start + width * math.prod(dims)
    return found


def _fingerprint(tensors: Tensors) -> Iterator[bytes | str]:
    for name in sorted(tensors):
        yield name
        yield np.ascontiguousarray(tensors[name]).tobytes()


def reference(shape: Shape, tensors: Tensors, ids: np.ndarray) -> np.ndarray:
    """Rows [n, d] by `transformers`, with the weights that the graph holds, in fp32."""
    import torch
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        model = UMT5EncoderModel(UMT5Config(**asdict(shape)))
    state = {name: torch.from_numpy(np.array(_rounded(name, tensors[name]))) for name in shape.tensors()}
    state["encoder.embed_tokens.weight"] = state["shared.weight"]
    model.load_state_dict(state, assign=True)
    with torch.inference_mode():
        rows: np.ndarray = model.eval()(input_ids=torch.from_numpy(ids)[None]).last_hidden_state[0].numpy()
    return rows


def _rounded(name: str, array: np.ndarray) -> np.ndarray:
    if not _is_large(name, array.shape):
        return array
    values, scale = quantised(array, 0)
    return values * scale[:, None]


# ---------------------------------------------------------------------- the graph


def build(shape: Shape, length: int) -> ModelProto:
    """From `ids` int64 [n], n <= `length`, to `rows` fp32 [n, d]. The weights are in DATA, beside it."""
    return _Graph(shape, length).model()


class _Graph:
    """Nodes in the order in which they are made; values carry their nodes' names."""

    def __init__(self, shape: Shape, length: int) -> None:
        self.shape, self.places = shape, places(shape)
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, TensorProto] = {}
        self._table = bucket_table(shape, length)

    def model(self) -> ModelProto:
        x = self._words()
        bucket = self._buckets()
        for i in range(self.shape.num_layers):
            x = self._attention(x, bucket, f"encoder.block.{i}.layer.0")
            x = self._feed_forward(x, f"encoder.block.{i}.layer.1")
        self._op("Identity", self._norm(x, "encoder.final_layer_norm.weight"), value="rows")
        ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
        rows = helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", self.shape.d_model])
        graph = helper.make_graph(self._nodes, "umt5", [ids], [rows], list(self._constants.values()))
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="cfrt")

    # ------------------------------------------------------------------ layers

    def _words(self) -> str:
        """[n, d]: rows of the table, made fp32 after they are picked."""
        picked = self._op("Cast", self._op("Gather", self._weight("shared.weight"), "ids"), to=TensorProto.FLOAT)
        scale = self._op("Gather", self._weight("shared.weight.scale"), "ids")
        return self._op("Mul", picked, self._op("Unsqueeze", scale, self._integers(1)))

    def _buckets(self) -> str:
        """int64 [n, n]: the bucket of key - query, for every query and key."""
        n = self._op("Squeeze", self._op("Shape", "ids"))
        place = self._op("Range", self._scalar(0), n, self._scalar(1))
        keys, queries = (self._op("Unsqueeze", place, self._integers(axis)) for axis in (0, 1))
        offset = self._op("Add", self._op("Sub", keys, queries), self._scalar(len(self._table) // 2))
        return self._op("Gather", self._constant("bucket_of", self._table), offset)

    def _attention(self, x: str, bucket: str, layer: str) -> str:
        """Unscaled, with a bias by distance that each layer has of its own (umT5)."""
        normed, heads = self._norm(x, f"{layer}.layer_norm.weight"), self.shape.num_heads
        split = self._integers(-1, heads, self.shape.d_kv)
        q, k, v = (
            self._op("Reshape", self._linear(normed, f"{layer}.SelfAttention.{name}.weight"), split) for name in "qkv"
        )
        q, k, v = (self._op("Transpose", x, perm=perm) for x, perm in ((q, (1, 0, 2)), (k, (1, 2, 0)), (v, (1, 0, 2))))
        bias = self._op("Gather", self._weight(f"{layer}.SelfAttention.relative_attention_bias.weight"), bucket)
        scores = self._op("Add", self._op("MatMul", q, k), self._op("Transpose", bias, perm=(2, 0, 1)))
        y = self._op("MatMul", self._op("Softmax", scores, axis=-1), v)  # [H, n, D]
        joined = self._op(
            "Reshape", self._op("Transpose", y, perm=(1, 0, 2)), self._integers(-1, heads * self.shape.d_kv)
        )
        return self._op("Add", x, self._linear(joined, f"{layer}.SelfAttention.o.weight"))

    def _feed_forward(self, x: str, layer: str) -> str:
        normed = self._norm(x, f"{layer}.layer_norm.weight")
        gate, wide = (self._linear(normed, f"{layer}.DenseReluDense.wi_{i}.weight") for i in range(2))
        y = self._op("Mul", self._op("Gelu", gate, approximate="tanh"), wide)
        return self._op("Add", x, self._linear(y, f"{layer}.DenseReluDense.wo.weight"))

    def _linear(self, x: str, name: str) -> str:
        weight = self._op("DequantizeLinear", self._weight(name), self._weight(f"{name}.scale"), axis=1)
        return self._op("MatMul", x, weight)

    def _norm(self, x: str, name: str) -> str:
        return self._op("RMSNormalization", x, self._weight(name), axis=-1, epsilon=self.shape.layer_norm_epsilon)

    # ------------------------------------------------------------------ nodes

    def _op(self, kind: str, *inputs: str, value: str | None = None, **attributes: Any) -> str:
        value = value or f"{kind.lower()}_{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, list(inputs), [value], name=value, **attributes))
        return value

    def _weight(self, name: str) -> str:
        """A tensor that lies in the file of weights."""
        if name not in self._constants:
            offset, dims = self.places[name]
            whole = name.endswith(".scale") or not _is_large(name, dims)
            tensor = TensorProto(name=name, data_type=TensorProto.FLOAT if whole else TensorProto.INT8, dims=dims)
            tensor.data_location = TensorProto.EXTERNAL
            size = (4 if whole else 1) * math.prod(dims)
            for said, number in (("location", Path(DATA).name), ("offset", offset), ("length", size)):
                tensor.external_data.add(key=said, value=str(number))
            self._constants[name] = tensor
        return name

    def _constant(self, name: str, array: np.ndarray) -> str:
        self._constants.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def _integers(self, *values: int) -> str:
        return self._constant(f"list_{'_'.join(map(str, values))}", np.array(values, dtype=np.int64))

    def _scalar(self, number: int) -> str:
        return self._constant(f"number_{number}", np.array(number, dtype=np.int64))


def bucket_table(shape: Shape, length: int) -> np.ndarray:
    """int64 [2 length - 1]: T5's bucket of each offset key - query from 1 - length on (arXiv:1910.10683, section 2.1):
    half of them for keys ahead; near offsets one each, farther ones in steps that grow, up to the largest distance."""
    half = shape.relative_attention_num_buckets // 2
    exact = half // 2
    offset = np.arange(1 - length, length)
    distance = np.abs(offset)
    steps = np.log(np.maximum(distance, 1).astype(np.float32) / exact) / np.float32(
        math.log(shape.relative_attention_max_distance / exact)
    )
    far = np.minimum(exact + (steps * (half - exact)).astype(np.int64), half - 1)
    return np.where(distance < exact, distance, far) + half * (offset > 0)
