"""The engine that proves an export: a bundle's graphs in ONNX Runtime, on any CPU.

Between the segments work the ring and the attention of the native engine. Every graph runs as its fp32 twin
(cfrt/engines/twin.py), so a bf16 bundle streams here as well: with the weights that it holds, all arithmetic in fp32.
It is the graphs' witness and not a fast engine: `native` is that.
"""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import numpy as np
import onnxruntime

from _cfrt import Geometry, Noise, kernels

from ..bundle import OUT, TENSORS, Bundle, Port, Segment
from ..config import ModelConfig
from ..errors import BundleError
from ..flow import x0_from_v
from ..noise import Purpose
from . import Spec
from .native import physical_cores
from .segmented import SegmentedEngine
from .twin import fp32_twin

Tensors = Mapping[str, np.ndarray]


class OnnxEngine(SegmentedEngine):
    """One stream. Latents are float32 arrays [1, F, C, h, w]."""

    name: ClassVar[str] = "onnx"

    @classmethod
    def supported(cls, spec: Spec) -> str | None:
        if spec.device not in ("auto", "cpu"):
            return f"it runs on cpu, not on {spec.device!r}"
        if spec.precision not in ("auto", "fp32"):
            return f"it computes in fp32, not in {spec.precision!r}, with the weights that the bundle holds"
        return cls.refusal(spec)

    def _device(self, spec: Spec, bundle: Bundle) -> "CpuDevice":
        self.precision = "fp32"
        device = self._empty(spec, spec.threads or physical_cores())
        for segment in bundle.manifest.segments:
            device.load(segment, fp32_twin(bundle.file(segment.onnx)))
        return device

    def _empty(self, spec: Spec, threads: int) -> "CpuDevice":
        return CpuDevice(spec.config, spec.weights, seed=spec.seed, threads=threads)


