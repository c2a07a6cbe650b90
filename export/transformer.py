"""The graphs of the transformer: `text_kv`, `head`, `mid_i`, `tail`. The layers are those of cfrt/nn/layers.py.

Modulation is one vector for all tokens, as a unit has one time; so a modulated norm is one LayerNormalization whose
scale and shift are computed. Tensors of the model are named as Wan names them.

No node knows how many streams there are: the same graph takes the tokens of several side by side, all at one time, once
its ports are told so (`cfrt.engines.chorus`).

Legend: M tokens of a unit, d width, L text rows.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from onnx import ModelProto

from cfrt.bundle import Segment
from cfrt.config import ModelConfig

from .graph import Graph, Value
from .quantize import Ranges
from .segments import activations, between

SHIFT, SCALE, GATE = range(3)
"""Rows of a modulation: three for self-attention, three for the feed-forward."""


def build(
    segment: Segment,
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    precision: str,
    ranges: Ranges | None = None,
) -> ModelProto:
    """The graph of one segment. `weights`: the DiT's tensors by Wan's names; only those of this segment are asked.
    `ranges`: those of the inputs of its products, in 8 bits."""
    graph = Graph(segment, weights, activations(precision), config.eps, precision, ranges)
    made = {"text_kv": _text_kv, "head": _head, "mid": _mid, "tail": _tail}[segment.kind]
    return graph.finish(made(graph, config))


def reads(segment: Segment, config: ModelConfig) -> list[str]:
    """The names of the tensors that a segment's graph is made of."""
    last = config.depth - 1
    if segment.kind == "text_kv":
        layers = [f"blocks.{i}.cross_attn.{part}" for i in range(config.depth) for part in ("k", "v")]
        norms = [f"blocks.{i}.cross_attn.norm_k.weight" for i in range(config.depth)]
        return [*_parameters("text_embedding.0", "text_embedding.2", *layers), *norms]
    if segment.kind == "head":
        outer = ("patch_embedding", "time_embedding.0", "time_embedding.2", "time_projection.1")
        return [*_parameters(*outer), *_reads_first(0)]
    if segment.kind == "mid":
        layer = _layer_of(segment)
        return [*_reads_rest(layer), *_reads_first(layer + 1)]
    return [*_reads_rest(last), "head.modulation", *_parameters("head.head")]


def _reads_first(layer: int) -> list[str]:
    block = f"blocks.{layer}"
    return [f"{block}.modulation", *_parameters(*(f"{block}.self_attn.{part}" for part in "qkv"))]


