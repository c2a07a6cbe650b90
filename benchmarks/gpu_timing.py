"""Medians of the CUDA kernels and of what others offer, over Wan 1.3B's shapes.

Inputs rotate through several copies and the second-level cache is overwritten between calls, so that keys come from
memory as they do between the layers of a model. A device's peak is what its tensor cores do at the clock that it runs.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from .exact import formula, from_bf16, to_bf16
from .ring_stream import DeviceMemory

HEADS, DIM, FRAME_TOKENS = 12, 128, 1560
SHAPES = [(q, kv) for q in (FRAME_TOKENS, 3 * FRAME_TOKENS) for kv in (14040, 32760)]
COPIES, REPEATS = 3, 30
BF16_OPERATIONS = {80: 2048, 86: 512, 89: 512, 90: 4096, 100: 8192, 120: 512}
"""Of a multiprocessor and clock, dense, fp32 sums. NVIDIA's data sheets divided by multiprocessors and boost clock."""
FASTER = {"int8": {"fp32": 8 / 3, "fp16": 4}}
"""Of GeForce's sm_89 and sm_120 against bf16: int8 products four times as fast, e4m3 ones twice with fp32 sums and four
times with fp16 ones; attention does as many of either."""

Call = Callable[[], object]


class Clock(Protocol):
    def milliseconds(self, call: Call) -> float:
        """Of one call, with the second-level cache overwritten before it."""


@dataclass(frozen=True)
class Timing:
    name: str
    queries: int
    keys: int
    milliseconds: float | None
    """Median; None where it is not installed or refuses, which `note` says."""
    tflops: float | None = None
    share_of_peak: float | None = None
    note: str = ""


def median(clock: Clock, calls: Sequence[Call], repeats: int) -> float:
    """Of the calls in turn, after one round that is not counted."""
    return medians(clock, [calls], repeats)[0]


def medians(clock: Clock, contenders: Sequence[Sequence[Call]], repeats: int) -> list[float]:
    """Of several, which take turns."""
    for call in (call for calls in contenders for call in calls):
        call()
    times = [[clock.milliseconds(calls[i % len(calls)]) for calls in contenders] for i in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def peak(capability: int, processors: int, gigahertz: float, storage: str, accumulate: str) -> float | None:
    """TFLOP/s at that clock; None where it is not known for this kind of product."""
    operations = BF16_OPERATIONS.get(capability)
    if operations is None or (storage == "int8" and capability not in (89, 120)):
        return None
    faster = FASTER[storage][accumulate] if storage == "int8" else 1
    return operations * faster * processors * gigahertz / 1000


@dataclass(frozen=True)
class Card:
    name: str
    capability: int
    processors: int
    gigahertz: float


def attention_timings(
    cuda: Any, memory: DeviceMemory, clock: Clock, card: Card, shapes: Sequence[tuple[int, int]] = tuple(SHAPES),
    *, heads: int = HEADS, frame_tokens: int = FRAME_TOKENS, repeats: int = REPEATS,
) -> Iterator[Timing]:  # fmt: skip
    """Our kernels, on rings full of numbers."""
    for queries, keys in shapes:
        for storage, accumulate in (("bf16", "fp32"), ("int8", "fp32"), ("int8", "fp16")):
            name = f"cfrt {storage}" + (f", {accumulate} sums" if storage == "int8" else "")
            if refused := cuda.refusal(0, storage):
                yield Timing(name, queries, keys, None, note=refused)
                continue
            calls = [
                RingCall(cuda, memory, storage, accumulate, queries, keys, heads, frame_tokens, card.processors)
                for _ in range(COPIES)
            ]
            found = median(clock, calls, repeats)
            most = peak(card.capability, card.processors, card.gigahertz, storage, accumulate)
            yield rated(Timing(name, queries, keys, found), heads, most)


def rated(timing: Timing, heads: int, most: float | None) -> Timing:
    """With its rate: 4 D floating-point operations for each query, key and head."""
    assert timing.milliseconds is not None
    tflops = 4 * timing.queries * timing.keys * heads * DIM / timing.milliseconds / 1e9
    share = None if most is None else tflops / most
    return Timing(timing.name, timing.queries, timing.keys, timing.milliseconds, tflops, share, timing.note)


@lru_cache(1)  # for the copies, and both kinds of sums
def ring_numbers(int8: bool, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    if int8:
        return [rng.integers(-60, 60, shape, np.int8) for shape in shapes]  # as e4m3 they are finite too
    return [to_bf16(rng.standard_normal(shape, np.float32)) for shape in shapes]


class RingCall:
    """An attention over whole frames of a ring, planned for the device."""

    def __init__(
        self, cuda: Any, memory: DeviceMemory, storage: str, accumulate: str, queries: int, keys: int,
        heads: int = HEADS, frame_tokens: int = FRAME_TOKENS, processors: int = 1,
    ) -> None:  # fmt: skip
        int8 = storage == "int8"
        rows = 64 if int8 else 32
        granules, frames = -(-frame_tokens // rows), keys // frame_tokens
        pieces = [(i * granules, frame_tokens) for i in range(frames)]
        splits, floats = cuda.plan(queries=queries, heads=heads, dim=DIM, pieces=pieces, processors=processors)
        size = (frames * granules, heads, rows, DIM)
        self._cuda, self._shape, self._frames, self._tokens = cuda, (queries, heads, DIM), frames, frame_tokens
        self._numbers = ring_numbers(int8, self._shape, size, size)
        made = dict(zip("qkv", (memory.put(x) for x in self._numbers), strict=True))
        made["out"] = memory.empty(self._shape, np.uint16)
        made["scratch"] = memory.empty((max(floats, 1),), np.float32)
        if int8:
            scales = {"q_scale": (queries, heads), "k_scale": size[:2], "v_scale": (heads, DIM)}
            made |= {name: memory.put(np.full(shape, 1 / 60, np.float32)) for name, shape in scales.items()}
        self._made = made
        self._arguments = {name: buffer.address for name, buffer in made.items()} | {
            "storage": storage, "q_stride": heads * DIM, "out_stride": heads * DIM, "queries": queries, "heads": heads,
            "dim": DIM, "splits": splits, "pieces": pieces, "scale": DIM**-0.5, "accumulate": accumulate, "stream": 0,
        }  # fmt: skip

    def __call__(self) -> None:
        self._cuda.attention(**self._arguments)

    def error(self, queries: int = 16) -> float:
        """|out - exact| / |exact| of some queries of the last call, `exact` in fp64; for bf16."""
        some = np.linspace(0, self._shape[0] - 1, queries).astype(int)
        q, k, v = (from_bf16(x) for x in self._numbers)
        exact = formula(q[some], self._rows(k), self._rows(v), q[some], 0)
        out = from_bf16(self._made["out"].get()).reshape(self._shape)[some]
        return float(np.linalg.norm(out - exact) / np.linalg.norm(exact))

    def _rows(self, x: np.ndarray) -> np.ndarray:
        """[granules, H, rows, D] of a ring -> [keys, H, D], the last granules' padding left out."""
        _, heads, dim = self._shape
        frames = x.reshape(self._frames, -1, heads, x.shape[2], dim).transpose(0, 1, 3, 2, 4)
        return frames.reshape(self._frames, -1, heads, dim)[:, : self._tokens].reshape(-1, heads, dim)
