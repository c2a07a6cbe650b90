"""The CUDA kernels, on device pointers (integers, 0 for NULL) and a stream. ValueError for what does not fit together,
RuntimeError where CUDA refuses."""

from collections.abc import Sequence
from typing import Literal

from . import Geometry, Noise, _Bound

_Storage = Literal["bf16", "int8"]

fp16_limit: float
record_bytes: int

def least_driver() -> int: ...
def refusal(device: int, storage: _Storage = "bf16") -> str | None: ...
def processors(device: int) -> int: ...
def plan(
    *, queries: int, heads: int, dim: int, pieces: Sequence[tuple[int, int]], processors: int
) -> tuple[int, int]: ...
def attention(
    *,
    storage: _Storage = "bf16",
    q: int,
    q_sink: int = 0,
    k: int,
    v: int,
    out: int,
    scratch: int = 0,
    q_scale: int = 0,
    q_sink_scale: int = 0,
    k_scale: int = 0,
    v_scale: int = 0,
    q_stride: int,
    out_stride: int,
    row_stride: int = 0,
    queries: int,
    heads: int,
    dim: int,
    splits: int,
    pieces: Sequence[tuple[int, int]] = [],
    sink_pieces: int = 0,
    record: int = 0,
    scale: float,
    accumulate: Literal["fp32", "fp16"] = "fp32",
    stream: int,
) -> None: ...
def append(
    *,
    storage: _Storage = "bf16",
    q: int,
    k: int,
    v: int,
    stride: int,
    q_weight: int,
    k_weight: int,
    q_out: int,
    q_sink_out: int = 0,
    k_out: int,
    v_out: int,
    q_scale: int = 0,
    q_sink_scale: int = 0,
    k_scale: int = 0,
    v_scale: int = 0,
    scratch: int = 0,
    heads: int,
    dim: int,
    frames: int,
    rows: int,
    columns: int,
    place: Sequence[int] = [],
    first_frame: int = 0,
    last_sink_view: int = 0,
    record: int = 0,
    pairs: Sequence[int],
    theta: float,
    eps: float,
    stream: int,
) -> None: ...
def renoise(
    out: int, x0: int, count: int, dtype: str, s: float, noise: Noise, record: int = 0, stream: int = 0
) -> None: ...
def combine(*, out: int, x: int, a: float, y: int, b: float, count: int, stream: int) -> None: ...
def pixels(
    *, out: int, x: int, dtype: str, frames: int, plane: int, gain: float, offset: float, stream: int
) -> None: ...
def quantise_rows(*, out: int, scale: int, x: int, rows: int, width: int, stride: int, stream: int) -> None: ...
def value_scales(*, scale: int, v: int, rows: int, width: int, stride: int, limit: float, stream: int) -> None: ...

class Pass(metaclass=_Bound):
    def __init__(self, *args: object, **kwargs: object) -> None: ...
    @property
    def pieces(self) -> list[tuple[int, int]]: ...
    @property
    def sink_pieces(self) -> int: ...
    @property
    def place(self) -> list[int]: ...
    @property
    def first_frame(self) -> int: ...
    @property
    def unit(self) -> int: ...
    @property
    def seed(self) -> int: ...
    @property
    def record(self) -> bytes: ...

class Ring(metaclass=_Bound):
    def __init__(
        self, geometry: Geometry, *, frame_tokens: int, layers: int, heads: int, dim: int, int8: bool = False
    ) -> None: ...
    @property
    def bytes(self) -> int: ...
    def layer(self, layer: int) -> tuple[int, int, int]: ...
    def open(self, unit: int, seed: int = 0) -> Pass: ...
    def commit(self, unit: int) -> None: ...
    def rewind(self, unit: int) -> None: ...
    def hold(self, frame: int) -> None: ...
    def clear(self) -> None: ...
    def held(self) -> list[int]: ...
    @property
    def next_frame(self) -> int: ...
    def state(self) -> list[int]: ...
    def load(self, state: Sequence[int]) -> None: ...
