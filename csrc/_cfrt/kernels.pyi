"""The CPU kernels one by one, for tests and benchmarks. bf16 travels as uint16."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from . import _Bound

_Precision = Literal["fp32", "bf16", "int8"]

def isas() -> list[str]: ...
def isa(name: str | None = None) -> str: ...

class Threads(metaclass=_Bound):
    def __init__(self, count: int) -> None: ...
    @property
    def count(self) -> int: ...

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
