"""The CUDA ring: its bookkeeping is RingCache's, and a stream through append and attention is that of the formula."""

import ctypes
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from cuda_fixture import (
    Array,
    RawAppend,
    RawAttention,
    RawPiece,
    fill,
    formula,
    from_bf16,
    host,
    launch,
    normal,
    to_bf16,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ptxsim import Memory

import _cfrt
from cfrt.config import PRESETS, ModelConfig
from cfrt.errors import EngineError
from cfrt.nn.ring import RingCache

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("executor")]

TINY = PRESETS["tiny"]


def model(unit: int, window: int, sinks: int) -> ModelConfig:
    return replace(TINY, unit=unit, window=window, sinks=sinks)


def twin(config: ModelConfig) -> tuple[RingCache, Any]:
    g = config.geometry
    geometry = _cfrt.Geometry(unit=g.unit, window=g.window, sinks=g.sinks)
    ring = _cfrt.cuda.Ring(geometry, frame_tokens=config.frame_tokens, layers=1, heads=1, dim=64)
    return RingCache(config, layers=1), ring


def outcome(call: Any, error: type[Exception], *arguments: int) -> Any:
    """What a call gives, or its error's words."""
    try:
        return call(*arguments)
    except error as refused:
        return str(refused)


@settings(max_examples=40)
@given(st.data())
def test_the_bookkeeping_is_that_of_ring_cache(data: st.DataObject) -> None:
    """Any order of passes, commits, rewinds and restored snapshots: the same frames are read, and the same refused."""
    f = data.draw(st.sampled_from([1, 2]), "F")
    config = model(f, f * data.draw(st.integers(1, 3), "W / F"), data.draw(st.integers(0, 2), "K"))
    cache, ring = twin(config)
    n, saved = config.frame_tokens, (cache.state(), ring.state())
    for _ in range(data.draw(st.integers(1, 12), "steps")):
        unit, what = (
            cache.next_frame // f,
            data.draw(st.sampled_from(["open", "open+commit", "again", "rewind", "save", "load"])),
        )
        back = data.draw(st.integers(0, 3)) if what in ("again", "rewind") else 0
        if what.startswith("open") or what == "again":
            unit = max(0, unit - back)
            with torch.no_grad():
                expected = outcome(cache.open, EngineError, unit)
            got = outcome(ring.open, ValueError, unit)
            if isinstance(expected, str):
                assert got == expected
                continue
            (memory,), sink_tokens = expected
            count = -(-n // 32)
            tokens = [t for start, stop in memory.ranges for t in range(start, stop, n)]
            assert [(start // count * n, rows) for start, rows in got.pieces] == [(t, n) for t in tokens]
            assert (got.sink_pieces * n, [start // count * n for start in got.place]) == (
                sink_tokens, [t for start, stop in memory.slots for t in range(start, stop, n)]
            )  # fmt: skip
            if what == "open+commit":
                cache.commit(unit), ring.commit(unit)
        elif what == "rewind":
            unit = max(0, unit - back)
            assert outcome(ring.rewind, ValueError, unit) == outcome(cache.rewind, EngineError, unit)
        elif what == "save":
            saved = cache.state(), ring.state()
        else:
            cache.load_state(saved[0]), ring.load(saved[1])
        assert (ring.held(), ring.next_frame) == (cache.held(), cache.next_frame)


def test_layers_lie_apart_and_whole() -> None:
    geometry = _cfrt.Geometry(unit=1, window=3, sinks=1)
    shape = {"frame_tokens": 33, "layers": 3, "heads": 2, "dim": 64}
    slots = 1 + 3 + 1
    bf16 = _cfrt.cuda.Ring(geometry, **shape)
    side = slots * 2 * 2 * 32 * 64 * 2  # slots, granules a frame, heads, rows, numbers, bytes
    assert [bf16.layer(i)[:2] for i in range(3)] == [(2 * i * side, (2 * i + 1) * side) for i in range(3)]
    assert bf16.bytes == 6 * side
    int8 = _cfrt.cuda.Ring(geometry, **shape, int8=True)
    side = slots * 2 * 64 * 64
    assert int8.layer(1) == (int8.bytes // 3, int8.bytes // 3 + side, int8.bytes // 3 + 2 * side)
    assert int8.bytes // 3 >= 2 * side + slots * 2 * 4


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"dim": 96}, "64 or 128"), ({"layers": 0}, "at least one layer"), ({"window": 200}, "at most 128 frames")],
    ids=str,
)
def test_a_ring_that_the_kernels_cannot_read_is_refused(changes: dict, words: str) -> None:
    geometry = _cfrt.Geometry(unit=1, window=changes.pop("window", 3))
    with pytest.raises(ValueError, match=words):
        _cfrt.cuda.Ring(geometry, **{"frame_tokens": 5, "layers": 1, "heads": 1, "dim": 64} | changes)


def test_a_state_of_another_ring_is_refused() -> None:
    _, ring = twin(model(1, 3, 0))
    _, other = twin(model(1, 4, 0))
    with pytest.raises(ValueError, match="another model's"):
        ring.load(other.state())


# ---------------------------------------------------------------------- a stream


@dataclass
class Stream:
    """A model of one layer that only appends and attends: what a unit says is a function of the units' own numbers."""

    unit: int = 1
    window: int = 2
    sinks: int = 1
    heads: int = 1
    dim: int = 64
    grid: tuple[int, int] = (3, 7)

    def __post_init__(self) -> None:
        self.tokens, self.width = self.grid[0] * self.grid[1], self.heads * self.dim
        self.geometry = _cfrt.Geometry(unit=self.unit, window=self.window, sinks=self.sinks)
        shape = {"frame_tokens": self.tokens, "layers": 1, "heads": self.heads, "dim": self.dim}
        self.ring = _cfrt.cuda.Ring(self.geometry, **shape)
        self.memory = Memory()
        self.store = self.memory.put(np.zeros(self.ring.bytes, np.uint8))
        self.ones = self.memory.put(to_bf16(np.ones(self.width)))

    def numbers(self, unit: int) -> list[Array]:
        return [normal(100 * unit + i, self.unit * self.tokens, self.width) for i in range(3)]

    def step(self, unit: int) -> Array:
        """One pass, committed: [F N, H, D]."""
        opened = self.ring.open(unit)
        (k, v, _), rows = self.ring.layer(0), self.unit * self.tokens
        inputs = [self.memory.put(to_bf16(x)) for x in self.numbers(unit)]
        q = self.memory.empty((rows, self.heads, self.dim), np.uint16)
        pairs = (12, 10, 10)
        raw = fill(
            RawAppend(), **dict(zip(("q", "k", "v"), inputs, strict=True)), stride=self.width, q_weight=self.ones,
            k_weight=self.ones, q_out=q, k_out=self.store.address + k, v_out=self.store.address + v, eps=1e-6,
            first_frame=unit * self.unit, heads=self.heads, dim=self.dim, frames=self.unit, rows=self.grid[0],
            columns=self.grid[1], pairs=pairs, granules=opened.place,
        )  # fmt: skip
        host("append").cfrt_turns(raw.turns, raw.pairs, ctypes.c_double(1e4))
        launch("append", "cfrt_append_bf16", self.memory, raw)
        self.q = from_bf16(q.array)
        out = self.memory.empty((rows, self.heads, self.dim), np.uint16)
        call = fill(
            RawAttention(), q=q, k=self.store.address + k, v=self.store.address + v, out=out, q_stride=self.width,
            out_stride=self.width, queries=rows, heads=self.heads, dim=self.dim, splits=1,
            piece_count=len(opened.pieces), sink_pieces=opened.sink_pieces, scale=self.dim**-0.5,
            pieces=[RawPiece(*piece) for piece in opened.pieces],
        )  # fmt: skip
        launch("attention_bf16", "cfrt_attention_bf16", self.memory, call)
        self.ring.commit(unit)
        return from_bf16(out.array)

    def stored(self, frame: int) -> tuple[Array, Array]:
        """A frame's keys and values, [N, H, D], out of the memory."""
        count = -(-self.tokens // 32)
        at, size = self.geometry.slot(frame) * count, count * self.heads * 32 * self.dim
        sides = []
        for offset in self.ring.layer(0)[:2]:
            words = self.store.array[offset:].view(np.uint16)[at * size // count :][:size]
            side = words.reshape(count, self.heads, 32, self.dim).transpose(0, 2, 1, 3)
            sides.append(from_bf16(side.reshape(-1, self.heads, self.dim)[: self.tokens].copy()))
        return sides[0], sides[1]


@pytest.mark.parametrize("shape", [{}, {"unit": 3, "window": 6, "sinks": 0, "heads": 2}], ids=["F=1", "F=3"])
def test_a_stream_is_the_formula_over_what_each_unit_sees(shape: dict) -> None:
    """Eight units: the window fills and wraps twice, sinks stay. Answers are those over frames as first written."""
    stream = Stream(**shape)
    written: dict[int, tuple[Array, Array]] = {}
    for unit in range(8):
        out = stream.step(unit)
        for frame in range(unit * stream.unit, (unit + 1) * stream.unit):
            written[frame] = stream.stored(frame)
        frames = [frame for span in stream.geometry.visible_frames(unit) for frame in range(*span)]
        k, v = (np.concatenate([written[frame][side] for frame in frames]) for side in (0, 1))
        exact = formula(stream.q, k, v, stream.q, 0)
        assert np.abs(out - exact).max() <= 2**-7 * np.abs(v).max()


def test_restored_and_rewound_streams_go_on_bit_for_bit() -> None:
    stream = Stream()
    for unit in range(4):
        stream.step(unit)
    bytes_, state = stream.store.array.copy(), stream.ring.state()
    expected = [stream.step(unit) for unit in range(4, 8)]
    stream.store.array[...] = bytes_
    stream.ring.load(state)
    again = [stream.step(unit) for unit in range(4, 8)]
    assert all((a == b).all() for a, b in zip(again, expected, strict=True))

    stream.ring.rewind(7)
    assert (stream.step(7) == expected[3]).all()
    with pytest.raises(ValueError, match="have left the ring"):
        stream.ring.rewind(4)
