"""The native ring and attention: the ring cache of cfrt.nn, the formula in fp64, and a row is a row."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import _cfrt
from cfrt.blocks import Geometry, Span
from cfrt.config import PRESETS, ModelConfig
from cfrt.errors import EngineError
from cfrt.nn.attention import attention
from cfrt.nn.ring import RingCache

pytestmark = pytest.mark.cpu

kernels = _cfrt.kernels
ISAS = kernels.isas()
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

every_isa = pytest.mark.parametrize("isa", ISAS)
every_precision = pytest.mark.parametrize("precision", DTYPES)


# ---------------------------------------------------------------------- twins


def rounded(x: np.ndarray, precision: str) -> np.ndarray:
    """fp32 numbers that the precision can hold."""
    array: np.ndarray = torch.from_numpy(x).to(DTYPES[precision]).float().numpy()
    return array


def normal(seed: int, precision: str, *shape: int) -> np.ndarray:
    return rounded(np.random.default_rng(seed).normal(size=shape).astype(np.float32), precision)


def read(x: np.ndarray, ranges: list[Span]) -> np.ndarray:
    return np.concatenate([x[start:stop] for start, stop in ranges])


def formula(q: Tensor, k: Tensor, v: Tensor, q_sink: Tensor, sinks: int) -> Tensor:
    """softmax(q k^T / sqrt(D)) v in the dtype of its arguments, [M, H, D]; the first keys are looked at by q_sink."""
    far = torch.einsum("mhd,lhd->hml", q_sink, k[:sinks])
    near = torch.einsum("mhd,lhd->hml", q, k[sinks:])
    return torch.einsum("hml,lhd->mhd", (torch.cat([far, near], -1) / math.sqrt(q.shape[-1])).softmax(-1), v)


@dataclass
class Case:
    """Queries [m, H, D] at two positions, keys and values [rows, H, D], and what is read of them."""

    precision: str
    q: np.ndarray
    q_sink: np.ndarray
    k: np.ndarray
    v: np.ndarray
    ranges: list[Span]
    sinks: int = 0

    @classmethod
    def random(cls, precision: str, m: int, heads: int, dim: int, rows: int, ranges: list[Span], sinks: int = 0):
        q, q_sink = (normal(seed, precision, m, heads, dim) for seed in (1, 2))
        k, v = (normal(seed, precision, rows, heads, dim) for seed in (3, 4))
        return cls(precision, q, q_sink, k, v, ranges, sinks)

    def native(self, isa: str, rows: slice | list[int] = slice(None), **options) -> np.ndarray:
        q, q_sink = (np.ascontiguousarray(x[rows]) for x in (self.q, self.q_sink))
        out = np.full(q.shape, np.nan, np.float32)
        kv = kernels.KeyValues(self.k, self.v, self.precision, isa=isa)
        how = {"ranges": self.ranges, "q_sink": q_sink, "sink_rows": self.sinks, **options}
        kernels.attention(q, kv, out, isa=isa, **how)
        return out

    def plain(self, dtype: torch.dtype) -> Tensor:
        arrays = (self.q, read(self.k, self.ranges), read(self.v, self.ranges), self.q_sink)
        q, k, v, q_sink = (torch.from_numpy(x).to(dtype) for x in arrays)
        return formula(q, k, v, q_sink, self.sinks).double()

    def check(self, out: np.ndarray) -> None:
        """At most twice the error of PyTorch's plain formula in the same dtype, or two last bits of the values: the
        level without a fused multiply-add rounds twice where PyTorch rounds once."""
        exact = self.plain(torch.float64)
        eager = (self.plain(DTYPES[self.precision]) - exact).abs().max().item()
        last_bit = 2.0**-22 * float(np.abs(self.v).max())
        assert (torch.from_numpy(out).double() - exact).abs().max().item() <= 2 * max(eager, last_bit)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Any rows, odd ones too; up to four ranges in any order; sinks that end inside a range."""
    rows = draw(st.integers(1, 230))
    cuts = sorted(draw(st.sets(st.integers(0, rows), min_size=2, max_size=8)))
    ranges = draw(st.permutations(list(zip(cuts[::2], cuts[1::2], strict=False))))
    count = sum(stop - start for start, stop in ranges)
    dim = draw(st.sampled_from([16, 32, 64, 80, 128]))
    sinks = draw(st.one_of(st.just(0), st.integers(0, count)))
    precision = draw(st.sampled_from(list(DTYPES)))
    return Case.random(precision, draw(st.integers(1, 70)), draw(st.integers(1, 3)), dim, rows, ranges, sinks)


