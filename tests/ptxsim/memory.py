"""Global memory: numpy arrays at their own addresses, with space around them that a kernel must not touch."""

from dataclasses import dataclass

import numpy as np

ALIGNMENT = 256  # what cudaMalloc gives
GUARD = 1 << 16  # bytes before and after, so that a wrong index does not land in another buffer
_RANGE = np.dtype([("address", np.uint64), ("bytes", np.uint64), ("written", np.uint64)])


@dataclass(frozen=True)
class Buffer:
    """A range of global memory. `array` is the memory itself: what a kernel wrote is there."""

    array: np.ndarray
    written: np.ndarray | None  # one byte per byte, where reading before writing is an error

    @property
    def address(self) -> int:
        return self.array.ctypes.data

    @property
    def nbytes(self) -> int:
        return self.array.nbytes


class Memory:
    """What kernels may touch. Everything else is out of bounds."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []

    def put(self, values: np.ndarray, offset: int = 0) -> Buffer:
        """A copy of `values`; `offset` bytes past the alignment of cudaMalloc."""
        buffer = Buffer(_allocate(values.shape, values.dtype, offset), None)
        buffer.array[...] = values
        self.buffers.append(buffer)
        return buffer

    def empty(self, shape: int | tuple[int, ...], dtype: np.typing.DTypeLike, offset: int = 0) -> Buffer:
        """Memory that nobody has written: all ones, NaN as a float. Reading it is a finding, writing defines it."""
        array = _allocate(shape if isinstance(shape, tuple) else (shape,), np.dtype(dtype), offset)
        array.view(np.uint8)[...] = 0xFF
        buffer = Buffer(array, np.zeros(array.nbytes, np.uint8))
        self.buffers.append(buffer)
        return buffer

    def free(self, buffer: Buffer) -> None:
        self.buffers.remove(buffer)

    def ranges(self) -> np.ndarray:
        rows = [
            (b.address, b.nbytes, 0 if b.written is None else b.written.ctypes.data) for b in self.buffers if b.nbytes
        ]
        return np.array(rows, _RANGE)


def _allocate(shape: tuple[int, ...], dtype: np.dtype, offset: int) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(count + 2 * GUARD + ALIGNMENT + offset, np.uint8)
    start = GUARD + (-(raw.ctypes.data + GUARD) % ALIGNMENT) + offset
    return raw[start : start + count].view(dtype).reshape(shape)
