"""Whether every CUDA kernel is right on a device: each against fp64 or its CPU twin, through `_cfrt.cuda`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import _cfrt
from cfrt import noise

from .exact import from_bf16, normal, to_bf16
from .ring_stream import DeviceMemory, RingStream

LIMITS = {"bf16": 0.006, "int8": 0.06}
"""Of |out - exact| / |exact| over a unit, `exact` in fp64 without any rounding: about 1.5 times what rounding to bf16,
and to 8 bits with one scale a row, a granule and a channel, makes of it."""
UNITS = 7


@dataclass(frozen=True)
class Check:
    kernel: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # NaN is not


def check_all(cuda: Any, memory: DeviceMemory, *, full_size: bool) -> Iterator[Check]:
    """Every kernel. full_size: frames are Wan 1.3B's, too many for the executor; two heads, for the sake of fp64."""
    for stream in streams(full_size):
        yield check_stream(cuda, memory, stream)
    yield from (check(cuda, memory) for check in (check_renoise, check_combine, check_pixels, check_rows))


def streams(full_size: bool) -> list[RingStream]:
    """Both storages and head sizes, F = 1 and 3, with and without sinks and their own view; windows that wrap."""
    grid, heads = ((30, 52), 2) if full_size else ((5, 9), 1)
    common = {"grid": grid, "heads": heads}
    return [
        RingStream(dim=128, window=3, sinks=1, sink_view=2, splits=4, **common),
        RingStream(dim=64, unit=3, window=6, sinks=0, splits=1, **common),
        RingStream("int8", dim=128, window=3, sinks=1, sink_view=2, splits=4, **common),
        RingStream("int8", "fp16", dim=64, unit=3, window=3, sinks=0, splits=2, **common),
    ]


def check_stream(cuda: Any, memory: DeviceMemory, stream: RingStream) -> Check:
    """Append, attention, its parts' merge and the ring, over units that fill the window and wrap."""
    stream.start(memory)
    stream.calibrate(cuda, UNITS)
    worst = 0.0
    for unit, exact in enumerate(stream.exact(UNITS)):
        error = np.linalg.norm(stream.step(cuda, unit) - exact) / np.linalg.norm(exact)
        worst = max(worst, float(error)) if error == error else float("nan")
    sums = f", {stream.accumulate} sums" if stream.int8 else ""
    return Check(f"append and attention, {stream.storage}{sums}, heads of {stream.dim}", worst, LIMITS[stream.storage])


def check_renoise(cuda: Any, memory: DeviceMemory) -> Check:
    """s = 1: the noise itself, which has to be the host's to 2 ulp."""
    count, key = 10_007, (2**63 + 5, 7, 2, 0)
    x0, out = memory.put(np.zeros(count, np.float32)), memory.empty((count,), np.float32)
    cuda.renoise(out.address, x0.address, count, "float32", 1.0, _cfrt.Noise(*key))
    wanted = noise.normal(*key, (count,))
    return Check("renoise", float((np.abs(out.get() - wanted) / np.spacing(np.abs(wanted))).max()), 2)


def check_combine(cuda: Any, memory: DeviceMemory) -> Check:
    """Exactly as fp32 numbers do it."""
    x, y = (normal(seed, 10_007) for seed in (6, 7))
    buffers = [memory.put(x), memory.put(y), memory.empty(x.shape, np.float32)]
    at = dict(zip(("x", "y", "out"), (buffer.address for buffer in buffers), strict=True))
    cuda.combine(**at, a=0.3, b=-1.7, count=x.size, stream=0)
    return Check("combine", float(np.abs(buffers[2].get() - (np.float32(0.3) * x + np.float32(-1.7) * y)).max()), 0)


def check_pixels(cuda: Any, memory: DeviceMemory) -> Check:
    x = normal(3, 2, 3, 1156).astype(np.float32)
    source, out = memory.put(x), memory.empty((2, 1156, 3), np.uint8)
    sizes = {"frames": 2, "plane": 1156, "gain": 0.5, "offset": 0.5}
    cuda.pixels(out=out.address, x=source.address, dtype="float32", **sizes, stream=0)
    positions = np.ascontiguousarray(x.reshape(6, 1, 1156).transpose(1, 2, 0))
    twin = _cfrt.kernels.pixels(positions, frames=2, fold=1, gain=0.5, offset=0.5).reshape(2, 1156, 3)
    return Check("pixels", float(np.abs(out.get().astype(int) - twin).max()), 0)


def check_rows(cuda: Any, memory: DeviceMemory) -> Check:
    """The error in steps of a row: half of one is rounding."""
    rows, width = 33, 1536
    x = from_bf16(to_bf16(normal(5, rows, width) * np.linspace(0.01, 30, rows, dtype=np.float32)[:, None]))
    source = memory.put(to_bf16(x))
    out, scale = memory.empty((rows, width), np.int8), memory.empty((rows,), np.float32)
    sizes = {"rows": rows, "width": width, "stride": width}
    cuda.quantise_rows(out=out.address, scale=scale.address, x=source.address, **sizes, stream=0)
    return Check("quantise rows", float(np.abs(out.get() - x / scale.get()[:, None]).max()), 0.501)