# ---------------------------------------------------------------------- the formula


@given(case=cases(), isa=st.sampled_from(ISAS))
def test_attention_is_the_formula(case: Case, isa: str) -> None:
    case.check(case.native(isa))


@every_isa
@every_precision
@pytest.mark.parametrize("dim", [64, 128])
def test_long_streams(dim: int, precision: str, isa: str) -> None:
    """12 frames of 64 tokens, wrapped, behind sinks: many blocks of keys."""
    case = Case.random(precision, 64, 2, dim, 832, [(0, 64), (448, 832), (64, 384)], 64)
    case.check(case.native(isa))


@every_isa
@every_precision
def test_levels_agree(precision: str, isa: str) -> None:
    case = Case.random(precision, 9, 2, 64, 150, [(3, 60), (61, 150)], 5)
    tolerance = {"fp32": 1e-5, "bf16": 2e-2}[precision]
    np.testing.assert_allclose(case.native(isa), case.native("plain"), rtol=0, atol=tolerance)


@every_isa
@every_precision
def test_scores_that_climb(precision: str, isa: str) -> None:
    """Each key outweighs all before it by far: the running maximum is passed again and again, at other times in other
    rows, and everything summed up has to follow."""
    case = Case.random(precision, 40, 1, 16, 300, [(0, 300)])
    case.k[:] = rounded(np.linspace(-1, 1, 300, dtype=np.float32)[:, None, None] + 0 * case.k, precision)
    case.q[:] = rounded(np.linspace(-90, 90, 40, dtype=np.float32)[:, None, None] + 0 * case.q, precision)
    out = case.native(isa)
    case.check(out)
    for row in (0, 13, 39):
        np.testing.assert_array_equal(case.native(isa, [row])[0], out[row])


# ---------------------------------------------------------------------- a row is a row


@every_isa
@every_precision
@pytest.mark.parametrize("dim", [16, 64])
def test_a_row_does_not_depend_on_the_others(dim: int, precision: str, isa: str) -> None:
    """Bit for bit: alone, in small groups that run at other vector widths, shuffled, on several threads."""
    case = Case.random(precision, 75, 2, dim, 117, [(5, 40), (41, 117)], 7)
    whole = case.native(isa)
    for size in (1, 3, 5, 8, 9, 17, 33, 64):
        np.testing.assert_array_equal(case.native(isa, slice(75 - size, 75)), whole[75 - size :])
    order = np.random.default_rng(0).permutation(75)
    np.testing.assert_array_equal(case.native(isa, order.tolist()), whole[order])
    for threads in (1, 2, 3):
        np.testing.assert_array_equal(case.native(isa, threads=kernels.Threads(threads)), whole)


@every_isa
@every_precision
@pytest.mark.parametrize("ranges", [[(4, 20)], [(3, 10), (11, 30)], [(7, 8)]])
def test_what_is_not_read_does_not_count(ranges: list[Span], precision: str, isa: str) -> None:
    """Not even where it shares a word with what is: rows outside the ranges hold NaN."""
    case = Case.random(precision, 6, 2, 32, 33, ranges, 1)
    clean = case.native(isa)
    seen = np.zeros(33, bool)
    for start, stop in ranges:
        seen[start:stop] = True
    case.k[~seen] = case.v[~seen] = np.nan
    np.testing.assert_array_equal(case.native(isa), clean)


@every_isa
@every_precision
def test_not_a_number_is_seen_where_it_is_and_nowhere_else(precision: str, isa: str) -> None:
    case = Case.random(precision, 40, 2, 32, 60, [(0, 60)])
    clean = case.native(isa)
    case.q[7, 1, 3], case.q[20, 0, 0] = np.nan, np.inf
    out = case.native(isa)
    broken = np.zeros(out.shape[:2], bool)
    broken[7, 1] = broken[20, 0] = True
    assert np.isnan(out[broken]).all()
    np.testing.assert_array_equal(out[~broken], clean[~broken])
    case.k[59, 0, 0] = np.nan
    assert np.isnan(case.native(isa)[:, 0]).all()