class CpuDevice:
    """Buffers as numpy arrays, segments as ONNX Runtime sessions; a `Device` (cfrt/engines/segmented.py).

    `tensors` are the norms of the fused append, `norm_q` and `norm_k` [layers, d]. An array in a buffer is replaced and
    never written to, so that what was taken from it stays as it was."""

    def __init__(self, config: ModelConfig, tensors: Tensors, *, seed: int = 0, threads: int = 1) -> None:
        self.config, self.seed, self.threads = config, seed, threads
        self.buffers: dict[str, np.ndarray] = {}
        self._sessions: dict[str, tuple[Segment, onnxruntime.InferenceSession]] = {}
        self._pool = kernels.Threads(threads)
        self._head = Head(config)
        self._norms = {name: _norm(tensors, name, (config.depth, config.width)) for name in ("norm_q", "norm_k")}
        self._ring = self._new_ring()

    def _new_ring(self) -> kernels.Ring:
        config, geometry = self.config, self.config.geometry
        return kernels.Ring(
            Geometry(unit=geometry.unit, window=geometry.window, sinks=geometry.sinks),
            frame_tokens=config.frame_tokens,
            layers=config.depth,
            heads=config.heads,
            dim=self._head.stored,
            precision="fp32",
        )

    @property
    def ring(self) -> kernels.Ring:
        return self._ring

    def load(self, segment: Segment, graph: bytes) -> None:
        """A segment from its serialised fp32 twin."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        for entry in ("session.x64quantprecision", "session.qdq_matmulnbits_accuracy_level"):
            options.add_session_config_entry(entry, "1")  # no int8 sums that saturate, no activations rounded unasked
        try:
            session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the library's errors share no base
            raise BundleError(f"ONNX Runtime cannot open segment {segment.name}: {error}") from error
        self._sessions[segment.name] = segment, session
        for port in segment.outputs:
            self.buffers.setdefault(port.name, np.zeros(port.shape, np.float32))

    # ------------------------------------------------------------------ a pass

    def put(self, name: str, value: np.ndarray, frame: int | None = None) -> None:
        if value.ndim == 5:  # latents [1, F, C, h, w]
            value = value[0] if frame is None else value[0, frame]
        self.buffers[name] = value

    def open(self, unit: int) -> None:
        config = self.config
        self._ranges, self._sink_rows, self._place = self.ring.open(unit)
        own = range(unit * config.unit, (unit + 1) * config.unit)
        last = config.trained_frames - 1
        self._turn = self._turns(tuple(own))
        far = self._sink_rows > 0 and config.sink_position == "relative" and own[-1] > last
        self._sink_turn = self._turns(tuple(min(frame, last) for frame in own)) if far else None

    def replay(self, name: str, work: Callable[[], None]) -> None:
        work()

    def run(self, segment: str) -> None:
        description, session = self._sessions[segment]
        fed = {port.name: self._fed(port) for port in description.inputs}
        names = [port.name for port in description.outputs]
        self.buffers |= zip(names, session.run([OUT + name for name in names], fed), strict=True)

    def append(self, layer: int) -> None:
        _, k, v = self._heads()
        self._remember(self._ring, layer, k, v)

    def attend(self, layer: int) -> None:
        self.buffers["attended"] = self._head.taken(self._found(self._ring, layer, self._heads()[0]))

    def _remember(self, ring: kernels.Ring, layer: int, k: np.ndarray, v: np.ndarray) -> None:
        kernels.append(
            ring.layer(layer),
            self._place,
            k,
            v,
            weight=self._head.norm(self._norms["norm_k"][layer]),
            eps=self._head.eps,
            turn=self._turn,
            threads=self._pool,
        )

    def _queries(self, layer: int, q: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Normed and turned, for the window and, where they are far, for the sinks."""
        return kernels.queries(
            q,
            self.config.heads,
            weight=self._head.norm(self._norms["norm_q"][layer]) * self._head.query,
            eps=self._head.eps,
            turn=self._turn,
            sink_turn=self._sink_turn,
            threads=self._pool,
        )

    def _found(self, ring: kernels.Ring, layer: int, q: np.ndarray) -> np.ndarray:
        heads = (-1, self.config.heads, self._head.stored)
        q, q_sink = self._queries(layer, q)
        out = np.empty_like(q)
        kernels.attention(
            q.reshape(heads),
            ring.layer(layer),
            out.reshape(heads),
            ranges=self._ranges,
            q_sink=None if q_sink is None else q_sink.reshape(heads),
            sink_rows=0 if q_sink is None else self._sink_rows,
            threads=self._pool,
        )
        return out

    def _fed(self, port: Port) -> np.ndarray:
        whole = self.buffers[port.name]
        return whole if port.row is None else whole[port.row]

    def _heads(self) -> list[np.ndarray]:
        return [self._head.laid(part) for part in np.split(self.buffers["qkv"], 3, axis=1)]

    def _turns(self, frames: tuple[int, ...]) -> np.ndarray:
        config = self.config
        return self._head.turn(kernels.turns(frames, config.token_grid, config.rope_pairs, config.rope_theta))

    # ------------------------------------------------------------------ latents and pixels

    def noise(self, unit: int, step: int) -> np.ndarray:
        config = self.config
        shape = (1, config.unit, config.latent_channels, *config.latent_grid)
        return Noise(self.seed, unit, step, Purpose.SAMPLE).normal(int(np.prod(shape))).reshape(shape)

    def estimate(self, latents: np.ndarray, s: float) -> np.ndarray:
        x0: np.ndarray = x0_from_v(latents, self.buffers["velocity"][None], np.float32(s))
        return x0

    def latents(self, name: str) -> np.ndarray:
        value = self.buffers[name]
        return value[None, None] if value.ndim == 3 else value[None]

    def pixels(self, skip: int) -> np.ndarray:
        video = self.buffers["video"][skip:]
        return np.ascontiguousarray((video.clip(0, 1) * 255).round().astype(np.uint8).transpose(0, 2, 3, 1))

    # ------------------------------------------------------------------ what must be remembered

    def clear(self, prefix: str) -> None:
        self.buffers |= {name: np.zeros_like(array) for name, array in self.keep(prefix).items()}

    def keep(self, prefix: str) -> dict[str, np.ndarray]:
        return {name: array for name, array in self.buffers.items() if name.startswith(prefix)}

    def put_back(self, kept: Any) -> None:
        self.buffers |= kept

    def state(self) -> bytes:
        return self.ring.state()

    def load_state(self, state: Any) -> None:
        self.ring.load(state)

    # ------------------------------------------------------------------ to and from the host

    def fetch(self, prefix: str) -> list[np.ndarray]:
        kept = self.keep(prefix)
        return [kept[name] for name in sorted(kept, key=lambda name: int(name.removeprefix(prefix)))]

    def read_keys(self, frame: int) -> np.ndarray:
        layers = range(self.config.depth)
        keys = np.stack([np.stack(self.ring.read(layer, frame)) for layer in layers])
        return keys[..., : self.config.head_dim].copy()  # without the zeros that heads are filled up with

    def write_keys(self, frame: int, keys: np.ndarray) -> None:
        padding = [*[(0, 0)] * 4, (0, self._head.stored - self.config.head_dim)]
        for layer, (k, v) in enumerate(np.pad(keys, padding)):
            self.ring.write(layer, frame, np.ascontiguousarray(k), np.ascontiguousarray(v))

    def host(self, latents: np.ndarray) -> np.ndarray:
        return latents

    def place(self, array: np.ndarray) -> np.ndarray:
        return array

    def twin(self) -> Self:
        twin = type(self)(self.config, self._norms, seed=self.seed, threads=self.threads)
        twin._sessions = self._sessions
        twin.buffers = {name: np.zeros_like(array) for name, array in self.buffers.items()}
        return twin

    def close(self) -> None:
        self._sessions = {}


