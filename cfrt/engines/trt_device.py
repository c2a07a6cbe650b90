"""The GPU's side of a chain of segments (`segmented.Device`): buffers, TensorRT engines, our kernels, two streams.

    main      passes and text: engines, append and attention over the ring, arithmetic of latents
    decode    the decoder and what it remembers, then pixels to pinned memory on the host

The host waits for pixels alone, and only for the decoder's stream. A pass is captured in a CUDA graph the second time
that it is made, after its engines have compiled what they need; what differs from unit to unit lies in buffers and in
one record on the device (csrc/cuda/pass.h), so a graph is never changed. An engine may not write where it reads, so a
buffer that a segment replaces exists twice, and its halves take turns.

Legend: M tokens of a unit, d width, H heads, D = d/H.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from _cfrt import Geometry
from _cfrt import Noise as NamedNoise

from ..bundle import OUT, TENSORS, Port, Segment
from ..config import ModelConfig
from ..errors import BundleError, EngineError
from ..noise import Purpose
from . import Latents
from .gpu import Block, Event, Gpu, Graph, Stream
from .gpu_latents import Buffer, GpuLatents, Noise, Pool, Sums
from .granules import Bf16, Int8, decoded, encoded
from .rtx import Context, Runtime

DTYPES = {"FLOAT": "fp32", "BF16": "bf16", "HALF": "fp16", "UINT8": "uint8"}
"""TensorRT's names for the formats of ports."""
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "uint8": 1}
KERNEL_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DECODERS = ("decoder_start", "decoder")


@dataclass
class Ports:
    """A buffer of the chain: one piece of memory, or two that take turns."""

    bytes: int
    shape: tuple[int, ...]
    dtype: str
    halves: list[Block]
    current: int = 0

    @property
    def address(self) -> int:
        return self.halves[self.current].address

    @property
    def other(self) -> int:
        """Where a segment that reads the buffer writes its new contents."""
        return self.halves[(self.current + 1) % len(self.halves)].address

    def turn(self) -> None:
        self.current = (self.current + 1) % len(self.halves)


@dataclass(frozen=True)
class Kept:
    """A copy of buffers by name."""

    buffers: dict[str, Buffer]


class Upload:
    """Pinned memory that goes to one place on the GPU again and again; some turns, so that the host runs ahead."""

    def __init__(self, gpu: Gpu, size: int, turns: int = 4) -> None:
        self._slots: list[tuple[Block, Event]] = [(gpu.pinned(size), gpu.event()) for _ in range(turns)]
        self._turn = 0

    def send(self, stream: Stream, to: int, data: np.ndarray) -> None:
        """uint8 bytes to an address, in the stream's order. They are copied at once, so `data` may change."""
        memory, sent = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        sent.wait()
        memory.array[: data.size] = data
        stream.copy(to, memory.address, data.size)
        stream.mark(sent)

    def close(self) -> None:
        for memory, sent in self._slots:
            sent.wait()
            memory.free()
            sent.close()


