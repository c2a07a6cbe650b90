"""The CPU kernels one by one, for tests and benchmarks. bf16 travels as uint16."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import Geometry, _Bound

_Precision = Literal["fp32", "bf16", "int8"]
_Bytes = bytes

def isas() -> list[str]: ...
def isa(name: str | None = None) -> str: ...

class Threads(metaclass=_Bound):
    def __init__(self, count: int) -> None: ...
    @property
    def count(self) -> int: ...
    def fork_join(self, rounds: int) -> None: ...

def ceiling(precision: _Precision, rounds: int, *, isa: str | None = None) -> int: ...

class Weights(metaclass=_Bound):
    def __init__(
        self, w: NDArray[np.float32], precision: _Precision, *, isa: str | None = None, threads: Threads | None = None
    ) -> None: ...
    @property
    def bytes(self) -> int: ...

class Rows(metaclass=_Bound):
    def __init__(self, x: NDArray[np.float32], precision: _Precision, *, isa: str | None = None) -> None: ...
    @property
    def values(self) -> NDArray[np.float32]: ...
    @property
    def scale(self) -> NDArray[np.float32]: ...

def gemm(
    rows: Rows,
    weights: Weights,
    out: NDArray[np.float32] | NDArray[np.uint16],
    *,
    bias: NDArray[np.float32] | None = None,
    epilogue: Literal["none", "gelu", "silu", "add", "gate"] = "none",
    gate: NDArray[np.float32] | None = None,
    gate_rows: int = 1,
    threads: Threads | None = None,
) -> None: ...

# ---------------------------------------------------------------------- the ring, attention, pointwise

class KeyValues(metaclass=_Bound):
    def __init__(
        self, k: NDArray[np.float32], v: NDArray[np.float32], precision: _Precision, *, isa: str | None = None
    ) -> None: ...
    @property
    def rows(self) -> int: ...

class Ring(metaclass=_Bound):
    def __init__(
        self, geometry: Geometry, *, frame_tokens: int, layers: int, heads: int, dim: int, precision: _Precision
    ) -> None: ...
    def open(self, unit: int) -> tuple[list[tuple[int, int]], int, list[int]]: ...
    def commit(self, unit: int) -> None: ...
    def rewind(self, unit: int) -> None: ...
    def hold(self, frame: int) -> None: ...
    def held(self) -> list[int]: ...
    def clear(self) -> None: ...
    @property
    def next_frame(self) -> int: ...
    @property
    def bytes(self) -> int: ...
    def layer(self, layer: int) -> KeyValues: ...
    def write(
        self, layer: int, frame: int, k: NDArray[np.float32], v: NDArray[np.float32], *, isa: str | None = None
    ) -> None: ...
    def read(self, layer: int, frame: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
    def state(self) -> _Bytes: ...
    def load(self, state: _Bytes) -> None: ...

def attention(
    q: NDArray[np.float32],
    kv: KeyValues,
    out: NDArray[np.float32] | NDArray[np.uint16],
    *,
    ranges: Sequence[tuple[int, int]],
    q_sink: NDArray[np.float32] | None = None,
    sink_rows: int = 0,
    isa: str | None = None,
    threads: Threads | None = None,
) -> None: ...
def layer_norm(
    x: NDArray[np.float32],
    gain: NDArray[np.float32],
    shift: NDArray[np.float32],
    eps: float,
    *,
    precision: _Precision = "fp32",
    group_rows: int,
    depth: int = 0,
    isa: str | None = None,
    threads: Threads | None = None,
) -> Any: ...
def queries(
    x: NDArray[np.float32],
    heads: int,
    *,
    weight: NDArray[np.float32] | None = None,
    eps: float = 0.0,
    turn: NDArray[np.float32] | None = None,
    sink_turn: NDArray[np.float32] | None = None,
    isa: str | None = None,
    threads: Threads | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]: ...
def append(
    kv: KeyValues,
    place: Sequence[int],
    k: NDArray[np.float32],
    v: NDArray[np.float32],
    *,
    weight: NDArray[np.float32] | None = None,
    eps: float = 0.0,
    turn: NDArray[np.float32] | None = None,
    isa: str | None = None,
    threads: Threads | None = None,
) -> None: ...
def modulation(
    time: NDArray[np.float32], table: NDArray[np.float32], ones: int, *, isa: str | None = None
) -> NDArray[np.float32]: ...
def pixels(
    x: NDArray[np.float32],
    *,
    frames: int,
    fold: int,
    gain: float,
    offset: float,
    first_frame: int = 0,
    isa: str | None = None,
    threads: Threads | None = None,
) -> NDArray[np.uint8]: ...
def silu(x: NDArray[np.float32], *, isa: str | None = None) -> NDArray[np.float32]: ...
def gelu(x: NDArray[np.float32], *, isa: str | None = None) -> NDArray[np.float32]: ...
def patchify(latents: NDArray[np.float32], patch: tuple[int, int]) -> NDArray[np.float32]: ...
def unpatchify(
    rows: NDArray[np.float32], channels: int, grid: tuple[int, int], patch: tuple[int, int]
) -> NDArray[np.float32]: ...
def estimate_x0(
    x: NDArray[np.float32], rows: NDArray[np.float32], s: float, patch: tuple[int, int]
) -> NDArray[np.float32]: ...
def turns(
    positions: Sequence[int], grid: tuple[int, int], pairs: tuple[int, int, int], theta: float
) -> NDArray[np.float32]: ...
def time_features(t: float, width: int) -> NDArray[np.float32]: ...

# ---------------------------------------------------------------------- the small autoencoder

class Autoencoder(metaclass=_Bound):
    def __init__(
        self,
        tensors: Mapping[str, NDArray[np.float32]],
        *,
        channels: int,
        grid: tuple[int, int],
        widths: Sequence[int],
        precision: _Precision,
        frames: int = 1,
        threads: Threads | int = 1,
        isa: str | None = None,
    ) -> None: ...
    def decode(
        self, latents: NDArray[np.float32], previous: NDArray[np.float32] | None = None
    ) -> NDArray[np.uint8]: ...
    def encode(self, picture: NDArray[np.uint8]) -> NDArray[np.float32]: ...
    def twin(self, threads: Threads | int = 1) -> Autoencoder: ...
    @property
    def bytes(self) -> int: ...