class Head:
    """The kernels want heads of a multiple of 16 numbers: others lie among zeros, which change no product. Norms count
    the zeros in their mean and attention in its scale, so their weights make up for that.

    Legend: N rows, H heads, D numbers a head, P of them stored."""

    def __init__(self, config: ModelConfig) -> None:
        self._dim, self._heads = config.head_dim, config.heads
        self.stored = -(-self._dim // 16) * 16
        share = self._dim / self.stored
        self.eps = config.eps * share
        self.query = np.float32(share**-0.5)
        self._gain = np.float32(share**0.5)

    def laid(self, rows: np.ndarray) -> np.ndarray:
        """[N, H P] of [N, H D]."""
        if self.stored == self._dim:
            return np.ascontiguousarray(rows)
        wide = np.zeros((len(rows), self._heads, self.stored), np.float32)
        wide[..., : self._dim] = rows.reshape(len(rows), self._heads, self._dim)
        return wide.reshape(len(rows), -1)

    def taken(self, rows: np.ndarray) -> np.ndarray:
        """[N, H D] of [N, H P]."""
        return rows.reshape(len(rows), self._heads, self.stored)[..., : self._dim].reshape(len(rows), -1)

    def norm(self, weight: np.ndarray) -> np.ndarray:
        """The weight of a norm over H D, [H D], as that of a norm over H P."""
        return self.laid(weight[None])[0] * self._gain

    def turn(self, turn: np.ndarray) -> np.ndarray:
        """[N, 2, P] of [N, 2, D]: zeros do not turn."""
        wide = np.zeros((len(turn), 2, self.stored), np.float32)
        wide[..., : self._dim] = turn
        return wide


def _norm(tensors: Tensors, name: str, shape: tuple[int, ...]) -> np.ndarray:
    if name not in tensors or tensors[name].shape != shape:
        got = tensors[name].shape if name in tensors else "nothing"
        raise BundleError(f"expected {name} {shape} in {TENSORS}, got {got}; export the bundle again")
    return np.ascontiguousarray(tensors[name], dtype=np.float32)