def _reads_rest(layer: int) -> list[str]:
    block = f"blocks.{layer}"
    parts = ("self_attn.o", "norm3", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2")
    single = [f"{block}.modulation", f"{block}.cross_attn.norm_q.weight"]
    return [*single, *_parameters(*(f"{block}.{part}" for part in parts))]


def _parameters(*layers: str) -> list[str]:
    return [f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")]


def _layer_of(segment: Segment) -> int:
    return int(segment.name.rpartition("_")[2])


# ---------------------------------------------------------------------- segments


def _text_kv(graph: Graph, config: ModelConfig) -> dict[str, Value]:
    """All layers at once: [L, d] times [d, layers d], normed over each layer's own d."""
    x = graph.linear(graph.cast("rows", graph.dtype), "text_embedding.0")
    x = graph.linear(graph.op("Gelu", x, approximate="tanh"), "text_embedding.2")
    blocks = [f"blocks.{i}.cross_attn" for i in range(config.depth)]
    k, v = (graph.linear(x, *(f"{block}.{name}" for block in blocks)) for name in "kv")
    split = (config.text.length, config.depth, config.width)
    k, v = graph.reshape(k, *split), graph.reshape(v, *split)
    plain = graph.constant("ones", np.ones(config.width, np.float32))
    weight = graph.stacked("norm_k", [f"{block}.norm_k.weight" for block in blocks])
    k = graph.op("Mul", graph.rms_norm(k, plain), weight)
    return {name: graph.op("Transpose", x, perm=[1, 0, 2]) for name, x in (("text_k", k), ("text_v", v))}


def _head(graph: Graph, config: ModelConfig) -> dict[str, Value]:
    embedding = graph.linear(graph.cast("time", graph.dtype), "time_embedding.0")
    embedding = graph.linear(graph.silu(embedding), "time_embedding.2")
    modulation = graph.reshape(graph.linear(graph.silu(embedding), "time_projection.1"), 6, config.width)
    x = graph.linear(_patches(graph, config), "patch_embedding")
    qkv = _projections(graph, config, 0, x, modulation)
    return {"x": x, "qkv": qkv, "modulation": modulation, "embedding": embedding}


def _mid(graph: Graph, config: ModelConfig) -> dict[str, Value]:
    layer = _layer_of(graph.segment)
    x = _layer(graph, config, layer)
    return {"x": x, "qkv": _projections(graph, config, layer + 1, x, "modulation")}


def _tail(graph: Graph, config: ModelConfig) -> dict[str, Value]:
    x = _layer(graph, config, config.depth - 1)
    table = graph.op("Add", "embedding", graph.weight("head.modulation", -1, config.width))  # [2, d]
    y = graph.linear(_modulated(graph, x, table, 0, ["head.head"]), "head.head")
    return {"velocity": graph.cast(_unpatched(graph, config, y), "fp32")}


# ---------------------------------------------------------------------- parts


def _projections(graph: Graph, config: ModelConfig, layer: int, x: Value, modulation: Value) -> Value:
    """[M, 3 d]: q, k and v of a layer's self-attention."""
    block = f"blocks.{layer}"
    table = graph.op("Add", modulation, graph.weight(f"{block}.modulation", -1, config.width))
    layers = [f"{block}.self_attn.{name}" for name in "qkv"]
    qkv = graph.linear(_modulated(graph, x, table, 0, layers), *layers)
    return _converted(graph, qkv, between(graph.dtype))


def _layer(graph: Graph, config: ModelConfig, layer: int) -> Value:
    """The rest of a layer, from what its self-attention has found on."""
    block = f"blocks.{layer}"
    table = graph.op("Add", "modulation", graph.weight(f"{block}.modulation", -1, config.width))
    a = graph.linear(_converted(graph, "attended", graph.dtype), f"{block}.self_attn.o")
    x = graph.op("Add", "x", graph.op("Mul", a, _row(graph, table, GATE)))
    a = _normed(graph, x, f"{block}.norm3", f"{block}.cross_attn.q")
    x = graph.op("Add", x, _cross_attention(graph, config, f"{block}.cross_attn", a))
    a = graph.linear(_modulated(graph, x, table, 3, [f"{block}.ffn.0"]), f"{block}.ffn.0")
    a = graph.linear(graph.op("Gelu", a, approximate="tanh"), f"{block}.ffn.2")
    return graph.op("Add", x, graph.op("Mul", a, _row(graph, table, 3 + GATE)))


def _cross_attention(graph: Graph, config: ModelConfig, layer: str, x: Value) -> Value:
    q = graph.rms_norm(graph.linear(x, f"{layer}.q"), graph.weight(f"{layer}.norm_q.weight"))
    tokens, length, width = config.unit * config.frame_tokens, config.text.length, config.width
    rows = ((q, tokens), ("text_k", length), ("text_v", length))
    heads = {"q_num_heads": config.heads, "kv_num_heads": config.heads}
    streams = [graph.reshape(value, -1, count, width) for value, count in rows]
    y = graph.op("Attention", *streams, name=f"{layer}.attention", **heads)
    return graph.linear(graph.reshape(y, -1, width), f"{layer}.o")


def _modulated(graph: Graph, x: Value, table: Value, first: int, layers: Sequence[str]) -> Value:
    """LN(x) (1 + scale) + shift, by the rows of a modulation from `first` on, as the input of these layers."""
    scale = graph.op("Add", _row(graph, table, first + SCALE), graph.constant("one", np.ones(1, np.float32)))
    shift = _row(graph, table, first + SHIFT)
    factors = graph.inverse_factors(*layers)
    if factors is not None:
        even = graph.constant(f"{layers[0]}.inverse_factors", factors)
        scale, shift = graph.op("Mul", scale, even), graph.op("Mul", shift, even)
    return graph.layer_norm(x, scale, graph.less_offset(shift, *layers))


def _normed(graph: Graph, x: Value, norm: str, layer: str) -> Value:
    """LN(x) with its own weight and bias, as the input of a layer."""
    factors = graph.inverse_factors(layer)
    scale, shift = (graph.weight(f"{norm}.{kind}", factors=factors) for kind in ("weight", "bias"))
    return graph.layer_norm(x, scale, graph.less_offset(shift, layer))


def _converted(graph: Graph, x: Value, dtype: str) -> Value:
    """What goes to the host's kernels or comes from them, where they have another format."""
    return x if between(graph.dtype) == graph.dtype else graph.cast(x, dtype)


def _row(graph: Graph, table: Value, row: int) -> Value:
    return graph.op("Gather", table, graph.constant(f"row_{row}", np.array(row, dtype=np.int64)), axis=0)


def _patches(graph: Graph, config: ModelConfig) -> Value:
    """[M, C ph pw] of latents [F, C, h, w]."""
    (rows, columns), (_, ph, pw) = config.token_grid, config.patch
    x = graph.cast("latents", graph.dtype)
    x = graph.reshape(x, -1, config.latent_channels, rows, ph, columns, pw)
    x = graph.op("Transpose", x, perm=[0, 2, 4, 1, 3, 5])
    return graph.reshape(x, -1, config.patch_width)


def _unpatched(graph: Graph, config: ModelConfig, y: Value) -> Value:
    """Latents [F, C, h, w] of [M, ph pw C]: channels run fastest, as Wan has it."""
    (rows, columns), (_, ph, pw) = config.token_grid, config.patch
    y = graph.reshape(y, -1, rows, columns, ph, pw, config.latent_channels)
    y = graph.op("Transpose", y, perm=[0, 5, 1, 3, 2, 4])
    return graph.reshape(y, -1, config.latent_channels, *config.latent_grid)
