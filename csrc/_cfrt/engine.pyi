"""The native engine's parts. One thread at a time may call an object."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from . import Geometry, _Bound
from .kernels import Threads, _Precision

_Bytes = bytes

class DitConfig(metaclass=_Bound):
    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        ffn: int,
        time_width: int,
        text_width: int,
        text_rows: int,
        channels: int,
        grid: tuple[int, int],
        patch: tuple[int, int],
        geometry: Geometry,
        rope_pairs: tuple[int, int, int],
        rope_theta: float,
        relative_sinks: bool,
        trained_frames: int,
        eps: float,
    ) -> None: ...

class Dit(metaclass=_Bound):
    def __init__(
        self,
        config: DitConfig,
        tensors: Mapping[str, NDArray[np.float32]],
        precision: _Precision,
        threads: Threads,
        *,
        isa: str | None = None,
    ) -> None: ...
    def set_text(self, rows: NDArray[np.float32]) -> None: ...
    def denoise(
        self,
        x: NDArray[np.float32],
        t: float,
        unit: int,
        out: NDArray[np.float32],
        clean: NDArray[np.float32] | None,
    ) -> None: ...
    def commit(self, x: NDArray[np.float32], unit: int) -> None: ...
    def twin(self, threads: Threads) -> Dit: ...
    def rewind(self, unit: int) -> None: ...
    def read(self, frame: int) -> NDArray[np.float32] | None: ...
    def write(self, frame: int, kv: NDArray[np.float32]) -> None: ...
    @property
    def next_frame(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def state(self) -> _Bytes: ...
    def load(self, state: _Bytes) -> None: ...
