"""The CUDA attention, run by ptxsim: the formula in fp64 by the 2x rule, the CPU twin, any pieces, any schedule."""

from ctypes import byref
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from cuda_fixture import (
    GRANULE,
    Array,
    RawAttention,
    RawPass,
    RawPiece,
    fill,
    formula,
    from_bf16,
    granules,
    host,
    launch,
    normal,
    to_bf16,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ptxsim import EVERY_SCHEDULE, Memory, Options, Report

import _cfrt
from cfrt.blocks import Geometry

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("executor")]

POISON = 1e4
"""In the padding of a frame and in slots that are not read: finite, and nobody may notice."""


@dataclass
class Case:
    """Queries [m, H, D] at two positions; slots of keys and values [slots, N, H, D]; the slots read, sinks first."""

    m: int
    heads: int
    dim: int
    tokens: int
    slots: list[int]
    sinks: int = 0
    splits: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        shape = (max(self.slots) + 2, self.tokens, self.heads, self.dim)
        self.q, self.q_sink = (normal(self.seed + i, self.m, self.heads, self.dim) for i in (1, 2))
        self.k, self.v = (normal(self.seed + i, *shape) for i in (3, 4))
        unread = sorted(set(range(shape[0])) - set(self.slots))
        self.k[unread], self.v[unread] = 50, POISON

    def read(self, x: Array) -> Array:
        return np.concatenate([x[slot] for slot in self.slots])

    def exact(self) -> Array:
        return formula(self.q, self.read(self.k), self.read(self.v), self.q_sink, self.sinks * self.tokens)

    def pieces(self, step: int) -> list[RawPiece]:
        return [RawPiece(slot * step, self.tokens) for slot in self.slots]

    def record(self, step: int) -> Array:
        """The same pieces as device memory holds them for a call that does not list them."""
        count = {"granules": len(self.slots) * step, "sink_granules": self.sinks * step}
        raw = fill(RawPass(), piece_count=len(self.slots), sink_pieces=self.sinks, pieces=self.pieces(step), **count)
        return np.frombuffer(bytes(raw), np.uint8)

    def call(self, memory: Memory, step: int, record: bool = False, **buffers) -> tuple[RawAttention, Array]:
        out = memory.empty((self.m, self.heads, self.dim), np.uint16)
        self.scratch = scratch = memory.empty(self.splits * self.m * self.heads * (self.dim + 1), np.float32)
        width = self.heads * self.dim
        raw = fill(
            RawAttention(), out=out, scratch=scratch, q_stride=width, out_stride=width, queries=self.m,
            heads=self.heads, dim=self.dim, splits=self.splits, piece_count=len(self.slots), sink_pieces=self.sinks,
            scale=self.dim**-0.5, pieces=self.pieces(step), **buffers,
        )  # fmt: skip
        if record:
            fill(raw, record=memory.put(self.record(step)), piece_count=0, sink_pieces=0, pieces=[RawPiece(-1, -1)])
        return raw, out.array

    def bf16(
        self, layout: str = "granules", options: Options = Options(), record: bool = False,  # noqa: B008
    ) -> tuple[Array, Report]:  # fmt: skip
        memory = Memory()
        put = lambda x: memory.put(to_bf16(x))  # noqa: E731
        if layout == "rows":
            stores, step, stride = (self.k, self.v), self.tokens, self.heads * self.dim
        else:
            stores = [granules(x, GRANULE["bf16"], fill) for x, fill in ((self.k, 50), (self.v, POISON))]
            step, stride = -(-self.tokens // GRANULE["bf16"]), 0
        k, v = map(put, stores)
        q_sink = put(self.q_sink) if self.sinks else None
        raw, out = self.call(memory, step, q=put(self.q), q_sink=q_sink, k=k, v=v, row_stride=stride, record=record)
        report = launch("attention_bf16", "cfrt_attention_bf16", memory, raw, options=options)
        return from_bf16(out), report

    def check(self, out: Array) -> None:
        """At most twice the error of PyTorch's formula in bf16."""
        exact = self.exact()
        arrays = (self.q, self.read(self.k), self.read(self.v), self.q_sink)
        q, k, v, q_sink = (torch.from_numpy(x).to(torch.bfloat16) for x in arrays)
        sinks = self.sinks * self.tokens
        scores = [torch.einsum("nhd,mhd->hnm", *x) for x in ((q_sink, k[:sinks]), (q, k[sinks:]))]
        weights = (torch.cat(scores, dim=-1) * self.dim**-0.5).softmax(dim=-1)
        eager = torch.einsum("hnm,mhd->nhd", weights, v).double().numpy()
        assert np.abs(out - exact).max() <= 2 * np.abs(eager - exact).max()

    def native(self) -> Array:
        """The CPU twin, over the same slots in place."""
        k, v = (x.reshape(-1, self.heads, self.dim) for x in (self.k, self.v))
        out = np.empty(self.q.shape, np.float32)
        ranges = [(slot * self.tokens, (slot + 1) * self.tokens) for slot in self.slots]
        kv = _cfrt.kernels.KeyValues(k, v, "bf16")
        sinks = self.sinks * self.tokens
        _cfrt.kernels.attention(self.q, kv, out, ranges=ranges, q_sink=self.q_sink, sink_rows=sinks)
        return out


WRAPPED = [0, 3, 4, 1, 2]
CASES = {
    "one granule": Case(5, 1, 128, 32, [0]),
    "wrap, sink, tail": Case(130, 2, 128, 40, WRAPPED, sinks=1),
    "window not full": Case(30, 1, 64, 45, [0, 1], sinks=1),
    "whole granules": Case(128, 1, 64, 64, WRAPPED, sinks=2),
    "only sinks": Case(9, 1, 128, 33, [1, 0], sinks=2),
    "three parts": Case(70, 2, 64, 50, WRAPPED, sinks=1, splits=3),
    "more parts than granules": Case(70, 1, 128, 20, [1, 2], sinks=1, splits=8),
    "a token a frame": Case(3, 1, 64, 1, WRAPPED, sinks=1),
}
named = pytest.mark.parametrize("name", CASES)


@named
@pytest.mark.parametrize("layout", ["granules", "rows"])
def test_bf16_is_the_formula(name: str, layout: str) -> None:
    out, _ = CASES[name].bf16(layout)
    CASES[name].check(out)


@pytest.mark.parametrize("options", EVERY_SCHEDULE, ids=lambda o: f"{o.schedule}-{o.copies}")
@pytest.mark.parametrize("name", ["wrap, sink, tail", "three parts"])
def test_bf16_does_not_depend_on_the_schedule(name: str, options: Options) -> None:
    """Bit for bit, with no race, no read of what is not there, no divergent barrier."""
    assert (CASES[name].bf16(options=options)[0] == CASES[name].bf16()[0]).all()


@named
def test_a_record_in_device_memory_is_the_list(name: str) -> None:
    """Bit for bit where the keys are dealt out alike; parts that nothing is left for are neither written nor read."""
    out, _ = CASES[name].bf16(record=True)
    CASES[name].check(out)
    if CASES[name].splits == 1:
        assert (out == CASES[name].bf16()[0]).all()


def assert_idle_parts_untouched(case: Case, parts: int) -> None:
    rows = case.m * case.heads * case.dim
    assert (case.scratch.array.view(np.uint32)[parts * rows : case.splits * rows] == 0xFFFFFFFF).all()


def test_parts_without_keys_write_nothing() -> None:
    """Two frames of one granule each, eight parts."""
    case = copied(CASES["more parts than granules"])
    case.bf16(record=True)
    assert_idle_parts_untouched(case, 2)


def test_bf16_equals_its_cpu_twin() -> None:
    """Both round the weights to bf16 and the result; they differ by the order of sums."""
    case = Case(96, 2, 64, 48, WRAPPED, sinks=1)
    native, (out, _) = case.native(), case.bf16()
    case.check(out)
    case.check(native)
    assert np.abs(out - native).max() <= 2 * np.abs(out - case.exact()).max()


def any_case(data: st.DataObject) -> Case:
    """A unit of any geometry over the slots that it sees, in the order of the ring plan."""
    f = data.draw(st.sampled_from([1, 3]), "unit")
    geometry = Geometry(unit=f, window=f * data.draw(st.integers(1, 3), "W / F"), sinks=data.draw(st.integers(0, 2)))
    unit, tokens = data.draw(st.integers(0, 9), "u"), data.draw(st.integers(1, 70), "tokens")
    frames = [frame for span in geometry.visible_frames(unit) for frame in range(*span)]
    sinks = sum(frame < geometry.sinks for frame in frames)
    splits = data.draw(st.integers(1, 4))
    return Case(f * tokens, 1, 64, tokens, [geometry.slot(frame) for frame in frames], sinks, splits)


@settings(max_examples=12)
@given(st.data())
def test_bf16_reads_what_a_unit_sees(data: st.DataObject) -> None:
    """Any geometry, in any of the three ways to say where its keys are."""
    case, way = any_case(data), data.draw(st.sampled_from(["granules", "rows", "record"]))
    out, _ = case.bf16("granules" if way == "record" else way, record=way == "record")
    case.check(out)


def test_a_maximum_that_rises_late_is_followed() -> None:
    """The running maximum may be stale by 2^8: here each granule's scores are far above the last one's."""
    case = Case(64, 1, 128, 32, [0, 1, 2, 3])
    case.k *= np.array([0.5, 4, 30, 200, 1, 1], np.float32)[: len(case.k), None, None, None]
    out, _ = case.bf16()
    case.check(out)


def test_sums_are_rescaled_in_the_first_granule_alone() -> None:
    """Which is why the gate (benchmarks/sass.py) counts that block as rare. 32 exponentials a granule, 4 at a rise."""
    case = Case(128, 1, 128, 64, WRAPPED)
    _, report = case.bf16()
    warps, granules = 4, 2 * len(case.slots)
    assert report.opcodes["ex2.approx.ftz.f32"] == warps * (granules * 32 + 4)


def test_bf16_moves_no_more_than_it_must() -> None:
    _, report = CASES["whole granules"].bf16()
    assert report.bank_ratio == 1
    assert report.sector_ratio <= 1.1


@pytest.mark.slow
def test_bf16_at_full_size() -> None:
    """One head of Wan 1.3B: a frame's queries over nine frames of keys."""
    case = Case(1560, 1, 128, 1560, list(range(9)), splits=4)
    out, report = case.bf16()
    assert report.bank_ratio == 1
    case.check(out)


# ---------------------------------------------------------------------- 8 bits

FP16_LIMIT = 2.25


def fp8(x: Array) -> tuple[Array, Array]:
    """Numbers that e4m3 holds, and their bits."""
    small = torch.from_numpy(np.clip(x, -448, 448).astype(np.float32)).to(torch.float8_e4m3fn)
    return small.float().numpy(), small.view(torch.uint8).numpy()


@dataclass
class Quantised:
    """A case whose operands are 8-bit numbers times scales, and the same as fp64."""

    case: Case
    half: bool = False

    def __post_init__(self) -> None:
        case, rows = self.case, GRANULE["int8"]
        rng = np.random.default_rng(case.seed)
        count, heads = -(-case.tokens // rows), case.heads
        whole = lambda *shape: rng.integers(-127, 128, shape).astype(np.int8)  # noqa: E731
        scale = lambda *shape: rng.uniform(0.5, 1.5, shape).astype(np.float32) / 60  # noqa: E731
        self.q8, self.qs = [whole(*case.q.shape) for _ in range(2)], [scale(case.m, heads) for _ in range(2)]
        self.k8, self.ks = whole(*case.k.shape), scale(len(case.k) * count, heads)
        limit = FP16_LIMIT if self.half else 448
        v, self.v8 = fp8(np.clip(case.v / 3, -1, 1) * limit)
        self.vs = (scale(heads, case.dim) * 180 / limit).astype(np.float32)
        of_token = self.ks.reshape(-1, count, heads).repeat(rows, axis=1)[:, : case.tokens, :, None]
        case.q, case.q_sink = (x * s[..., None].astype(np.float64) for x, s in zip(self.q8, self.qs, strict=True))
        case.k, case.v = self.k8 * of_token.astype(np.float64), v * self.vs.astype(np.float64)

    def run(self, options: Options = Options(), record: bool = False, **device) -> tuple[Array, Report]:  # noqa: B008
        case, memory, rows = self.case, Memory(), GRANULE["int8"]
        order = [host("attention_int8_fp8").cfrt_fp8_position(t) for t in range(rows)]
        v = np.empty_like(transposed := granules(self.v8, rows, 0x7E).transpose(0, 1, 3, 2), order="C")
        v[..., order] = transposed
        names = ("q", "q_sink", "q_scale", "q_sink_scale", "k", "v", "k_scale", "v_scale")
        arrays = (*self.q8, *self.qs, granules(self.k8, rows, -128), v, self.ks, self.vs)
        buffers = {name: memory.put(array) for name, array in zip(names, arrays, strict=True)}
        if not case.sinks:
            buffers["q_sink"] = None
        raw, out = case.call(memory, -(-case.tokens // rows), record, row_stride=0, **buffers)
        function = "cfrt_attention_int8_fp8"
        report = launch("attention_int8_fp8", function, memory, raw, int(self.half), options=options, **device)
        return from_bf16(out), report

    def check(self, out: Array) -> None:
        """At most twice the error of the plain algorithm: fp64, but for weights rounded to e4m3 and a bf16 result."""
        case, exact = self.case, self.case.exact()
        arrays = (case.q, case.read(case.k), case.read(case.v), case.q_sink)
        scores = [np.einsum("nhd,mhd->hnm", q, k) for q, k in zip(
            (arrays[3], arrays[0]), np.split(arrays[1], [case.sinks * case.tokens]), strict=True
        )]  # fmt: skip
        scores = np.concatenate(scores, axis=-1) * case.dim**-0.5
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        rounded = fp8(448 * weights)[0] / 448
        plain = np.einsum("hnm,mhd->nhd", rounded.astype(np.float64) / weights.sum(-1, keepdims=True), arrays[2])
        plain = from_bf16(to_bf16(plain))
        assert np.linalg.norm(out - exact) <= 2 * np.linalg.norm(plain - exact)


EIGHT_BITS = {
    "one token": Case(1, 1, 128, 1, [0]),
    "wrap, sink, tail": Case(130, 2, 128, 100, WRAPPED, sinks=1),
    "whole granules": Case(128, 1, 64, 64, WRAPPED, sinks=2),
    "three parts": Case(70, 2, 64, 70, WRAPPED, sinks=1, splits=3),
}


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("name", EIGHT_BITS)
def test_int8_fp8_is_the_formula(name: str, half: bool) -> None:
    case = Quantised(copied(EIGHT_BITS[name]), half)
    case.check(case.run()[0])


def copied(case: Case, **changes) -> Case:
    fields = ("m", "heads", "dim", "tokens", "slots", "sinks", "splits", "seed")
    return Case(**{name: getattr(case, name) for name in fields} | changes)


@pytest.mark.parametrize("options", EVERY_SCHEDULE, ids=lambda o: f"{o.schedule}-{o.copies}")
def test_int8_fp8_does_not_depend_on_the_schedule(options: Options) -> None:
    case = Quantised(copied(EIGHT_BITS["three parts"]))
    assert (case.run(options)[0] == case.run()[0]).all()


@pytest.mark.parametrize("splits", [1, 9])
def test_a_record_is_the_list_in_8_bits(splits: int) -> None:
    case = Quantised(copied(EIGHT_BITS["three parts"], splits=splits))
    case.check(case.run(record=True)[0])
    granules = 2 * len(WRAPPED)
    assert_idle_parts_untouched(case.case, -(-granules // -(-granules // splits)))


@settings(max_examples=10)
@given(st.data())
def test_int8_fp8_reads_what_a_unit_sees(data: st.DataObject) -> None:
    """Any geometry: the slots of the ring plan, in its order, sinks from their own position; listed or in a record."""
    case = Quantised(any_case(data), data.draw(st.booleans(), "fp16 sums"))
    case.check(case.run(record=data.draw(st.booleans(), "record"))[0])


def test_int8_fp8_holds_with_adas_sums() -> None:
    """Tensor cores that keep 22 bits of a sum make it no worse: no sum is longer than a granule."""
    case = Quantised(copied(EIGHT_BITS["wrap, sink, tail"]))
    case.check(case.run(Options(fp8_accumulator_bits=22))[0])


def test_int8_fp8_moves_no_more_than_it_must() -> None:
    _, report = Quantised(copied(EIGHT_BITS["whole granules"])).run()
    assert report.bank_ratio == 1
    assert report.sector_ratio <= 1.1


def test_int8_fp8_is_refused_before_ada() -> None:
    with pytest.raises(AssertionError, match="returned 801"):  # cudaErrorNotSupported
        Quantised(copied(EIGHT_BITS["one token"])).run(major=8, minor=6)


# ---------------------------------------------------------------------- refusals and the plan


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"dim": 96}, 1),
        ({"queries": 0}, 1),
        ({"piece_count": 0}, 1),
        ({"piece_count": 129}, 1),
        ({"sink_pieces": 2}, 1),
        ({"splits": 33}, 1),
        ({"scale": float("nan")}, 1),
        ({"out": None}, 1),
        ({"q_stride": 65}, 716),
    ],
    ids=str,
)
def test_what_does_not_fit_together_is_refused(changes: dict, code: int) -> None:
    memory = Memory()
    raw, _ = Case(4, 1, 64, 32, [0]).call(memory, 1, q=memory.put(np.zeros(256, np.uint16)), row_stride=0)
    raw.k = raw.v = raw.q
    with pytest.raises(AssertionError, match=f"returned {code}$"):
        launch("attention_bf16", "cfrt_attention_bf16", memory, fill(raw, **changes))


@pytest.mark.parametrize("queries", [1560, 4680])
@pytest.mark.parametrize("frames", [9, 21])
def test_parts_fill_an_rtx_4090(queries: int, frames: int) -> None:
    """128 multiprocessors, 12 heads: blocks of 128 queries of one head, and of one part of the keys."""
    raw = fill(RawAttention(), queries=queries, heads=12, piece_count=frames, pieces=[RawPiece(0, 1560)] * frames)
    splits = host("attention_bf16").cfrt_attention_splits(byref(raw), 128)
    blocks, part = -(-queries // 128) * 12, -(-49 * frames // splits)
    turns = -(-blocks * splits // 128)
    assert queries * 12 / 128 * 49 * frames / 128 / (turns * part) >= 0.9


def test_few_keys_are_not_dealt_out() -> None:
    raw = fill(RawAttention(), queries=128 * 128, heads=1, piece_count=1, pieces=[RawPiece(0, 100)])
    assert host("attention_bf16").cfrt_attention_splits(byref(raw), 128) == 1
