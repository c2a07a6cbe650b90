"""The chain of segments: what every engine that runs an exported bundle has in common.

A bundle's network is cut at its self-attentions (export/segments.py). A pass over a unit runs the pieces in a row and,
between them, what no exported graph can do in place: the append to the ring and the attention over it.

    denoise    head; for each layer: append, attend, then mid_i or, for the last, tail -> velocity; x0 = x - s v
    commit     the same at t = 0 and cut short after the last layer's append, since nothing else of it is ever seen
    text       text_kv, once for a prompt
    decode     for each latent frame: decoder (or decoder_start), then its pixels

Who does the work is a `Device`: named buffers and eight verbs. A segment is connected to the buffers that carry the
names of its inputs and outputs (`cfrt.bundle.Port`), so that this file is the whole schedule, and one schedule serves

    onnx    segments in ONNX Runtime, ring and attention by the native CPU kernels     cfrt/engines/onnx.py
    trt     segments as TensorRT-RTX engines, ring and attention by the CUDA kernels   cfrt/engines/trt.py

A pass makes the same calls on the same buffers every time: what changes from pass to pass (latents, time, text, the
ring's ranges and positions) is put into place before it starts. So `Device.replay` may record a pass once and play it
again. Latents are the device's own: `noise`, `estimate` and `latents` give them, `put` takes them, and their + and
products with floats are what `cfrt.flow` needs between two passes.

Commits are never fused with the next pass here (`fuses = False`): a fused pass holds two units at two times, and every
graph would have to exist a second time at twice the tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from ..bundle import STATE, Bundle, Segment
from ..config import ModelConfig
from ..errors import EngineError
from ..flow import TIME_SCALE, time_embedding
from . import Latents, Memory, Spec, fit_memory


class Ring(Protocol):
    """Which frame each slot holds; `_cfrt.kernels.Ring` and `_cfrt.cuda.Ring` are two."""

    @property
    def next_frame(self) -> int: ...
    def commit(self, unit: int) -> None: ...
    def rewind(self, unit: int) -> None: ...
    def hold(self, frame: int) -> None: ...
    def held(self) -> list[int]: ...


class Device(Protocol):
    """Where a chain runs. Buffers have the names, shapes and formats of the segments' ports, and are as large as the
    largest port of that name. Calls come from one thread and take effect in order; those that give arrays wait for
    results."""

    seed: int
    """Of the noise."""

    @property
    def ring(self) -> Ring: ...

    # ------------------------------------------------------------------ a pass

    def put(self, name: str, value: Latents | np.ndarray, frame: int | None = None) -> None:
        """Fills a buffer from the host (float32) or from latents; of latents only one latent frame, if one is named."""
        ...

    def open(self, unit: int) -> None:
        """Makes ready for a pass over `unit`: its slots, the ranges that it sees, its positions. EngineError where the
        units before it have not been committed."""
        ...

    def replay(self, name: str, work: Callable[[], None]) -> None:
        """Does `work`, a pass that is the same calls on the same buffers whenever it has this name."""
        ...

    def run(self, segment: str) -> None:
        """A segment, from the buffers of its inputs to those of its outputs."""
        ...

    def append(self, layer: int) -> None:
        """RMS norm and rotation of q and k, rows of the buffer `qkv`; keys and values into the opened unit's slots."""
        ...

    def attend(self, layer: int) -> None:
        """Buffer `attended`: what the appended queries find in the ring."""
        ...

    # ------------------------------------------------------------------ latents and pixels

    def noise(self, unit: int, step: int) -> Latents:
        """Standard normals of the stream's seed (`cfrt.noise`, Purpose.SAMPLE)."""
        ...

    def estimate(self, latents: Latents, s: float) -> Latents:
        """x0 = x - s v of latents x and the buffer `velocity`."""
        ...

    def latents(self, name: str) -> Latents:
        """A buffer as latents of their own, [1, F, C, h, w]."""
        ...

    def pixels(self, skip: int) -> np.ndarray:
        """The buffer `video`, as the last decoder left it, without its first frames: (f, H, W, 3) uint8 on the host."""
        ...

    # ------------------------------------------------------------------ what must be remembered

    def clear(self, prefix: str) -> None:
        """Zeros into the buffers whose names begin so."""
        ...

    def keep(self, prefix: str) -> Any:
        """A copy of those buffers, for `put_back`; nothing that is done later changes it."""
        ...

    def put_back(self, kept: Any) -> None: ...

    def state(self) -> Any:
        """The ring, whole: exact, and independent of what is done later."""
        ...

    def load_state(self, state: Any) -> None: ...

    # ------------------------------------------------------------------ to and from the host

    def fetch(self, prefix: str) -> list[np.ndarray]:
        """Those buffers as fp32, in the order of the ports; `put` is the way back."""
        ...

    def read_keys(self, frame: int) -> np.ndarray:
        """Keys and values of a latent frame that the ring holds, fp32 [layers, 2, N, H, D] (`engines.Memory`)."""
        ...

    def write_keys(self, frame: int, keys: np.ndarray) -> None:
        """The way back; `Ring.hold` makes them count."""
        ...

    def host(self, latents: Latents) -> np.ndarray:
        """Latents as fp32 [1, F, C, h, w]."""
        ...

    def place(self, array: np.ndarray) -> Latents: ...

    def twin(self) -> Self:
        """A second device with the same segments, whose weights it shares."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class SegmentedSnapshot:
    """Everything that later passes depend on."""

    made_by: tuple[str, ...]
    """Engine, and the bundle's own hashes."""
    ring: Any
    decoder: Any
    decoded: int