@every_isa
@every_precision
@pytest.mark.parametrize("m", [1, 37])
def test_bf16_results_are_the_fp32_ones_rounded(m: int, precision: str, isa: str) -> None:
    case = Case.random(precision, m, 3, 48, 50, [(0, 50)])
    half = np.zeros(case.q.shape, np.uint16)
    kv = kernels.KeyValues(case.k, case.v, precision, isa=isa)
    kernels.attention(case.q, kv, half, ranges=case.ranges, isa=isa)
    got = torch.from_numpy(half.view(np.int16)).view(torch.bfloat16)
    assert torch.equal(got, torch.from_numpy(case.native(isa)).bfloat16())


# ---------------------------------------------------------------------- the ring


geometries = st.integers(1, 3).flatmap(
    lambda unit: st.builds(Geometry, unit=st.just(unit), window=st.integers(unit, 7), sinks=st.integers(0, 3))
)


def config_of(g: Geometry, grid: tuple[int, int] = (1, 1), dim: int = 16) -> ModelConfig:
    """One token a cell of `grid`; two heads, two layers."""
    sizes = {"width": 2 * dim, "heads": 2, "depth": 2, "trained_frames": 12 * g.unit, "patch": (1, 1, 1)}
    return replace(PRESETS["tiny"], **sizes, latent_grid=grid, unit=g.unit, window=g.window, sinks=g.sinks)


class Rings:
    """The ring cache of cfrt.nn and the native ring, driven alike; plain fp32 keys and values."""

    def __init__(self, config: ModelConfig, precision: str) -> None:
        self.config, self.precision = config, precision
        self.theirs = RingCache(config, 1)
        g = config.geometry
        shape = {"frame_tokens": config.frame_tokens, "layers": config.depth, "heads": config.heads}
        geometry = _cfrt.Geometry(unit=g.unit, window=g.window, sinks=g.sinks)
        self.ours = kernels.Ring(geometry, **shape, dim=config.head_dim, precision=precision)
        self.seed = 0

    def rows(self) -> np.ndarray:
        """Keys, values or queries of a unit."""
        self.seed += 1
        c = self.config
        return normal(self.seed, self.precision, c.unit * c.frame_tokens, c.heads, c.head_dim)

    @torch.no_grad()
    def passes(self, unit: int, isa: str) -> Iterator[tuple[np.ndarray, Case]]:
        """For each layer of a pass over `unit`: the native result, and the case that it answers."""
        memories, sink_tokens = self.theirs.open(unit)
        ranges, sink_rows, place = self.ours.open(unit)
        assert sink_rows == sink_tokens
        for layer, memory in enumerate(memories):
            k, v, q, q_sink = (self.rows() for _ in range(4))
            keys = memory.extend(*(torch.from_numpy(x)[None] for x in (k, v)))
            assert ranges == keys.ranges
            native = self.ours.layer(layer)
            kernels.append(native, place, k.reshape(len(k), -1), v.reshape(len(v), -1), isa=isa)
            out = np.zeros_like(q)
            kernels.attention(q, native, out, ranges=ranges, q_sink=q_sink, sink_rows=sink_rows, isa=isa)
            yield out, Case(self.precision, q, q_sink, keys.k[0].numpy(), keys.v[0].numpy(), ranges, sink_rows)

    def commit(self, unit: int) -> None:
        self.theirs.commit(unit)
        self.ours.commit(unit)
        assert self.ours.next_frame == self.theirs.next_frame
        assert self.ours.held() == self.theirs.held()

    def run(self, units: int, isa: str = ISAS[-1]) -> None:
        for unit in range(units):
            for _ in self.passes(unit, isa):
                pass
            self.commit(unit)