class TrtDevice:
    """One stream of one bundle on one GPU. `load` every segment, then `allocate`.

    kernels: `_cfrt.cuda`. tensors: `norm_q` and `norm_k` [layers, d] of the fused append, and where the ring is to be
    of 8 bits `v_scale` [layers, d]."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, np.ndarray],
        gpu: Gpu,
        runtime: Runtime,
        kernels: Any,
        *,
        seed: int,
    ) -> None:
        self._config, self._tensors, self._gpu, self._runtime, self._kernels = config, tensors, gpu, runtime, kernels
        self.seed = seed
        self._main, self._decode = gpu.stream(), gpu.stream()
        self._segments: dict[str, tuple[Segment, Context]] = {}
        self._buffers: dict[str, Ports] = {}
        self._uploads: dict[str, Upload] = {}
        self._graphs: dict[str, Graph | None] = {}
        self._owned: list[Block] = []
        self._pool, self._kept = Pool(gpu), Pool(gpu)  # of the main stream, and of the decoder's
        count = config.unit * config.latent_channels * prod(config.latent_grid)
        self._sums = Sums(kernels, self._pool, self._main, count, self._named_noise)
        self._holding: Latents = None  # whose sum the buffer `latents` is
        self._lent: Buffer | None = None  # read by the decoder's stream
        self._video: Port | None = None  # what the last decoder left in the buffer `video`
        self._saved = False

    # ------------------------------------------------------------------ starting

    def load(self, segment: Segment, engine: Path) -> None:
        """A segment from its engine. BundleError when the engine is another segment's, or cannot run here."""
        context = self._runtime.load(engine)
        expected = {port.name: (port.shape, port.dtype) for port in segment.inputs}
        expected |= {OUT + port.name: (port.shape, port.dtype) for port in segment.outputs}
        found = {name: (shape, DTYPES.get(dtype, dtype)) for name, shape, dtype in context.ports()}
        if found != expected:
            raise BundleError(f"expected the inputs and outputs {expected} of {segment.name} in {engine}, got {found}")
        self._segments[segment.name] = segment, context

    def allocate(self) -> None:
        """Everything that a stream will ever need, at once: EngineError, with sizes, where it does not fit."""
        segments = [segment for segment, _ in self._segments.values()]
        twice = {port.name for segment in segments for port in segment.outputs if _in(segment, port)}
        largest: dict[str, Port] = {}
        for port in (port for s in segments for port in (*s.inputs, *s.outputs) if port.row is None):
            known = largest.setdefault(port.name, port)
            largest[port.name] = max(known, port, key=lambda each: prod(each.shape))
        for name, port in largest.items():
            size = prod(port.shape) * BYTES[port.dtype]
            halves = [self._memory(size) for _ in range(2 if name in twice else 1)]
            self._buffers[name] = Ports(size, port.shape, port.dtype, halves)
        for decoders in (False, True):
            self._share_scratch([c for name, (_, c) in self._segments.items() if (name in DECODERS) == decoders])
        self._allocate_ring()
        pixels = self._config.autoencoder.temporal * 3 * prod(self._config.frame_size)
        self._pixels, self._host_pixels = self._memory(pixels), self._gpu.pinned(pixels)
        self._owned.append(self._host_pixels)

    def _memory(self, size: int) -> Block:
        memory = self._gpu.memory(size)
        self._owned.append(memory)
        return memory

    def _share_scratch(self, contexts: list[Context]) -> None:
        """One piece for the contexts of one stream, which run one after the other."""
        memory = self._memory(max((context.scratch_bytes for context in contexts), default=0))
        for context in contexts:
            context.set_scratch(memory.address, memory.bytes)

    def _allocate_ring(self) -> None:
        config, geometry = self._config, self._config.geometry
        self._int8 = "v_scale" in self._tensors
        self._granules = (Int8 if self._int8 else Bf16)(config.frame_tokens, config.heads, config.head_dim)
        shape = Geometry(unit=geometry.unit, window=geometry.window, sinks=geometry.sinks)
        self.ring = self._kernels.Ring(
            shape,
            frame_tokens=config.frame_tokens,
            layers=config.depth,
            heads=config.heads,
            dim=config.head_dim,
            int8=self._int8,
        )
        self._rows = config.unit * config.frame_tokens
        self._keys = self._memory(self.ring.bytes)
        self._main.zero(self._keys.address, self._keys.bytes)
        self._record = self._memory(self._kernels.record_bytes)
        self._norms = {name: self._placed(name, _bf16) for name in ("norm_q", "norm_k")}
        self._value_scales = self._placed("v_scale", _fp32) if self._int8 else None
        full = [(0, config.frame_tokens)] * (config.window + config.sinks)
        self._splits, floats = self._kernels.plan(
            queries=self._rows,
            heads=config.heads,
            dim=config.head_dim,
            pieces=full,
            processors=self._kernels.processors(self._gpu.index),
        )
        self._partial = self._memory(4 * floats)
        numbers, scales = self._rows * config.width, self._rows * config.heads if self._int8 else 0
        self._q, self._q_sink = (self._memory(numbers * (1 if self._int8 else 2)) for _ in range(2))
        self._q_scale, self._q_sink_scale = (self._memory(4 * scales) for _ in range(2))
        self._unrounded = self._memory(2 * numbers if self._int8 else 0)

    def _placed(self, name: str, convert: Callable[[np.ndarray], np.ndarray]) -> Block:
        """A tensor [layers, d] on the GPU."""
        shape = (self._config.depth, self._config.width)
        tensor = self._tensors.get(name)
        if tensor is None or tensor.shape != shape:
            got = "nothing" if tensor is None else tensor.shape
            raise BundleError(f"expected {name} {shape} in {TENSORS}, got {got}; export the bundle again")
        data = _bytes(convert(tensor))
        memory, upload = self._memory(data.size), Upload(self._gpu, data.size, turns=1)
        upload.send(self._main, memory.address, data)
        upload.close()
        return memory

    # ------------------------------------------------------------------ a pass

    def put(self, name: str, value: Latents | np.ndarray, frame: int | None = None) -> None:
        stream, buffer = self._stream_of(name), self._buffers[name]
        if isinstance(value, np.ndarray):
            self._send(name, stream, buffer.address, _bytes(encoded(value, buffer.dtype)))
        elif frame is None:
            self._sums.into(buffer.address, value)
            self._holding = value
        else:
            whole = self._sums.single(value)
            self._decode.follow(self._main)
            self._decode.copy(buffer.address, whole.memory.address + frame * buffer.bytes, buffer.bytes)
            self._lent = whole  # until the pixels are on the host, when the copy has surely been made

    def open(self, unit: int) -> None:
        opened = self.ring.open(unit, self.seed)
        self._send("record", self._main, self._record.address, np.frombuffer(opened.record, dtype=np.uint8))

    def replay(self, name: str, work: Callable[[], None]) -> None:
        """The first time it is done call by call, since engines compile and allocate when they first run; then it is
        captured, and from there on launched."""
        if name not in self._graphs:
            work()
            self._graphs[name] = None
            return
        graph = self._graphs[name]
        if graph is None:
            with self._main.captured() as graph:
                work()
            self._graphs[name] = graph
        self._main.launch(graph)

    def run(self, segment: str) -> None:
        description, context = self._segments[segment]
        addresses = {port.name: self._read_at(port) for port in description.inputs}
        replaced = [port.name for port in description.outputs if _in(description, port)]
        for port in description.outputs:
            buffer = self._buffers[port.name]
            addresses[OUT + port.name] = buffer.other if port.name in replaced else buffer.address
        context.enqueue(addresses, (self._decode if segment in DECODERS else self._main).handle)
        for name in replaced:
            self._buffers[name].turn()
        if segment in DECODERS:
            self._video = next(port for port in description.outputs if port.name == "video")

    def append(self, layer: int) -> None:
        config, width = self._config, 2 * self._config.width  # bytes of one row's q
        q, (k, v, k_scale) = self._buffers["qkv"].address, self._layer(layer)
        rows, columns = config.token_grid
        sinks = config.sinks > 0 and config.sink_position == "relative"
        self._kernels.append(
            **self._storage(layer, k_scale),
            q=q,
            k=q + width,
            v=q + 2 * width,
            stride=3 * config.width,
            q_weight=self._norms["norm_q"].address + layer * width,
            k_weight=self._norms["norm_k"].address + layer * width,
            q_out=self._q.address,
            q_sink_out=self._q_sink.address if sinks else 0,
            k_out=k,
            v_out=v,
            scratch=self._unrounded.address if self._int8 else 0,
            heads=config.heads,
            dim=config.head_dim,
            frames=config.unit,
            rows=rows,
            columns=columns,
            last_sink_view=config.trained_frames - 1,
            record=self._record.address,
            pairs=config.rope_pairs,
            theta=config.rope_theta,
            eps=config.eps,
            stream=self._main.handle,
        )

    def attend(self, layer: int) -> None:
        config = self._config
        k, v, k_scale = self._layer(layer)
        sinks = config.sinks > 0 and config.sink_position == "relative"
        self._kernels.attention(
            **self._storage(layer, k_scale),
            q=self._q.address,
            q_sink=self._q_sink.address if sinks else 0,
            k=k,
            v=v,
            out=self._buffers["attended"].address,
            scratch=self._partial.address if self._splits > 1 else 0,
            q_stride=config.width,
            out_stride=config.width,
            queries=self._rows,
            heads=config.heads,
            dim=config.head_dim,
            splits=self._splits,
            record=self._record.address,
            scale=config.head_dim**-0.5,
            stream=self._main.handle,
        )

    def _layer(self, layer: int) -> tuple[int, int, int]:
        """Addresses of a layer's keys, values and scales of keys."""
        k, v, k_scale = self.ring.layer(layer)
        return self._keys.address + k, self._keys.address + v, self._keys.address + k_scale

    def _storage(self, layer: int, k_scale: int) -> dict[str, Any]:
        """What the kernels are told of the ring's format."""
        if self._value_scales is None:
            return {"storage": "bf16"}
        return {
            "storage": "int8",
            "q_scale": self._q_scale.address,
            "q_sink_scale": self._q_sink_scale.address,
            "k_scale": k_scale,
            "v_scale": self._value_scales.address + 4 * layer * self._config.width,
        }

    def _read_at(self, port: Port) -> int:
        row = 0 if port.row is None else port.row * prod(port.shape) * BYTES[port.dtype]
        return self._buffers[port.name].address + row

    # ------------------------------------------------------------------ latents and pixels

    def noise(self, unit: int, step: int) -> GpuLatents:
        return GpuLatents({Noise(unit, step): 1.0})

    def estimate(self, latents: Latents, s: float) -> GpuLatents:
        if latents is not self._holding:
            self._sums.into(self._buffers["latents"].address, latents)
        out = self._sums.new()
        x, v = self._buffers["latents"].address, self._buffers["velocity"].address
        self._sums.x0(out.memory.address, x, v, s)
        return GpuLatents({out: 1.0})

    def latents(self, name: str) -> GpuLatents:
        out = self._sums.new()
        if out.memory.bytes != self._buffers[name].bytes:
            raise EngineError(f"the buffer {name} holds no unit of latents")
        self._main.copy(out.memory.address, self._buffers[name].address, out.memory.bytes)
        return GpuLatents({out: 1.0})

    def pixels(self, skip: int) -> np.ndarray:
        if self._video is None:
            raise EngineError("expected a decoder to have run before its pixels are asked for")
        frames, plane = self._video.shape[0] - skip, prod(self._config.frame_size)
        self._kernels.pixels(
            out=self._pixels.address,
            x=self._buffers["video"].address + skip * 3 * plane * BYTES[self._video.dtype],
            dtype=KERNEL_DTYPES[self._video.dtype],
            frames=frames,
            plane=plane,
            gain=1.0,
            offset=0.0,
            stream=self._decode.handle,
        )
        self._decode.copy(self._host_pixels.address, self._pixels.address, frames * 3 * plane)
        self._decode.wait()
        if not self._saved:
            self._saved = True
            self._runtime.save()
        return self._host_pixels.array[: frames * 3 * plane].reshape(frames, *self._config.frame_size, 3).copy()

    # ------------------------------------------------------------------ what must be remembered

    def clear(self, prefix: str) -> None:
        for buffer in self._named(prefix).values():
            self._decode.zero(buffer.address, buffer.bytes)

    def keep(self, prefix: str) -> Kept:
        kept = {name: self._kept.take(buffer.bytes) for name, buffer in self._named(prefix).items()}
        for name, copy in kept.items():
            self._decode.copy(copy.memory.address, self._buffers[name].address, copy.memory.bytes)
        return Kept(kept)

    def put_back(self, kept: Any) -> None:
        for name, copy in kept.buffers.items():
            self._decode.copy(self._buffers[name].address, copy.memory.address, copy.memory.bytes)
        self._decode.wait()  # whoever holds the copy may let go of it now

    def state(self) -> tuple[list[int], np.ndarray]:
        """On the host: a ring is larger than what else the GPU has room for."""
        held = self._fetched(self._main, self._keys.address, self._keys.bytes)
        self._decode.wait()
        return self.ring.state(), held

    def load_state(self, state: Any) -> None:
        frames, held = state
        self.ring.load(frames)
        self._main.copy(self._keys.address, held.ctypes.data, held.nbytes)
        self._main.wait()

    # ------------------------------------------------------------------ to and from the host

    def fetch(self, prefix: str) -> list[np.ndarray]:
        named = self._named(prefix).values()
        return [decoded(self._fetched(self._decode, b.address, b.bytes), b.dtype).reshape(b.shape) for b in named]

    def read_keys(self, frame: int) -> np.ndarray:
        return np.stack([self._granules.unpack(*self._frame(layer, frame)) for layer in range(self._config.depth)])

    def write_keys(self, frame: int, keys: np.ndarray) -> None:
        for layer, (k, v) in enumerate(keys):
            parts = self._granules.pack(k, v, self._scales_of(layer))
            for (address, _), part in zip(self._places(layer, frame), parts, strict=True):
                data = _bytes(part)
                self._send(f"keys {data.size}", self._main, address, data)

    def host(self, latents: Latents) -> np.ndarray:
        config, held = self._config, self._sums.single(latents)
        found = self._fetched(self._main, held.memory.address, held.memory.bytes).view(np.float32)
        return found.reshape(1, config.unit, config.latent_channels, *config.latent_grid)

    def place(self, array: np.ndarray) -> GpuLatents:
        out = self._sums.new()
        self._send("placed", self._main, out.memory.address, _bytes(array))
        return GpuLatents({out: 1.0})

    def twin(self) -> "TrtDevice":
        twin = TrtDevice(self._config, self._tensors, self._gpu, self._runtime, self._kernels, seed=self.seed)
        twin._segments = {name: (segment, context.twin()) for name, (segment, context) in self._segments.items()}
        twin.allocate()
        return twin

    def _fetched(self, stream: Stream, address: int, size: int) -> np.ndarray:
        """Bytes of the GPU, once all that was to be done on the stream is done."""
        out = np.empty(size, dtype=np.uint8)
        stream.copy(out.ctypes.data, address, size)
        stream.wait()
        return out

    def _places(self, layer: int, frame: int) -> list[tuple[int, int]]:
        """Address and bytes of a frame's keys, values and, in 8 bits, scales of keys."""
        starts, sizes = self._layer(layer), self._granules.sizes
        slot = self._config.geometry.slot(frame)
        return [(start + slot * size, size) for start, size in zip(starts, sizes, strict=False) if size]

    def _frame(self, layer: int, frame: int) -> list[np.ndarray]:
        parts = [self._fetched(self._main, address, size) for address, size in self._places(layer, frame)]
        return parts if self._value_scales is None else [*parts, self._scales_of(layer)]

    def _scales_of(self, layer: int) -> np.ndarray | None:
        return self._tensors["v_scale"][layer] if self._int8 else None

    def close(self) -> None:
        """Waits for what is running, then gives all memory back."""
        for stream in (self._main, self._decode):
            stream.wait()
        self._runtime.save()
        self._holding = self._lent = None
        self._segments.clear()
        for graph in self._graphs.values():
            if graph is not None:
                graph.close()
        for upload in self._uploads.values():
            upload.close()
        self._pool.close()
        self._kept.close()
        for memory in self._owned:
            memory.free()
        for stream in (self._main, self._decode):
            stream.close()

    # ------------------------------------------------------------------ parts

    def _stream_of(self, name: str) -> Stream:
        """The decoder's buffers belong to its stream."""
        return self._decode if name in ("latent", "video") or name.startswith("state.") else self._main

    def _named(self, prefix: str) -> dict[str, Ports]:
        return {name: buffer for name, buffer in self._buffers.items() if name.startswith(prefix)}

    def _send(self, name: str, stream: Stream, to: int, data: np.ndarray) -> None:
        if name not in self._uploads:
            self._uploads[name] = Upload(self._gpu, data.size)
        self._uploads[name].send(stream, to, data)

    def _named_noise(self, unit: int, step: int) -> NamedNoise:
        return NamedNoise(self.seed, unit, step, Purpose.SAMPLE)


def _in(segment: Segment, port: Port) -> bool:
    """Does the segment replace the contents of this output's buffer?"""
    return any(read.name == port.name for read in segment.inputs)


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _fp32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32, copy=False)


def _bf16(array: np.ndarray) -> np.ndarray:
    return encoded(array, "bf16")
