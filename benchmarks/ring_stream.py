"""One layer that only appends and attends, as the calls that a CUDA graph would have captured, and the same in fp64.

`memory` is where the kernels' arrays lie: a GPU's (benchmarks/gpu.py), or the executor's (tests/simulated_cuda.py).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

import _cfrt

from .exact import Array, formula, from_bf16, normal, to_bf16

THETA, EPS = 1e4, 1e-6


class Buffer(Protocol):
    @property
    def address(self) -> int: ...
    def get(self) -> Array: ...
    def set(self, values: Array) -> None: ...


class DeviceMemory(Protocol):
    def put(self, values: Array) -> Buffer: ...
    def empty(self, shape: tuple[int, ...], dtype: type) -> Buffer: ...


@dataclass
class RingStream:
    """`grid`: a frame's tokens. `sink_view`: the latest position from which sinks are looked at."""

    storage: str = "bf16"
    accumulate: str = "fp32"
    heads: int = 2
    dim: int = 64
    unit: int = 1
    window: int = 3
    sinks: int = 1
    grid: tuple[int, int] = (7, 10)
    splits: int = 4
    seed: int = 2**63 + 5
    sink_view: int | None = None

    def __post_init__(self) -> None:
        self.tokens, self.width = self.grid[0] * self.grid[1], self.heads * self.dim
        self.rows, self.int8 = self.unit * self.tokens, self.storage == "int8"
        third = self.dim // 6
        self.pairs = (self.dim // 2 - 2 * third, third, third)
        self.geometry = _cfrt.Geometry(unit=self.unit, window=self.window, sinks=self.sinks)

    # ------------------------------------------------------------------------------------------ the kernels

    def start(self, memory: DeviceMemory) -> None:
        """Makes the arrays and the arguments of all calls, which do not change from here on."""
        shape = {"frame_tokens": self.tokens, "layers": 1, "heads": self.heads, "dim": self.dim}
        self.memory, self.ring = memory, _cfrt.cuda.Ring(self.geometry, **shape, int8=self.int8)
        self.store = memory.put(np.zeros(self.ring.bytes, np.uint8))
        self.record = memory.put(np.zeros(_cfrt.cuda.record_bytes, np.uint8))
        kind, rows = np.int8 if self.int8 else np.uint16, (self.rows, self.width)
        self.inputs = {name: memory.put(np.zeros(rows, np.uint16)) for name in "qkv"}
        self.out = memory.empty(rows, np.uint16)
        made = {"q_out": memory.empty(rows, kind), "weight": memory.put(to_bf16(np.ones(self.width)))}
        if self.sink_view is not None:
            made["q_sink_out"] = memory.empty(rows, kind)
        k, v, k_scale = (self.store.address + offset for offset in self.ring.layer(0))
        scales = {}
        if self.int8:
            self.v_scale = memory.put(np.zeros(self.width, np.float32))
            made |= {name: memory.empty((self.rows, self.heads), np.float32) for name in ("q_scale", "q_sink_scale")}
            scales = {"k_scale": k_scale, "v_scale": self.v_scale.address}
            scales |= {name: made[name].address for name in ("q_scale", "q_sink_scale")}
        made["parts"] = memory.empty((self.splits * self.rows * self.heads * (self.dim + 1),), np.float32)
        made["rounded"] = memory.empty(rows, np.uint16)
        self._made = made  # kept alive
        common = {"storage": self.storage, "heads": self.heads, "dim": self.dim, "record": self.record.address,
                  "stream": 0, **scales}  # fmt: skip
        q_sink = made["q_sink_out"].address if self.sink_view is not None else 0
        self.append: dict[str, Any] = common | {name: x.address for name, x in self.inputs.items()} | {
            "stride": self.width, "q_weight": made["weight"].address, "k_weight": made["weight"].address,
            "q_out": made["q_out"].address, "q_sink_out": q_sink, "k_out": k, "v_out": v,
            "scratch": made["rounded"].address, "frames": self.unit, "rows": self.grid[0], "columns": self.grid[1],
            "last_sink_view": self.sink_view or 0, "pairs": self.pairs, "theta": THETA, "eps": EPS,
        }  # fmt: skip
        self.attention: dict[str, Any] = common | {
            "q": made["q_out"].address, "q_sink": q_sink, "k": k, "v": v, "out": self.out.address,
            "scratch": made["parts"].address, "q_stride": self.width, "out_stride": self.width, "queries": self.rows,
            "splits": self.splits, "scale": self.dim**-0.5, "accumulate": self.accumulate,
        }  # fmt: skip

    def calibrate(self, cuda: Any, units: int) -> None:
        """Scales of V for what `units` will write."""
        limit = 448 if self.accumulate == "fp32" else _cfrt.cuda.fp16_limit
        for unit in range(units if self.int8 else 0):
            v = self.memory.put(to_bf16(self.numbers(unit)[2]))
            cuda.value_scales(scale=self.v_scale.address, v=v.address, rows=self.rows, width=self.width,
                              stride=self.width, limit=limit, stream=0)  # fmt: skip

    def step(self, cuda: Any, unit: int) -> Array:
        """One pass, committed: [F N, H, D]. Nothing but inputs and the record changes."""
        self.opened = self.ring.open(unit, self.seed)
        self.record.set(np.frombuffer(self.opened.record, np.uint8))
        for name, x in zip("qkv", self.numbers(unit), strict=True):
            self.inputs[name].set(to_bf16(x))
        cuda.append(**self.append)
        cuda.attention(**self.attention)
        self.ring.commit(unit)
        return self.answer()

    def answer(self) -> Array:
        return from_bf16(self.out.get()).reshape(self.rows, self.heads, self.dim)

    # ------------------------------------------------------------------------------------------ the formula

    def numbers(self, unit: int) -> list[Array]:
        return [normal(100 * unit + i, self.rows, self.width) for i in range(3)]

    def exact(self, units: int) -> Iterator[Array]:
        """What each unit should say, in fp64."""
        keys, values = [], []
        for unit in range(units):
            q, k, v = self.numbers(unit)
            keys += np.split(self._rotated(k, unit), self.unit)
            values += np.split(v.reshape(self.rows, self.heads, self.dim), self.unit)
            frames = [frame for span in self.geometry.visible_frames(unit) for frame in range(*span)]
            sinks = sum(frame < self.sinks for frame in frames) * self.tokens
            seen = (np.concatenate([x[frame] for frame in frames]) for x in (keys, values))
            yield formula(self._rotated(q, unit), *seen, self._rotated(q, unit, self.sink_view), sinks)

    def _rotated(self, x: Array, unit: int, view: int | None = None) -> Array:
        """RMS norm and rotation, [F N, H, D]. view: the latest position that frames may have."""
        x = x.astype(np.float64)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS)
        frame, token = np.divmod(np.arange(self.rows), self.tokens)
        frame = frame + unit * self.unit
        if view is not None:
            frame = np.minimum(frame, view)
        axes = zip(self.pairs, (frame, *np.divmod(token, self.grid[1])), strict=True)
        angles = np.concatenate([at[:, None] * THETA ** (-np.arange(n) / n) for n, at in axes], axis=1)
        pairs = x.reshape(self.rows, self.heads, -1, 2)
        z = (pairs[..., 0] + 1j * pairs[..., 1]) * np.exp(1j * angles)[:, None]
        return np.stack([z.real, z.imag], axis=-1).reshape(self.rows, self.heads, self.dim)