@given(
    g=geometries,
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    dim=st.sampled_from([16, 64]),
    units=st.integers(1, 9),
    precision=st.sampled_from(list(DTYPES)),
    isa=st.sampled_from(ISAS),
)
def test_ring_is_the_ring_cache(g: Geometry, grid: tuple[int, int], dim: int, units: int, precision: str, isa: str):
    """Any geometry, frames of 1 to 25 tokens, wraps and sinks: the same ranges, and the formula over what they hold."""
    rings = Rings(config_of(g, grid, dim), precision)
    for unit in range(units):
        for out, case in rings.passes(unit, isa):
            case.check(out)
        rings.commit(unit)


@every_isa
@every_precision
@pytest.mark.parametrize(("unit", "window", "sinks"), [(1, 4, 0), (1, 3, 2), (3, 6, 1)])
def test_a_fused_pass_is_two_passes(unit: int, window: int, sinks: int, precision: str, isa: str) -> None:
    """Bit for bit: the clean unit and the next one, written together and then looked at, or one after the other."""
    g = Geometry(unit=unit, window=window, sinks=sinks)
    results = []
    for fused in (False, True):
        rings = Rings(config_of(g, (3, 3)), precision)
        rings.run(5, isa)
        ring, out = rings.ours, []
        data = [[rings.rows().reshape(unit * 9, -1) for _ in range(3)] for _ in range(2)]
        opened = []
        for step in range(2):
            opened.append(ring.open(5 + step))
            if step == 0:
                ring.commit(5)
            if not fused:
                kernels.append(ring.layer(0), opened[step][2], *data[step][:2], isa=isa)
                out.append(look(ring, data[step][2], opened[step], isa))
        if fused:
            for step in range(2):
                kernels.append(ring.layer(0), opened[step][2], *data[step][:2], isa=isa)
            out = [look(ring, data[step][2], opened[step], isa) for step in range(2)]
        results.append(out)
    np.testing.assert_array_equal(*results)


def look(ring, q: np.ndarray, opened: tuple, isa: str) -> np.ndarray:
    ranges, sink_rows, _ = opened
    q = q.reshape(len(q), 2, -1)
    out = np.zeros_like(q)
    kernels.attention(q, ring.layer(0), out, ranges=ranges, q_sink=q, sink_rows=sink_rows, isa=isa)
    return out


@pytest.mark.parametrize("grid", [(2, 2), (1, 3)])
@every_precision
def test_frames_go_in_and_out_exactly(precision: str, grid: tuple[int, int]) -> None:
    """As plain fp32, whatever the layout: what a journal and a portable snapshot are made of."""
    config = config_of(Geometry(unit=2, window=4, sinks=1), grid)
    rings, other = Rings(config, precision), Rings(config, precision)
    rings.run(5)
    assert rings.ours.held() == rings.theirs.held()
    for frame in rings.ours.held():
        for layer in range(2):
            k, v = rings.ours.read(layer, frame)
            for got, expected in zip((k, v), rings.theirs.read(layer, frame), strict=True):
                np.testing.assert_array_equal(got, expected[0].numpy())
            other.ours.write(layer, frame, k, v)
        other.ours.hold(frame)
    assert other.ours.state()[72:] == rings.ours.state()[72:]  # but for the shape and the next frame


@every_precision
def test_a_restored_ring_goes_on_as_if_nothing_had_happened(precision: str) -> None:
    config = config_of(Geometry(unit=2, window=4, sinks=1), (1, 3))
    rings = Rings(config, precision)
    rings.run(5)
    state, theirs, seed = rings.ours.state(), rings.theirs.state(), rings.seed
    expected = [out for out, _ in rings.passes(5, ISAS[-1])]
    other = Rings(config, precision)
    other.ours.load(state)
    other.theirs.load_state(theirs)
    other.seed = seed
    np.testing.assert_array_equal([out for out, _ in other.passes(5, ISAS[-1])], expected)
    different = Rings(config_of(Geometry(unit=2, window=5, sinks=1), (1, 3)), precision).ours
    with pytest.raises(ValueError, match="the state is another model's"):
        different.load(state)
    with pytest.raises(ValueError, match="the state is another model's"):
        rings.ours.load(state[:-1])


def refusal(call, *arguments) -> str:
    with pytest.raises((EngineError, ValueError)) as raised:
        call(*arguments)
    return str(raised.value)


