"""The engine for CPUs: the whole unit in C++ (`_cfrt`), no framework.

Kernels exist for plain C++, AVX2, AVX-512 and AVX-512 with BF16 and VNNI, in one binary; the CPU picks, or the
environment variable CFRT_ISA. Bytes are the same for the same seed, precision and level, whatever the number of
threads, and whether commits are fused or not. Latents are fp32 arrays in every precision.
"""

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from _cfrt import Geometry, Noise, engine, kernels

from .. import shapes
from ..config import ModelConfig
from ..errors import EngineError, WeightsError
from ..noise import Purpose
from ..weights import match, part
from . import Memory, Spec, fit_memory

Precision = Literal["fp32", "bf16", "int8"]
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
HEAD_MULTIPLE = 16
"""Numbers by which a head is rounded up in memory (csrc/cpu/dit_weights.h)."""


@dataclass(frozen=True, kw_only=True)
class NativeSnapshot:
    """Everything that later passes depend on; nothing in it is ever written to."""

    ring: bytes
    decoded: int
    previous: np.ndarray | None
    """The last latent frame decoded: all that the decoder remembers."""


class NativeEngine:
    """One stream. Latents are float32 arrays [1, F, C, h, w]."""

    name: ClassVar[str] = "native"
    fuses: ClassVar[bool] = True
    features: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def supported(cls, spec: Spec) -> str | None:
        kind = spec.config.autoencoder.kind
        if kind != "tiny":
            return f"it has no video autoencoder of kind {kind!r}"
        if spec.device not in ("auto", "cpu"):
            return f"it runs on cpu, not on {spec.device!r}"
        if spec.precision not in ("auto", *PRECISIONS):
            return f"it computes in {', '.join(PRECISIONS)}, not in {spec.precision!r}"
        return None

    def prepare(self, spec: Spec) -> None:
        self.precision = self._resolved(spec.precision)
        dit = part(spec.weights, "dit")
        match(shapes.dit(spec.config), dit)
        with _as_engine_errors():
            threads = kernels.Threads(spec.threads or physical_cores())
            self._dit = engine.Dit(_dit_config(spec.config), _Finite(dit), self.precision, threads)
            self._autoencoder = self._packed(spec, threads)
        self._start(spec)

    def _packed(self, spec: Spec, threads: kernels.Threads) -> kernels.Autoencoder:
        autoencoder = part(spec.weights, "autoencoder")
        match(shapes.autoencoder(spec.config.autoencoder), autoencoder)
        return kernels.Autoencoder(
            dict(_Finite(autoencoder)),
            channels=spec.config.latent_channels,
            grid=spec.config.latent_grid,
            widths=spec.config.autoencoder.widths,
            precision=self.precision,
            frames=spec.config.unit,
            threads=threads,
        )

    def _start(self, spec: Spec) -> None:
        """The beginning of a stream; the networks are there already."""
        self._spec, self._config, self._seed = spec, spec.config, spec.seed
        self._decoded = 0  # units decoded: the next one's number
        self._previous: np.ndarray | None = None
        self._before: tuple[int, np.ndarray | None] = (0, None)

    def twin(self) -> "NativeEngine":
        """Packed weights are in memory once."""
        twin = NativeEngine()
        twin.precision = self.precision
        threads = kernels.Threads(self._spec.threads or physical_cores())
        twin._dit, twin._autoencoder = self._dit.twin(threads), self._autoencoder.twin(threads)
        twin._start(self._spec)
        return twin

    @staticmethod
    def _resolved(precision: str) -> Precision:
        """What "auto" means: the fastest precision that costs no quality that can be measured.

        The embedded student of two steps, one thread of an AMD EPYC with BF16, fused, decode included, ms a unit in
        fp32, bf16, int8 (measured on 2026-11-25): 3.6, 1.5, 1.0. By the card's own measures bf16 lost nothing to fp32
        there, and int8 half a point of valid frames (benchmarks/results/quality.json), so int8 is for those who ask.
        Without BF16 products bf16 saves no time in the decoder, and fp32 is exact."""
        return next((known for known in PRECISIONS if known == precision), "bf16" if bf16_is_fast() else "fp32")

    def set_text(self, unit_context: np.ndarray) -> None:
        with _as_engine_errors():
            self._dit.set_text(np.ascontiguousarray(unit_context, dtype=np.float32))

    def noise(self, unit: int, step: int) -> np.ndarray:
        config = self._config
        shape = (1, config.unit, config.latent_channels, *config.latent_grid)
        return Noise(self._seed, unit, step, Purpose.SAMPLE).normal(int(np.prod(shape))).reshape(shape)

    def denoise(self, latents: np.ndarray, t: float, unit: int, commit: np.ndarray | None = None) -> np.ndarray:
        x0 = np.empty_like(latents)
        with _as_engine_errors():
            self._dit.denoise(latents, t, unit, x0, commit)
        return x0

    def commit(self, latents: np.ndarray, unit: int) -> None:
        with _as_engine_errors():
            self._dit.commit(latents, unit)

    def encode(self, image: np.ndarray) -> np.ndarray:
        return self._autoencoder.encode(np.ascontiguousarray(image))[None, None]

    def decode(self, latents: np.ndarray) -> np.ndarray:
        self._before = (self._decoded, self._previous)
        pixels = self._autoencoder.decode(latents[0], self._previous)
        self._decoded, self._previous = self._decoded + 1, latents[0, -1]
        return pixels

    def rewind(self, unit: int) -> None:
        if unit < self._decoded:
            decoded, previous = self._before
            if unit != decoded:
                raise EngineError(f"expected to go back to unit {decoded} at most, got {unit}; restore a snapshot")
            self._decoded, self._previous = decoded, previous
        if unit * self._config.unit < self._dit.next_frame:
            with _as_engine_errors():
                self._dit.rewind(unit)

    def reseed(self, seed: int) -> None:
        self._seed = seed

    def memory(self, frames: Iterable[int]) -> Memory:
        """Heads are filled up with zeros in memory, which stay here."""
        dim = self._config.head_dim
        read = ((frame, self._dit.read(frame)) for frame in frames)
        keys = {frame: kv[:, :, None, ..., :dim].copy() for frame, kv in read if kv is not None}
        decoder = () if self._previous is None else (self._previous[None],)
        return Memory(unit=self._decoded, keys=keys, decoder=decoder)

    def recall(self, memory: Memory) -> None:
        config = self._config
        shape = (config.depth, 2, 1, config.frame_tokens, config.heads, config.head_dim)
        fit_memory(memory, shape, [] if memory.unit == 0 else [(1, config.latent_channels, *config.latent_grid)])
        padding = [*[(0, 0)] * 4, (0, -config.head_dim % HEAD_MULTIPLE)]
        for frame, kv in sorted(memory.keys.items()):
            with _as_engine_errors():
                self._dit.write(frame, np.pad(kv[:, :, 0].astype(np.float32), padding))
        previous = memory.decoder[0][0].astype(np.float32) if memory.decoder else None
        self._decoded, self._previous = memory.unit, previous
        self._before = (memory.unit, previous)
        self.rewind(memory.unit)

    def host(self, latents: np.ndarray) -> np.ndarray:
        return latents

    def place(self, array: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(array, dtype=np.float32)

    def snapshot(self) -> NativeSnapshot:
        return NativeSnapshot(ring=self._dit.state(), decoded=self._decoded, previous=self._previous)

    def restore(self, snapshot: Any) -> None:
        if not isinstance(snapshot, NativeSnapshot):
            raise EngineError(f"expected a snapshot of the native engine, got {type(snapshot).__name__}")
        with _as_engine_errors():
            self._dit.load(snapshot.ring)
        self._decoded, self._previous = snapshot.decoded, snapshot.previous
        self._before = (snapshot.decoded, snapshot.previous)

    def close(self) -> None:
        self.__dict__.clear()


def bf16_is_fast() -> bool:
    """Has this processor products of bf16? EngineError where it lacks what it was told to use."""
    with _as_engine_errors():
        return kernels.isa() == "avx512bf16"


def physical_cores() -> int:
    """Cores that this process may run on, each counted once however many threads it offers."""
    usable = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    return len({_siblings(cpu) for cpu in usable})


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def processor() -> dict[str, Any]:
    """Instruction set levels of this build and CPU, the one in use, and what a stream gets where it asks for nothing.

    EngineError when CFRT_ISA names a level that is not there."""
    precision = NativeEngine._resolved("auto")
    return {"levels": kernels.isas(), "isa": kernels.isa(), "threads": physical_cores(), "precision": precision}


class _Finite(Mapping[str, np.ndarray]):
    """Tensors as fp32, looked through when they are asked for: a stream of NaNs would only be black frames."""

    def __init__(self, tensors: Mapping[str, np.ndarray]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = np.ascontiguousarray(self._tensors[name], dtype=np.float32)
        if not np.isfinite(tensor).all():
            raise WeightsError(f"{name} holds values that are not finite; the weights are damaged, fetch them again")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _dit_config(config: ModelConfig) -> engine.DitConfig:
    return engine.DitConfig(
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        ffn=config.ffn,
        time_width=config.time_width,
        text_width=config.text.width,
        text_rows=config.text.length,
        channels=config.latent_channels,
        grid=config.latent_grid,
        patch=config.patch[1:],
        geometry=Geometry(unit=config.unit, window=config.window, sinks=config.sinks),
        rope_pairs=config.rope_pairs,
        rope_theta=config.rope_theta,
        relative_sinks=config.sink_position == "relative",
        trained_frames=config.trained_frames,
        eps=config.eps,
    )


@contextmanager
def _as_engine_errors() -> Iterator[None]:
    """What the C++ side refuses (ValueError) is an engine's error."""
    try:
        yield
    except ValueError as error:
        raise EngineError(str(error)) from error
