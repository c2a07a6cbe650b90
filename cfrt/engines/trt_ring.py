"""Keys and values of a stream on the GPU, and the two kernels between the engines: append and attention.

Everything that differs from unit to unit is a record on the device (csrc/cuda/pass.h); `append` and `attend` are the
same calls whatever the unit, fit to be captured. Where bytes lie is `_cfrt.cuda.Ring`'s business.

Legend: M tokens of a unit, d width, H heads, D = d/H.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from _cfrt import Geometry

from ..bundle import TENSORS
from ..config import ModelConfig
from ..errors import BundleError
from .gpu import Block, Gpu, Stream, Upload, as_bytes
from .granules import Bf16, Int8, encoded


class GpuRing:
    """One ring, and what its kernels need. `plan` says which frame each slot holds.

    tensors: `norm_q` and `norm_k` [layers, d] of the fused append, and where the ring is to be of 8 bits, `v_scale`
    [layers, d]. kernels: `_cfrt.cuda`. EngineError, with sizes, where it does not fit."""

    def __init__(
        self, config: ModelConfig, tensors: Mapping[str, np.ndarray], gpu: Gpu, kernels: Any, stream: Stream
    ) -> None:
        self._config, self._tensors, self._gpu, self._kernels = config, tensors, gpu, kernels
        self._owned: list[Block] = []
        self._uploads: dict[int, Upload] = {}
        self._int8 = "v_scale" in tensors
        self._sinks = config.sinks > 0 and config.sink_position == "relative"
        self._rows = config.unit * config.frame_tokens
        self._granules = (Int8 if self._int8 else Bf16)(config.frame_tokens, config.heads, config.head_dim)
        geometry = config.geometry
        self.plan = kernels.Ring(
            Geometry(unit=geometry.unit, window=geometry.window, sinks=geometry.sinks),
            frame_tokens=config.frame_tokens,
            layers=config.depth,
            heads=config.heads,
            dim=config.head_dim,
            int8=self._int8,
        )
        try:
            self._allocate(stream)
        except BaseException:
            self.close()
            raise

    def _allocate(self, stream: Stream) -> None:
        config = self._config
        self._keys = self._memory(self.plan.bytes)
        stream.zero(self._keys.address, self._keys.bytes)
        self._record = self._memory(self._kernels.record_bytes)
        self._norms = {name: self._placed(name, "bf16", stream) for name in ("norm_q", "norm_k")}
        self._value_scales = self._placed("v_scale", "fp32", stream) if self._int8 else None
        self._splits, floats = self._kernels.plan(
            queries=self._rows,
            heads=config.heads,
            dim=config.head_dim,
            pieces=[(0, config.frame_tokens)] * (config.window + config.sinks),  # of a window that is full
            processors=self._kernels.processors(self._gpu.index),
        )
        self._partial = self._memory(4 * floats)
        numbers, scales = self._rows * config.width, self._rows * config.heads if self._int8 else 0
        self._q, self._q_sink = (self._memory(numbers * (1 if self._int8 else 2)) for _ in range(2))
        self._q_scale, self._q_sink_scale = (self._memory(4 * scales) for _ in range(2))
        self._unrounded = self._memory(2 * numbers if self._int8 else 0)

    def _memory(self, size: int) -> Block:
        memory = self._gpu.memory(size)
        self._owned.append(memory)
        return memory

    def _placed(self, name: str, dtype: str, stream: Stream) -> Block:
        """A tensor [layers, d] on the GPU."""
        shape = (self._config.depth, self._config.width)
        tensor = self._tensors.get(name)
        if tensor is None or tensor.shape != shape:
            got = "nothing" if tensor is None else tensor.shape
            raise BundleError(f"expected {name} {shape} in {TENSORS}, got {got}; export the bundle again")
        data = as_bytes(encoded(tensor, dtype))
        memory = self._memory(data.size)
        self._send(stream, memory.address, data)
        return memory

    def _send(self, stream: Stream, to: int, data: np.ndarray) -> None:
        if data.size not in self._uploads:
            self._uploads[data.size] = Upload(self._gpu, data.size)
        self._uploads[data.size].send(stream, to, data)

    def close(self) -> None:
        for upload in self._uploads.values():
            upload.close()
        for memory in self._owned:
            memory.free()

    # ------------------------------------------------------------------ a pass

    def open(self, unit: int, seed: int, stream: Stream) -> None:
        """Makes the record that of a pass over `unit`. ValueError where the units before it are not committed."""
        record = self.plan.open(unit, seed).record
        self._send(stream, self._record.address, np.frombuffer(record, dtype=np.uint8))

    def append(self, layer: int, qkv: int, stream: Stream) -> None:
        """From rows of [q | k | v] at an address to queries, and keys and values in the unit's slots."""
        config, width = self._config, 2 * self._config.width  # bytes of one row's q
        k, v, k_scale = self._layer(layer)
        rows, columns = config.token_grid
        self._kernels.append(
            **self._storage(layer, k_scale),
            q=qkv,
            k=qkv + width,
            v=qkv + 2 * width,
            stride=3 * config.width,
            q_weight=self._norms["norm_q"].address + layer * width,
            k_weight=self._norms["norm_k"].address + layer * width,
            q_out=self._q.address,
            q_sink_out=self._q_sink.address if self._sinks else 0,
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
            stream=stream.handle,
        )

    def attend(self, layer: int, out: int, stream: Stream) -> None:
        """What the appended queries find in all that the unit sees, bf16 [M, d] at an address."""
        config = self._config
        k, v, k_scale = self._layer(layer)
        self._kernels.attention(
            **self._storage(layer, k_scale),
            q=self._q.address,
            q_sink=self._q_sink.address if self._sinks else 0,
            k=k,
            v=v,
            out=out,
            scratch=self._partial.address if self._splits > 1 else 0,
            q_stride=config.width,
            out_stride=config.width,
            queries=self._rows,
            heads=config.heads,
            dim=config.head_dim,
            splits=self._splits,
            record=self._record.address,
            scale=config.head_dim**-0.5,
            stream=stream.handle,
        )

    def _layer(self, layer: int) -> tuple[int, int, int]:
        """Addresses of a layer's keys, values and scales of keys."""
        k, v, k_scale = self.plan.layer(layer)
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

    # ------------------------------------------------------------------ to and from the host

    def state(self, stream: Stream) -> tuple[list[int], np.ndarray]:
        """All of it, on the host: a ring is larger than what else the GPU has room for."""
        return self.plan.state(), stream.fetch(self._keys.address, self._keys.bytes)

    def load(self, state: tuple[list[int], np.ndarray], stream: Stream) -> None:
        """ValueError when it is the state of a ring of another shape."""
        frames, held = state
        self.plan.load(frames)
        stream.copy(self._keys.address, held.ctypes.data, held.nbytes)
        stream.wait()

    def read(self, frame: int, stream: Stream) -> np.ndarray:
        """fp32 [layers, 2, N, H, D] of a latent frame, exactly what the ring holds."""
        layers = []
        for layer in range(self._config.depth):
            parts = [stream.fetch(address, size) for address, size in self._places(layer, frame)]
            scales = self._scales(layer)
            layers.append(self._granules.unpack(*parts, *([] if scales is None else [scales])))
        return np.stack(layers)

    def write(self, frame: int, keys: np.ndarray, stream: Stream) -> None:
        """The way back, which rounds to the ring's format what does not have it."""
        for layer, (k, v) in enumerate(keys):
            parts = self._granules.pack(k, v, self._scales(layer))
            for (address, _), part in zip(self._places(layer, frame), parts, strict=True):
                self._send(stream, address, as_bytes(part))

    def _places(self, layer: int, frame: int) -> list[tuple[int, int]]:
        """Address and bytes of a frame's keys, values and, in 8 bits, scales of keys."""
        slot = self._config.geometry.slot(frame)
        places = zip(self._layer(layer), self._granules.sizes, strict=True)
        return [(start + slot * size, size) for start, size in places if size]

    def _scales(self, layer: int) -> np.ndarray | None:
        return self._tensors["v_scale"][layer] if self._int8 else None
