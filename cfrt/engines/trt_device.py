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

from _cfrt import Noise as NamedNoise

from ..bundle import OUT, STATE, Port, Segment
from ..config import ModelConfig
from ..errors import BundleError, EngineError
from ..noise import Purpose
from . import Latents
from .gpu import Block, Gpu, Graph, Stream, Upload, as_bytes
from .gpu_latents import Buffer, GpuLatents, Noise, Pool, Sums
from .granules import decoded, encoded
from .rtx import Context, Runtime
from .trt_ring import GpuRing

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


class TrtDevice:
    """One stream of one bundle on one GPU. `load` every segment, then `allocate`.

    kernels: `_cfrt.cuda`. tensors: what a bundle holds outside its graphs (`trt_ring.GpuRing`)."""

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
        self._ring: GpuRing | None = None
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
        self._ring = GpuRing(self._config, self._tensors, self._gpu, self._kernels, self._main)
        pixels = self._config.autoencoder.temporal * 3 * prod(self._config.frame_size)
        self._pixels, self._host_pixels = self._memory(pixels), self._gpu.pinned(pixels)
        self._owned.append(self._host_pixels)

    @property
    def ring(self) -> Any:
        return self._gpu_ring.plan

    @property
    def _gpu_ring(self) -> "GpuRing":
        assert self._ring is not None, "load, then allocate"
        return self._ring

    def _memory(self, size: int) -> Block:
        memory = self._gpu.memory(size)
        self._owned.append(memory)
        return memory

    def _share_scratch(self, contexts: list[Context]) -> None:
        """One piece for the contexts of one stream, which run one after the other."""
        memory = self._memory(max((context.scratch_bytes for context in contexts), default=0))
        for context in contexts:
            context.set_scratch(memory.address, memory.bytes)

    # ------------------------------------------------------------------ a pass

    def put(self, name: str, value: Latents | np.ndarray, frame: int | None = None) -> None:
        stream, buffer = self._stream_of(name), self._buffers[name]
        if isinstance(value, np.ndarray):
            self._send(name, stream, buffer.address, as_bytes(encoded(value, buffer.dtype)))
        elif frame is None:
            if self._config.solver == "euler":  # the next step starts from these: else its sum grows with every pass
                self._sums.settle(value)
            self._sums.into(buffer.address, value)
            self._holding = value
        else:
            whole = self._sums.single(value)
            self._decode.follow(self._main)
            self._decode.copy(buffer.address, whole.memory.address + frame * buffer.bytes, buffer.bytes)
            self._lent = whole  # until the pixels are on the host, when the copy has surely been made

    def open(self, unit: int) -> None:
        self._gpu_ring.open(unit, self.seed, self._main)

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
        self._gpu_ring.append(layer, self._buffers["qkv"].address, self._main)

    def attend(self, layer: int) -> None:
        self._gpu_ring.attend(layer, self._buffers["attended"].address, self._main)

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
        state = self._gpu_ring.state(self._main)
        self._decode.wait()
        return state

    def load_state(self, state: Any) -> None:
        self._gpu_ring.load(state, self._main)

    # ------------------------------------------------------------------ to and from the host

    def fetch(self, prefix: str) -> list[np.ndarray]:
        named = self._named(prefix).values()
        return [decoded(self._decode.fetch(b.address, b.bytes), b.dtype).reshape(b.shape) for b in named]

    def read_keys(self, frame: int) -> np.ndarray:
        return self._gpu_ring.read(frame, self._main)

    def write_keys(self, frame: int, keys: np.ndarray) -> None:
        self._gpu_ring.write(frame, keys, self._main)

    def host(self, latents: Latents) -> np.ndarray:
        config, held = self._config, self._sums.single(latents)
        found = self._main.fetch(held.memory.address, held.memory.bytes).view(np.float32)
        return found.reshape(1, config.unit, config.latent_channels, *config.latent_grid)

    def place(self, array: np.ndarray) -> GpuLatents:
        out = self._sums.new()
        self._send("placed", self._main, out.memory.address, as_bytes(array))
        return GpuLatents({out: 1.0})

    def twin(self) -> "TrtDevice":
        twin = TrtDevice(self._config, self._tensors, self._gpu, self._runtime, self._kernels, seed=self.seed)
        twin._segments = {name: (segment, context.twin()) for name, (segment, context) in self._segments.items()}
        try:
            twin.allocate()
        except BaseException:
            twin.close()
            raise
        return twin

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
        if self._ring is not None:
            self._ring.close()
        for memory in self._owned:
            memory.free()
        for stream in (self._main, self._decode):
            stream.close()

    # ------------------------------------------------------------------ parts

    def _stream_of(self, name: str) -> Stream:
        """The decoder's buffers belong to its stream."""
        return self._decode if name in ("latent", "video") or name.startswith(STATE) else self._main

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
