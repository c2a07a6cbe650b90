"""A latent frame's keys and values in the ring of the CUDA kernels, to plain arrays and back: on the host, in numpy.

Where the bytes lie is csrc/cuda/attention.h: granules of 32 rows of bf16, or of 64 rows with keys in int8, a scale for
each granule and head, and values in e4m3, transposed, their tokens in the order that the tensor cores want. What is
read and written again comes out as it was, bit for bit.
"""

import numpy as np

TO_FP32 = 16
"""Bits that bf16 leaves off."""


def encoded(array: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 numbers in a format of ports; bf16 as its bits, to nearest even."""
    if dtype == "fp32":
        return np.ascontiguousarray(array, dtype=np.float32)
    if dtype == "fp16":
        return array.astype(np.float16)
    bits = np.ascontiguousarray(array, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> TO_FP32 & 1)) >> TO_FP32).astype(np.uint16)


def decoded(data: np.ndarray, dtype: str) -> np.ndarray:
    """The way back, from bytes."""
    if dtype == "bf16":
        return (data.view(np.uint16).astype(np.uint32) << TO_FP32).view(np.float32)
    return data.view(np.float32 if dtype == "fp32" else np.float16).astype(np.float32)


class Bf16:
    """Granules [g][H][32][D] of bf16, for keys and for values."""

    rows = 32

    def __init__(self, tokens: int, heads: int, dim: int) -> None:
        self._tokens, self._heads, self._dim = tokens, heads, dim
        self._granules = -(-tokens // self.rows)
        size = self._granules * heads * self.rows * dim * 2
        self.sizes = (size, size, 0)
        """Bytes of a frame's keys, values and scales of keys."""

    def unpack(self, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """fp32 [2, N, H, D] of a frame's bytes."""
        return np.stack([self._plain(decoded(part, "bf16")) for part in (k, v)])

    def pack(self, k: np.ndarray, v: np.ndarray, scales: np.ndarray | None) -> list[np.ndarray]:
        """The way back, of [N, H, D] each."""
        return [encoded(self._in_granules(part), "bf16") for part in (k, v)]

    def _plain(self, x: np.ndarray) -> np.ndarray:
        """[N, H, D] of [g, H, rows, D]."""
        wide = x.reshape(self._granules, self._heads, self.rows, self._dim).transpose(0, 2, 1, 3)
        return wide.reshape(-1, self._heads, self._dim)[: self._tokens]

    def _in_granules(self, x: np.ndarray) -> np.ndarray:
        padded = np.zeros((self._granules * self.rows, self._heads, self._dim), np.float32)
        padded[: self._tokens] = x
        return padded.reshape(self._granules, self.rows, self._heads, self._dim).transpose(0, 2, 1, 3)


class Int8(Bf16):
    """Granules of 64 rows: keys int8 [g][H][64][D] and their scales [g][H]; values e4m3 [g][H][D][64]."""

    rows = 64

    def __init__(self, tokens: int, heads: int, dim: int) -> None:
        super().__init__(tokens, heads, dim)
        size = self._granules * heads * self.rows * dim
        self.sizes = (size, size, self._granules * heads * 4)

    def unpack(self, k: np.ndarray, v: np.ndarray, *rest: np.ndarray) -> np.ndarray:
        """rest: scales of the frame's keys, as bytes, and of all values, [H D]."""
        scale, value_scale = rest[0].view(np.float32).reshape(self._granules, self._heads, 1, 1), rest[1]
        keys = k.view(np.int8).reshape(self._granules, self._heads, self.rows, self._dim) * scale
        values = E4M3[v].reshape(self._granules, self._heads, self._dim, self.rows)[..., ORDER].transpose(0, 1, 3, 2)
        plain = self._plain(values) * value_scale.reshape(self._heads, self._dim)
        return np.stack([self._plain(keys), plain])

    def pack(self, k: np.ndarray, v: np.ndarray, scales: np.ndarray | None) -> list[np.ndarray]:
        assert scales is not None
        wide = self._in_granules(k)
        scale = np.maximum(np.abs(wide).max(axis=(2, 3)), LEAST_RANGE) / np.float32(127)
        keys = np.rint(wide / scale[..., None, None]).astype(np.int8)
        values = self._in_granules(v / scales.reshape(self._heads, self._dim)).transpose(0, 1, 3, 2)
        ordered = np.empty_like(values)
        ordered[..., ORDER] = values
        return [keys, _e4m3(ordered), scale.astype(np.float32)]


def as_held(k: np.ndarray, v: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `Int8` gives back of a frame's keys and values [..., N, H, D], by the scales of values [H, D]."""
    whole = [k[..., first : first + Int8.rows, :, :] for first in range(0, k.shape[-3], Int8.rows)]
    keys = np.concatenate([_in_steps(granule, (-3, -1)) for granule in whole], axis=-3)
    return keys, E4M3[_e4m3(v / scales)] * scales


def queries_as_held(q: np.ndarray) -> np.ndarray:
    """Queries [..., H, D] as the attention over such a ring takes them: int8, a scale for each row of a head."""
    return _in_steps(q, (-1,))


def _in_steps(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """In 127 steps up to the largest along these axes."""
    scale = np.maximum(np.abs(x).max(axis=axes, keepdims=True), LEAST_RANGE) / np.float32(127)
    steps: np.ndarray = np.rint(x / scale) * scale
    return steps


LEAST_RANGE = np.float32(1e-12)
"""Of keys, so that scales are positive, as in csrc/cuda/eight.cuh."""


def _order() -> np.ndarray:
    """Where token t of 64 lies among transposed values: cfrt_fp8_position."""
    token = np.arange(64)
    within, quad = token % 16, token % 8 // 2
    return token // 16 * 16 + 4 * quad + 2 * (within // 8) + within % 2


def _table() -> np.ndarray:
    """The 256 numbers of e4m3, fp32."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    size = np.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[exponent * 8 + mantissa == 127] = np.nan
    return np.where(bits < 128, size, -size).astype(np.float32)


ORDER, E4M3 = _order(), _table()


def _e4m3(x: np.ndarray) -> np.ndarray:
    """Bits of the nearest numbers, uint8."""
    sizes = E4M3[:127]
    middles = (sizes[1:] + sizes[:-1]) / 2
    bits = np.searchsorted(middles, np.abs(x)).astype(np.uint8)
    return np.where(np.signbit(x), bits | 128, bits).astype(np.uint8)
