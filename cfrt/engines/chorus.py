"""Many streams of one bundle in step, on a CPU: every graph of the transformer runs once for all of them.

A small model's graphs cost almost as much for one stream as for sixty, since most of it is to fetch and widen weights.
So whoever wants many clips and none of them soon, such as an evaluation, plays them together. The graphs are the
bundle's own, with the ports told of more rows; rings, text and decoders are each stream's.

Where a bundle says that its ring is of 8 bits on a GPU, this one rounds as that does: queries, keys and values, not the
probabilities between them.

Legend: B streams, M tokens of a unit, L text rows.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from onnx import ModelProto

from _cfrt import Noise, kernels

from ..bundle import OUT, Segment
from ..config import ModelConfig
from ..flow import TIME_SCALE, descent, onward
from ..noise import Purpose
from . import Spec
from .granules import as_held, queries_as_held
from .onnx import CpuDevice, OnnxEngine, Tensors


class ChorusEngine(OnnxEngine):
    """Latents are float32 arrays [B, F, C, h, w], text rows [B, L, width], pixels [f, B, H, W, 3]."""

    def __init__(self, seeds: Sequence[int]) -> None:
        self._seeds = seeds

    def _empty(self, spec: Spec, threads: int) -> CpuDevice:
        return Chorus(spec.config, spec.weights, self._seeds, threads=threads)

    def play(self, units: int) -> Iterator[np.ndarray]:
        """The streams from their start: pixels of unit after unit."""
        config = self._config
        for unit in range(units):
            x = self.noise(unit, 0)
            for step, (s, s_next) in enumerate(descent(config.unit_steps(unit), config.shift), 1):
                x0 = self.denoise(x, TIME_SCALE * s, unit)
                x = onward(config.solver, x, x0, s, s_next, partial(self.noise, unit, step))
            yield self.decode(x)
            self.commit(x, unit)


class Chorus(CpuDevice):
    """Buffers of all streams, one below the other; those of pixels have a dimension more for them."""

    def __init__(self, config: ModelConfig, tensors: Tensors, seeds: Sequence[int], *, threads: int = 1) -> None:
        super().__init__(config, tensors, seed=seeds[0], threads=threads)
        self._seeds = seeds
        self._scales: np.ndarray | None = None
        if "v_scale" in tensors:
            self._scales = np.ones((config.depth, config.heads, self._head.stored), np.float32)
            self._scales[..., : config.head_dim] = tensors["v_scale"].reshape(config.depth, config.heads, -1)
        self._others = [self._new_ring() for _ in seeds[1:]]

    def load(self, segment: Segment, graph: bytes) -> None:
        apart = _apart(segment)
        super().load(segment, graph if apart else _for_any_number(graph))
        if apart:
            self.buffers |= {p.name: np.zeros((len(self._seeds), *p.shape), np.float32) for p in segment.outputs}

    def put(self, name: str, value: np.ndarray, frame: int | None = None) -> None:
        if value.ndim == 5:  # latents
            value = value.reshape(-1, *value.shape[2:]) if frame is None else value[:, frame]
        self.buffers[name] = value

    def open(self, unit: int) -> None:
        """Rings in step have the same plan. The first one is the engine's; what it has committed, so do the others."""
        super().open(unit)
        for ring in self._others:
            if ring.next_frame < self.ring.next_frame:
                ring.commit(ring.next_frame // self.config.unit)
            ring.open(unit)

    def run(self, segment: str) -> None:
        description, session = self._sessions[segment]
        if not _apart(description):
            super().run(segment)
            return
        names = [port.name for port in description.outputs]
        made = [
            session.run([OUT + name for name in names], {p.name: self.buffers[p.name][i] for p in description.inputs})
            for i in range(len(self._seeds))
        ]
        for name, parts in zip(names, zip(*made, strict=True), strict=True):  # text: [layers, B L, d]
            self.buffers[name] = np.concatenate(parts, axis=1) if segment == "text_kv" else np.stack(parts)

    def append(self, layer: int) -> None:
        _, k, v = self._heads()
        if self._scales is None:
            for ring, *rows in zip(self._rings(), self._each(k), self._each(v), strict=True):
                self._remember(ring, layer, *rows)
            return
        k, v = self._held(np.concatenate([self._turned(layer, rows) for rows in self._each(k)]), v, self._scales[layer])
        for ring, *rows in zip(self._rings(), self._each(k), self._each(v), strict=True):
            kernels.append(ring.layer(layer), self._place, *rows, threads=self._pool)

    def _turned(self, layer: int, k: np.ndarray) -> np.ndarray:
        """A stream's keys, normed and turned as an append does it."""
        weight = self._head.norm(self._norms["norm_k"][layer])
        return kernels.queries(
            k, self.config.heads, weight=weight, eps=self._head.eps, turn=self._turn, threads=self._pool
        )[0]

    def _held(self, k: np.ndarray, v: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of keys and values, frame by frame as a ring of 8 bits holds them; zeros stay zeros."""
        frames = (-1, self.config.frame_tokens, self.config.heads, self._head.stored)
        keys, values = as_held(k.reshape(frames), v.reshape(frames), scales)
        return keys.reshape(k.shape), values.reshape(v.shape)

    def attend(self, layer: int) -> None:
        queries = self._each(self._heads()[0])
        found = [self._found(ring, layer, q) for ring, q in zip(self._rings(), queries, strict=True)]
        self.buffers["attended"] = self._head.taken(np.concatenate(found))

    def _queries(self, layer: int, q: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        near, far = super()._queries(layer, q)
        if self._scales is None:
            return near, far
        return self._rounded(near), None if far is None else self._rounded(far)

    def _rounded(self, q: np.ndarray) -> np.ndarray:
        return queries_as_held(q.reshape(len(q), self.config.heads, -1)).reshape(q.shape)

    def noise(self, unit: int, step: int) -> np.ndarray:
        config = self.config
        shape = (config.unit, config.latent_channels, *config.latent_grid)
        streams = (Noise(seed, unit, step, Purpose.SAMPLE) for seed in self._seeds)
        return np.stack([stream.normal(int(np.prod(shape))).reshape(shape) for stream in streams])

    def estimate(self, latents: np.ndarray, s: float) -> np.ndarray:
        self.buffers["velocity"] = self.buffers["velocity"].reshape(latents.shape)
        return super().estimate(latents, s)[0]

    def pixels(self, skip: int) -> np.ndarray:
        video = self.buffers["video"][:, skip:].clip(0, 1) * 255
        return video.round().astype(np.uint8).transpose(1, 0, 3, 4, 2)

    def _rings(self) -> list[kernels.Ring]:
        return [self.ring, *self._others]

    def _each(self, rows: np.ndarray) -> list[np.ndarray]:
        return np.split(rows, len(self._seeds))


def _apart(segment: Segment) -> bool:
    """Does every stream run it by itself? Text once a clip, and pixels, whose graphs are made for one."""
    return segment.name == "text_kv" or segment.kind.startswith(("decoder", "encoder"))


def _for_any_number(graph: bytes) -> bytes:
    """The same graph, the rows of its ports left open."""
    model = ModelProto.FromString(graph)
    for port in (*model.graph.input, *model.graph.output):
        port.type.tensor_type.shape.dim[0].ClearField("dim_value")
    any_number: bytes = model.SerializeToString()
    return any_number
