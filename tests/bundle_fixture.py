"""Exported models for tests: sources with random weights, and the onnx engine on graphs that were just built."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from onnx import ModelProto
from student_fixture import random_weights

from cfrt.bundle import Segment
from cfrt.config import ModelConfig
from cfrt.engines.chorus import Chorus, ChorusEngine
from cfrt.engines.onnx import CpuDevice, OnnxEngine
from cfrt.engines.twin import widen
from cfrt.weights import part
from export.build import PIXELS, build, norms
from export.draft import key
from export.segments import layout
from export.sources import Source


def source_of(config: ModelConfig, weights: Mapping[str, np.ndarray] | None = None) -> Source:
    weights = random_weights(config) if weights is None else weights
    autoencoder = part(weights, "autoencoder")
    return Source(
        config=config,
        decoder="tiny",
        dit=part(weights, "dit"),
        decodes=autoencoder,
        encodes=autoencoder,
        table=weights["text.table"],
        origin="a test",
    )


def graphs(source: Source, precision: str = "fp32") -> tuple[tuple[Segment, ...], dict[str, ModelProto]]:
    """Segments and their graphs. The autoencoder's are made once for all models that differ elsewhere."""
    segments = layout(source.config, precision, source.decoder)
    weights = key(*(array.tobytes() for array in source.decodes.values()))
    made = {}
    for segment in segments:
        name = (segment, weights if segment.name in PIXELS else None)
        made[segment.name] = _MADE.get(name) or build(segment, source, precision)
        if segment.name in PIXELS:
            _MADE[name] = made[segment.name]
    return segments, made


_MADE: dict[tuple[Segment, str | None], ModelProto] = {}


def onnx_engine(config: ModelConfig, seed: int = 5) -> OnnxEngine:
    """Prepared, in fp32, with `random_weights`."""
    return _connected(OnnxEngine(), config, lambda norms: CpuDevice(config, norms, seed=seed))


def chorus_engine(config: ModelConfig, seeds: Sequence[int]) -> ChorusEngine:
    """The same for several streams."""
    return _connected(ChorusEngine(seeds), config, lambda norms: Chorus(config, norms, seeds))


E = TypeVar("E", bound=OnnxEngine)


def _connected(engine: E, config: ModelConfig, empty: Callable[[Mapping[str, np.ndarray]], CpuDevice]) -> E:
    source = source_of(config)
    segments, made = graphs(source)
    device = empty(norms(source, "fp32"))
    for segment in segments:
        twin = ModelProto()
        twin.CopyFrom(made[segment.name])
        widen(twin)
        device.load(segment, twin.SerializeToString())
    engine.precision = "fp32"
    engine.connect(device, config, segments)
    return engine