def test_units_come_in_order() -> None:
    """And rings refuse in the same words."""
    rings = Rings(config_of(Geometry(unit=2, window=4, sinks=1)), "fp32")
    rings.run(8)
    for name, arguments in {"open": [(11,), (1,)], "rewind": [(4,), (9,)], "read": [(0, 3)]}.items():
        for values in arguments:
            assert refusal(getattr(rings.ours, name), *values) == refusal(getattr(rings.theirs, name), *values)


def test_a_unit_opened_again_sees_what_is_still_held() -> None:
    rings = Rings(config_of(Geometry(unit=2, window=4, sinks=1)), "bf16")
    rings.run(8)
    for unit in (5, 6, 7):
        for out, case in rings.passes(unit, ISAS[-1]):
            case.check(out)
        rings.commit(unit)
    rings.ours.rewind(7)
    rings.theirs.rewind(7)
    assert rings.ours.held() == rings.theirs.held()
    for out, case in rings.passes(7, ISAS[-1]):
        case.check(out)


# ---------------------------------------------------------------------- refusals


def test_attention_refuses_what_does_not_fit() -> None:
    case = Case.random("fp32", 3, 2, 16, 10, [(0, 10)])
    for options, words in [
        ({"ranges": [(0, 11)]}, r"expected ranges within the 10 rows, none empty, got \[0, 11\)"),
        ({"ranges": [(3, 3)]}, r"none empty, got \[3, 3\)"),
        ({"ranges": []}, "expected at least one key"),
        ({"sink_rows": 11}, "expected 0 to 10 rows of sinks"),
        ({"sink_rows": 1, "q_sink": None}, "expected queries turned for the sinks"),
        ({"q_sink": case.q[:2]}, r"expected q_sink \[3, 2, 16\], got \[2, 2, 16\]"),
    ]:
        with pytest.raises(ValueError, match=words):
            case.native("plain", **options)
    with pytest.raises(ValueError, match="expected a head of a multiple of 16 numbers, got 24"):
        kernels.KeyValues(*(np.zeros((4, 2, 24), np.float32),) * 2, "fp32")
    with pytest.raises(ValueError, match="expected keys and values in fp32 or bf16, got int8"):
        kernels.KeyValues(case.k, case.v, "int8")
    with pytest.raises(ValueError, match="expected isa to be one of plain, avx2"):
        case.native("sse9")


# ---------------------------------------------------------------------- cfrt.nn.attention


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(
    "options", [{}, {"ranges": [(9, 11), (2, 6)]}, {"ranges": [(9, 11), (2, 6)], "sink_tokens": 3}]
)
def test_backend_of_cfrt_nn(options: dict, dtype: torch.dtype) -> None:
    """Views and batches as they come; error at most twice that of PyTorch's fused attention."""
    torch.manual_seed(0)
    q = torch.randn(2, 3, 5, 16, dtype=dtype).transpose(1, 2)
    k, v = (torch.randn(2, 22, 3, 16, dtype=dtype)[:, ::2] for _ in range(2))
    if "sink_tokens" in options:
        options = {**options, "q_sink": torch.randn(2, 5, 3, 16, dtype=dtype)}
    exact = attention(q.double(), k.double(), v.double(), **{**options, **_doubled(options)})
    got, sdpa = (attention(q, k, v, **options, backend=backend) for backend in ("native", "sdpa"))
    assert got.dtype == dtype
    assert got.shape == q.shape
    assert (got - exact).abs().max() <= 2 * (sdpa - exact).abs().max()


def _doubled(options: dict) -> dict:
    return {"q_sink": options["q_sink"].double()} if "q_sink" in options else {}


def test_backend_refuses_what_the_kernel_cannot() -> None:
    q = torch.randn(1, 4, 2, 16)
    with pytest.raises(EngineError, match="takes no mask"):
        attention(q, q, q, mask=torch.ones(4, 4, dtype=torch.bool), backend="native")
    with pytest.raises(
        EngineError, match=r"takes float32 or bfloat16 on the CPU, all alike; got torch\.float64 on cpu"
    ):
        attention(q.double(), q.double(), q.double(), backend="native")
    with pytest.raises(EngineError, match="has no gradient"):
        attention(q.requires_grad_(), q, q, backend="native")