class SegmentedEngine(ABC):
    """One stream from a bundle. An engine says its name, what it supports, and makes its `Device`."""

    name: ClassVar[str]
    fuses: ClassVar[bool] = False
    features: ClassVar[frozenset[str]] = frozenset()
    precision: str

    @abstractmethod
    def _device(self, spec: Spec, bundle: Bundle) -> Device:
        """Loads the segments and allocates everything; sets `precision`. BundleError when a file is damaged."""

    @classmethod
    def refusal(cls, spec: Spec) -> str | None:
        """What no engine of this kind can do; None when it is up to the engine."""
        if spec.bundle is None:
            return "it runs exported bundles: `python -m export.onnx --model ... --out DIR` makes one"
        if spec.prefix and not spec.bundle.manifest.has("encoder"):
            return "this bundle has no encoder, so its streams cannot start from a picture"
        return None

    def prepare(self, spec: Spec) -> None:
        if spec.bundle is None:
            raise EngineError(f"expected a bundle for the engine {self.name!r}: {self.refusal(spec)}")
        manifest = spec.bundle.manifest
        hashes = (manifest.files[segment.onnx].sha256 for segment in manifest.segments)
        self.connect(self._device(spec, spec.bundle), spec.config, manifest.segments, tuple(hashes))

    def connect(
        self, device: Device, config: ModelConfig, segments: Sequence[Segment], made_by: tuple[str, ...] = ()
    ) -> None:
        """`prepare`, on a device that is ready."""
        names = {segment.name for segment in segments}
        self._on, self._config, self._made_by = device, config, (self.name, *made_by)
        self._starts_apart, self._reads_pictures = "decoder_start" in names, "encoder" in names
        ports = next(segment.inputs for segment in segments if segment.name == "decoder")
        self._state_ports = [port for port in ports if port.name.startswith(STATE)]
        self._start()

    def twin(self) -> Self:
        twin = copy(self)
        twin._on = self._on.twin()
        twin._start()
        return twin

    def _start(self) -> None:
        self._heard = False
        self._decoded = 0  # units decoded: the next one's number
        self._before: tuple[int, Any] = (0, None)

    # ------------------------------------------------------------------ passes

    def set_text(self, unit_context: np.ndarray) -> None:
        self._on.put("rows", np.ascontiguousarray(unit_context, dtype=np.float32))
        self._on.replay("text", partial(self._on.run, "text_kv"))
        self._heard = True

    def noise(self, unit: int, step: int) -> Latents:
        return self._on.noise(unit, step)

    def denoise(self, latents: Latents, t: float, unit: int, commit: Latents | None = None) -> Latents:
        if commit is not None:
            raise EngineError(f"the engine {self.name!r} commits in a pass of its own: call commit first")
        self._open(latents, t, unit)
        self._on.replay("denoise", self._denoise)
        return self._on.estimate(latents, t / TIME_SCALE)

    def commit(self, latents: Latents, unit: int) -> None:
        upcoming = self._on.ring.next_frame // self._config.unit
        if unit < upcoming:  # again: without the frames that the next unit overwrites, whether it already has or not
            with refusals():
                self._on.open(upcoming)
        self._open(latents, 0.0, unit)
        self._on.replay("commit", self._commit)
        self._on.ring.commit(unit)

    def _open(self, latents: Latents, t: float, unit: int) -> None:
        if not self._heard:
            raise EngineError("expected set_text before the first pass")
        with refusals():
            self._on.open(unit)
        self._on.put("latents", latents)
        self._on.put("time", time_embedding([t], self._config.time_width).astype(np.float32))

    def _denoise(self) -> None:
        self._layers(self._config.depth - 1)
        self._on.attend(self._config.depth - 1)
        self._on.run("tail")

    def _commit(self) -> None:
        self._layers(self._config.depth - 1)

    def _layers(self, last: int) -> None:
        """Up to the append of the last layer."""
        self._on.run("head")
        self._on.append(0)
        for layer in range(last):
            self._on.attend(layer)
            self._on.run(f"mid_{layer}")
            self._on.append(layer + 1)

    # ------------------------------------------------------------------ pixels

    def encode(self, image: np.ndarray) -> Latents:
        if not self._reads_pictures:
            raise EngineError("this bundle has no encoder, so its streams cannot start from a picture")
        self._on.put("picture", image.transpose(2, 0, 1).astype(np.float32) / 255)
        self._on.run("encoder")
        return self._on.latents("latent")

    def encode_film(self, frames: np.ndarray) -> list[Latents]:
        raise EngineError(f"the engine {self.name!r} cannot go on from a film; engine='torch' can")

    def decode(self, latents: Latents) -> np.ndarray:
        self._before = (self._decoded, self._on.keep(STATE) if self._decoded else None)
        starts = self._decoded == 0
        parts = [self._decode(latents, frame, starts and frame == 0) for frame in range(self._config.unit)]
        self._decoded += 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _decode(self, latents: Latents, frame: int, first: bool) -> np.ndarray:
        """The first latent frame of a clip is one picture (Wan's time law): all that `decoder_start` gives, or the last
        that a decoder does which has none."""
        self._on.put("latent", latents, frame)
        if first:
            self._on.clear(STATE)
        apart = first and self._starts_apart
        self._on.run("decoder_start" if apart else "decoder")
        return self._on.pixels(skip=self._config.autoencoder.temporal - 1 if first and not apart else 0)

    # ------------------------------------------------------------------ back and forth

    def rewind(self, unit: int) -> None:
        if unit < self._decoded:
            decoded, state = self._before
            if unit != decoded:
                raise EngineError(f"expected to go back to unit {decoded} at most, got {unit}; restore a snapshot")
            self._set_decoder(decoded, state)
        if unit * self._config.unit < self._on.ring.next_frame:
            with refusals():
                self._on.ring.rewind(unit)

    def reseed(self, seed: int) -> None:
        self._on.seed = seed

    def memory(self, frames: Iterable[int]) -> Memory:
        held = set(self._on.ring.held())
        keys = {frame: self._on.read_keys(frame)[:, :, None] for frame in frames if frame in held}
        decoder = tuple(self._on.fetch(STATE)) if self._decoded else ()
        return Memory(unit=self._decoded, keys=keys, decoder=decoder)

    def recall(self, memory: Memory) -> None:
        config = self._config
        shape = (config.depth, 2, 1, config.frame_tokens, config.heads, config.head_dim)
        fit_memory(memory, shape, [port.shape for port in self._state_ports] if memory.unit else [])
        for frame, keys in sorted(memory.keys.items()):
            self._on.write_keys(frame, keys[:, :, 0].astype(np.float32, copy=False))
            with refusals():
                self._on.ring.hold(frame)
        for port, array in zip(self._state_ports, memory.decoder, strict=False):
            self._on.put(port.name, array.astype(np.float32, copy=False))
        self._decoded = memory.unit
        self._before = (memory.unit, self._on.keep(STATE) if memory.unit else None)
        self.rewind(memory.unit)

    def host(self, latents: Latents) -> np.ndarray:
        return self._on.host(latents)

    def place(self, array: np.ndarray) -> Latents:
        return self._on.place(np.ascontiguousarray(array, dtype=np.float32))

    def snapshot(self) -> SegmentedSnapshot:
        decoder = self._on.keep(STATE) if self._decoded else None
        return SegmentedSnapshot(made_by=self._made_by, ring=self._on.state(), decoder=decoder, decoded=self._decoded)

    def restore(self, snapshot: Any) -> None:
        if not isinstance(snapshot, SegmentedSnapshot):
            raise EngineError(f"expected a snapshot of the {self.name} engine, got {type(snapshot).__name__}")
        if snapshot.made_by != self._made_by:
            raise EngineError("expected a snapshot of the same engine and bundle, got another one's")
        with refusals():
            self._on.load_state(snapshot.ring)
        self._set_decoder(snapshot.decoded, snapshot.decoder)
        self._before = (snapshot.decoded, snapshot.decoder)

    def _set_decoder(self, decoded: int, state: Any) -> None:
        self._decoded = decoded
        if state is not None:
            self._on.put_back(state)

    def close(self) -> None:
        if "_on" in self.__dict__:
            self._on.close()
        self.__dict__.clear()


@contextmanager
def refusals() -> Iterator[None]:
    """What the C++ side refuses (ValueError) is an engine's error."""
    try:
        yield
    except ValueError as error:
        raise EngineError(str(error)) from error
