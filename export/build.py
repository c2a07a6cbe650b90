"""The graph of any segment of a source, and the tensors that no graph holds."""

from collections.abc import Iterator, Mapping

import numpy as np
from onnx import ModelProto

from cfrt.bundle import Segment
from cfrt.text import TABLE

from . import pixels, transformer
from .graph import rounded
from .quantize import FORMATS, is_quantised, value_scales
from .segments import activations
from .sources import Source, Tensors, shapes_of

PIXELS = ("decoder", "decoder_start", "encoder")
ENCODING, DECODING = ("encoder.", "conv1."), ("decoder.", "conv2.")
"""How the names of an autoencoder's tensors begin that only one way needs."""


def build(segment: Segment, source: Source, precision: str) -> ModelProto:
    """Checked. ExportError when a weight is not finite in the format of the graph."""
    tensors = tensors_of(segment, source)
    if segment.name in PIXELS:
        return pixels.build(segment, source.config, tensors, source.decoder)
    return transformer.build(segment, source.config, tensors, precision, source.ranges)


def tensors_of(segment: Segment, source: Source) -> Tensors:
    """What a segment may read: of the transformer no more than it does, so that a hash over them is the segment's."""
    if segment.name == "encoder":
        assert source.encodes is not None
        return source.encodes
    if segment.name in PIXELS:
        return source.decodes
    return Chosen(source.dit, transformer.reads(segment, source.config))


class Chosen(Mapping[str, np.ndarray]):
    """Some of the tensors of another mapping, which are still read when they are asked for."""

    def __init__(self, tensors: Tensors, names: list[str]) -> None:
        self._tensors, self._names = tensors, dict.fromkeys(names)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def outside(source: Source, precision: str) -> dict[str, np.ndarray]:
    """Everything that no graph holds: the norms of the kernels between them, the scales of the values in a ring of 8
    bits, and the model's own rows of text."""
    table = {} if source.table is None else {TABLE: np.asarray(source.table, dtype=np.float32)}
    scales = {"v_scale": value_scales(source.ranges, source.config)} if precision in FORMATS else {}
    return norms(source, precision) | scales | table


def norms(source: Source, precision: str) -> dict[str, np.ndarray]:
    """`norm_q` and `norm_k` [layers, d] of self-attention, fp32, rounded as the graphs' weights are."""
    layers = [f"blocks.{i}.self_attn" for i in range(source.config.depth)]
    act = activations(precision)
    return {
        name: np.stack([rounded(source.dit[f"{layer}.{name}.weight"], act) for layer in layers])
        for name in ("norm_q", "norm_k")
    }


def eight_bits(segment: Segment, source: Source, precision: str) -> int:
    """How many of its numbers are held in 8 bits."""
    names = transformer.reads(segment, source.config) if segment.name not in PIXELS else []
    known = shapes_of(source.dit)
    return sum(int(np.prod(known[name])) for name in names if is_quantised(name, precision))


def numbers(segment: Segment, source: Source) -> int:
    """How many a segment's graph holds."""
    known = shapes_of(source.dit)
    names = transformer.reads(segment, source.config) if segment.name not in PIXELS else []
    if segment.name == "encoder":
        assert source.encodes is not None
        known = shapes_of(source.encodes)
        names = [name for name in known if not name.startswith(DECODING)]
    elif segment.name in PIXELS:
        known = shapes_of(source.decodes)
        names = [name for name in known if not name.startswith(ENCODING)]
    return sum(int(np.prod(known[name])) for name in names)
