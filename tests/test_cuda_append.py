"""CUDA norm, rotation and write into the ring, run by ptxsim: fp64, the CPU twin, and what attention then reads."""

import ctypes
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cuda_fixture import GRANULE, Array, RawAppend, RawPass, fill, from_bf16, granules, host, launch, normal, to_bf16
from ptxsim import EVERY_SCHEDULE, Memory, Options, Report

import _cfrt

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("executor")]

THETA, EPS = 10000.0, 1e-6


@dataclass
class Case:
    """A unit of frames; each frame's slot; where its positions start, and from where sinks are looked at."""

    heads: int = 2
    dim: int = 128
    grid: tuple[int, int] = (5, 8)
    slots: tuple[int, ...] = (3, 0, 1)
    first_frame: int = 7
    sink_view: int | None = 8
    record: bool = False
    """Where frames start, and when, is said in device memory."""

    def __post_init__(self) -> None:
        third = self.dim // 6
        self.pairs = (self.dim // 2 - 2 * third, third, third)
        self.width, self.tokens = self.heads * self.dim, self.grid[0] * self.grid[1]
        count = len(self.slots) * self.tokens
        self.q, self.k, self.v = (normal(i, count, self.width) * 4 for i in range(3))
        self.weights = [normal(i, self.width) for i in (3, 4)]

    def positions(self, *, sinks: bool = False) -> list[int]:
        own = range(self.first_frame, self.first_frame + len(self.slots))
        return [min(f, self.sink_view) for f in own] if sinks and self.sink_view is not None else list(own)

    def turned(self, x: Array, weight: Array, positions: list[int]) -> Array:
        """[tokens, H, D] in fp64."""
        x = x.astype(np.float64)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + EPS) * weight
        rows, columns = np.divmod(np.arange(self.tokens), self.grid[1])
        angles = []
        for frame in positions:
            axes = zip(self.pairs, (np.full(self.tokens, frame), rows, columns), strict=True)
            angles.append(np.concatenate([at[:, None] * THETA ** (-np.arange(n) / n) for n, at in axes], axis=1))
        turn = np.exp(1j * np.concatenate(angles))[:, None]
        pairs = x.reshape(len(x), self.heads, -1, 2)
        z = (pairs[..., 0] + 1j * pairs[..., 1]) * turn
        return np.stack([z.real, z.imag], axis=-1).reshape(len(x), self.heads, self.dim)

    def run(self, storage: str, options: Options = Options()) -> tuple[dict[str, Array], Report]:  # noqa: B008
        memory, rows = Memory(), GRANULE[storage]
        count, slots = -(-self.tokens // rows), max(self.slots) + 2
        fused = memory.put(to_bf16(np.concatenate([self.q, self.k, self.v], axis=1)))
        kind = np.uint16 if storage == "bf16" else np.int8
        ring = (slots * count, self.heads, rows, self.dim)
        out = {
            "q_out": memory.empty((len(self.q), self.heads, self.dim), kind),
            "q_sink_out": memory.empty((len(self.q), self.heads, self.dim), kind) if self.sink_view else None,
            "k_out": memory.put(np.full(ring, 77, kind)),
            "v_out": memory.put(np.full(ring, 77, kind)),
            "q_scale": memory.empty((len(self.q), self.heads), np.float32),
            "q_sink_scale": memory.empty((len(self.q), self.heads), np.float32),
            "k_scale": memory.put(np.full((slots * count, self.heads), 7, np.float32)),
        }
        at = [fused.address + 2 * i * self.width for i in range(3)]
        raw = fill(
            RawAppend(), q=at[0], k=at[1], v=at[2], stride=3 * self.width,
            q_weight=memory.put(to_bf16(self.weights[0])), k_weight=memory.put(to_bf16(self.weights[1])),
            v_scale=memory.put(self.v_scale), scratch=memory.empty(self.q.shape, np.uint16),
            first_frame=self.first_frame, last_sink_view=self.sink_view or 0, heads=self.heads, dim=self.dim,
            frames=len(self.slots), rows=self.grid[0], columns=self.grid[1], pairs=self.pairs, eps=EPS,
            granules=[slot * count for slot in self.slots], **out,
        )  # fmt: skip
        if self.record:
            where = {"first_frame": self.first_frame, "place": [slot * count for slot in self.slots]}
            record = memory.put(np.frombuffer(bytes(fill(RawPass(), **where)), np.uint8))
            fill(raw, record=record, first_frame=-1, granules=[-1] * len(self.slots))
        host("append").cfrt_turns(raw.turns, raw.pairs, ctypes.c_double(THETA))
        function = "cfrt_append_bf16" if storage == "bf16" else "cfrt_append_int8_fp8"
        report = launch("append", function, memory, raw, options=options)
        return {name: buffer.array for name, buffer in out.items() if buffer is not None}, report

    @property
    def v_scale(self) -> Array:
        return np.random.default_rng(9).uniform(0.01, 0.03, (self.heads, self.dim)).astype(np.float32)

    def stored(self, ring: Array, frame: int) -> Array:
        """[N, H, D] of a frame of the unit, out of granules."""
        rows = ring.shape[2]
        count = -(-self.tokens // rows)
        mine = ring[self.slots[frame] * count : (self.slots[frame] + 1) * count]
        return mine.transpose(0, 2, 1, 3).reshape(count * rows, self.heads, -1)[: self.tokens]

    def untouched(self, ring: Array) -> Array:
        """The granules of the slots that are not the unit's."""
        count = -(-self.tokens // ring.shape[2])
        mine = [slot * count + i for slot in self.slots for i in range(count)]
        return np.delete(ring, mine, axis=0)


CASES = {
    "three frames, sink view": Case(),
    "one frame, head of 64": Case(heads=3, dim=64, grid=(3, 7), slots=(1,), sink_view=None),
    "a token": Case(heads=1, dim=64, grid=(1, 1), slots=(0, 1)),
    "frame 10 million": Case(heads=1, grid=(2, 2), slots=(0,), first_frame=10_000_000, sink_view=20),
}
named = pytest.mark.parametrize("name", CASES)


def assert_rounded(bits: Array, exact: Array) -> None:
    """bf16 of a number that fp32 has computed: half a last place, and fp32's own error."""
    got = from_bf16(bits).astype(np.float64)
    assert (np.abs(got - exact) <= np.abs(exact) * 2**-8 * 1.01 + 4e-6).all()


@named
def test_bf16_is_norm_and_rotation(name: str) -> None:
    case = CASES[name]
    out, _ = case.run("bf16")
    assert_rounded(out["q_out"], case.turned(case.q, case.weights[0], case.positions()))
    if case.sink_view:
        assert_rounded(out["q_sink_out"], case.turned(case.q, case.weights[0], case.positions(sinks=True)))
    keys = case.turned(case.k, case.weights[1], case.positions())
    for frame in range(len(case.slots)):
        own = slice(frame * case.tokens, (frame + 1) * case.tokens)
        assert_rounded(case.stored(out["k_out"], frame), keys[own])
        values = to_bf16(case.v[own]).reshape(-1, case.heads, case.dim)
        assert (case.stored(out["v_out"], frame) == values).all()
    assert (case.untouched(out["k_out"]) == 77).all()
    assert (case.untouched(out["v_out"]) == 77).all()


def test_bf16_equals_its_cpu_twin() -> None:
    case = CASES["three frames, sink view"]
    out, _ = case.run("bf16")
    turn = _cfrt.kernels.turns(case.positions(), case.grid, case.pairs, THETA)
    sink = _cfrt.kernels.turns(case.positions(sinks=True), case.grid, case.pairs, THETA)
    options = {"weight": case.weights[0], "eps": EPS, "turn": turn, "sink_turn": sink}
    for mine, native in zip(("q_out", "q_sink_out"), _cfrt.kernels.queries(case.q, case.heads, **options), strict=True):
        assert_rounded(out[mine], native.reshape(-1, case.heads, case.dim).astype(np.float64))


@pytest.mark.parametrize("storage", ["bf16", "int8"])
@pytest.mark.parametrize("options", EVERY_SCHEDULE, ids=lambda o: f"{o.schedule}-{o.copies}")
def test_the_schedule_does_not_matter(options: Options, storage: str) -> None:
    case = CASES["three frames, sink view"]
    expected, _ = case.run(storage)
    out, _ = case.run(storage, options)
    assert all((out[name] == expected[name]).all() for name in out if name in ("q_out", "k_out", "v_out"))


@named
def test_int8_fp8_is_the_bf16_rounded(name: str) -> None:
    """Queries to the nearest of 255 steps of their row, keys of their granule and head, values of e4m3."""
    case, rows = CASES[name], GRANULE["int8"]
    out, _ = case.run("int8")
    exact = case.turned(case.q, case.weights[0], case.positions())
    scale = np.abs(exact).max(axis=-1) / 127
    np.testing.assert_allclose(out["q_scale"], scale, rtol=1e-5)
    assert (np.abs(out["q_out"] - exact / scale[..., None]) <= 0.501).all()

    plain, _ = case.run("bf16")
    order = [host("attention_int8_fp8").cfrt_fp8_position(t) for t in range(rows)]
    shape = out["v_out"].shape
    values = out["v_out"].reshape(*shape[:2], case.dim, rows)[..., order].transpose(0, 1, 3, 2).view(np.uint8)
    for frame, slot in enumerate(case.slots):
        keys = granules(from_bf16(case.stored(plain["k_out"], frame))[None], rows, 0)
        mine = slice(slot * len(keys), (slot + 1) * len(keys))
        scale = np.abs(keys).max(axis=(2, 3)) / 127
        np.testing.assert_allclose(out["k_scale"][mine], scale, rtol=1e-6)
        assert (np.abs(out["k_out"][mine] - keys / scale[..., None, None]) <= 0.5001).all()
        v = from_bf16(case.stored(plain["v_out"], frame)) * (np.float32(1) / case.v_scale)
        wanted = torch.from_numpy(np.clip(v, -448, 448)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        assert (case.stored(values, frame) == wanted).all()
    assert (case.untouched(out["k_out"]) == 77).all()
    assert (case.untouched(out["v_out"]) == 77).all()


@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_a_record_in_device_memory_is_the_call(storage: str) -> None:
    case = CASES["three frames, sink view"]
    expected, _ = case.run(storage)
    out, _ = Case(record=True).run(storage)
    for name in expected:
        np.testing.assert_array_equal(out[name], expected[name])


def test_the_padding_of_8_bits_is_zero() -> None:
    case = CASES["three frames, sink view"]
    out, _ = case.run("int8")
    assert (out["k_out"][:, :, case.tokens :][0] == 0).all()


def test_a_row_of_zeros_has_a_scale() -> None:
    case = Case(heads=1, dim=64, grid=(1, 1), slots=(0,), sink_view=None)
    case.q, case.k = np.zeros_like(case.q), np.zeros_like(case.k)
    out, _ = case.run("int8")
    assert (out["q_scale"] > 0).all()
    assert (out["k_scale"][0] > 0).all()
    assert (out["q_out"] == 0).all()


def test_turns_are_exact() -> None:
    """position * turn modulo 2^64, against fp64: at any position a stream can reach."""
    turns = (ctypes.c_uint64 * 64)()
    host("append").cfrt_turns(turns, (ctypes.c_int32 * 3)(22, 21, 21), ctypes.c_double(THETA))
    for position in (1, 1000, 123_456):
        phase = np.array([turns[j] * position % 2**64 for j in range(22)]) / 2.0**64
        angle = position * THETA ** (-np.arange(22) / 22) / (2 * np.pi)
        assert np.abs((phase - angle + 0.5) % 1 - 0.5).max() < 1e-9


@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_nothing_is_moved_twice(storage: str) -> None:
    case = Case(heads=2, dim=128, grid=(8, 8), slots=(1,), sink_view=None)
    _, report = case.run(storage)
    assert report.bank_ratio == 1, report.worst()
    assert report.sector_ratio <= 1.1, report.worst()


@pytest.mark.parametrize(
    ("changes", "code"),
    [({"dim": 80}, 1), ({"heads": 129}, 1), ({"frames": 33}, 1), ({"first_frame": -1}, 1), ({"stride": 260}, 716)],
    ids=str,
)
def test_what_does_not_fit_together_is_refused(changes: dict, code: int) -> None:
    memory = Memory()
    some = memory.put(np.zeros(64, np.uint16))
    names = ("q", "k", "v", "q_weight", "k_weight", "q_out", "k_out", "v_out")
    raw = fill(
        RawAppend(), **dict.fromkeys(names, some), heads=2, dim=64, stride=128, frames=1, rows=1, columns=1,
        pairs=(10, 11, 11),
    )  # fmt: skip
    with pytest.raises(AssertionError, match=f"returned {code}$"):
        launch("append", "cfrt_append_bf16", memory, fill(raw, **changes))
