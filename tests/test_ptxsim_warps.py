"""Opcodes of ptxsim that are not one lane's arithmetic: carries, vectors, memory, atomics, shuffles, votes, reductions.

With test_ptxsim_opcodes.py, _checks.py and _layouts.py this is every handler there is; the last test says so.
"""

from collections.abc import Callable, Iterator
from functools import reduce

import numpy as np
import pytest
from ptxsim import Memory, Module, Options
from ptxsim.engine import handlers
from ptxsim.snippet import snippet
from test_ptxsim_layouts import MULTIPLICATIONS
from test_ptxsim_opcodes import covered

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("cxx")]

LANES = 64
IN_CHECKS = {
    "bar", "bar.warp.sync", "bra", "brx.idx", "ret", "trap", "cvta", "cp.async", "cp.async.commit_group",
    "cp.async.wait_group",
}  # fmt: skip


def launch(lines: list[str], *inputs: np.ndarray, out: np.dtype, before: str = "") -> np.ndarray:
    """Inputs at q0, q1 ...; the output, LANES items of type `out`, after them."""
    memory = Memory()
    item, shape = out.subdtype or (out, ())
    result = memory.empty((LANES, *shape), item)
    buffers = [*(memory.put(x) for x in inputs), result]
    module = Module(snippet(*lines, parameters=len(buffers), before=before))
    report = module.launch("k", (1,), (LANES,), buffers, memory)
    assert report.clean, report
    return result.array


def at(pointer: str, size: int) -> str:
    return f"mad.wide.u32 {pointer}, tid, {size}, {pointer}"


def words(seed: int, bits: int, lanes: int = LANES) -> np.ndarray:
    """Random numbers, a third of them near the ends of the range."""
    x = np.frombuffer(np.random.default_rng(seed).bytes(lanes * bits // 8), f"u{bits // 8}").copy()
    ends = np.array([0, 1, 2**bits - 1, 2**bits - 2], dtype=x.dtype)
    x[::3] = np.resize(ends[np.random.default_rng(seed + 1).permutation(4)], len(x[::3]))
    return x


# -------------------------------------------------------------------------------------------------------------- carries


@pytest.mark.parametrize("sign", ["u", "s"])
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("name", ["add", "sub"])
def test_sums_of_three_words_carry(name: str, bits: int, sign: str) -> None:
    size, r = bits // 8, "r" if bits == 32 else "q"
    t = f"{sign}{bits}"
    lines = [at("q0", 3 * size), at("q1", 3 * size), at("q2", 3 * size)]
    lines += [f"ld.global.b{bits} {r}{5 + i + 3 * s}, [q{s}+{size * i}]" for s in range(2) for i in range(3)]
    ops = [f"{name}.cc.{t}", f"{name}c.cc.{t}", f"{name}c.{t}"]
    lines += [f"{op} {r}{5 + i}, {r}{5 + i}, {r}{8 + i}" for i, op in enumerate(ops)]
    lines += [f"st.global.b{bits} [q2+{size * i}], {r}{5 + i}" for i in range(3)]
    a, b = words(1, bits, 3 * LANES), words(2, bits, 3 * LANES)
    got = launch(lines, a, b, out=np.dtype((f"u{size}", 3)))
    whole = lambda x: [sum(int(w) << bits * i for i, w in enumerate(row)) for row in x.reshape(LANES, 3)]  # noqa: E731
    sign_ = 1 if name == "add" else -1
    assert whole(got) == [(x + sign_ * y) % 2 ** (3 * bits) for x, y in zip(whole(a), whole(b), strict=True)]


def test_products_carry() -> None:
    """64 x 64 to 128 bits out of 32-bit products, each with the carry of the one before."""
    lines = [at("q0", 8), at("q1", 8), at("q2", 16), "ld.global.v2.u32 {r0, r1}, [q0]",
             "ld.global.v2.u32 {r2, r3}, [q1]",
             "mul.lo.u32 r4, r0, r2", "mul.hi.u32 r5, r0, r2", "mov.u32 r6, 0", "mov.u32 r7, 0",
             "mad.lo.cc.u32 r5, r0, r3, r5", "madc.hi.u32 r6, r0, r3, 0", "mad.lo.cc.u32 r5, r1, r2, r5",
             "madc.hi.cc.u32 r6, r1, r2, r6", "addc.u32 r7, 0, 0", "mad.lo.cc.u32 r6, r1, r3, r6",
             "madc.hi.u32 r7, r1, r3, r7", "st.global.v4.u32 [q2], {r4, r5, r6, r7}"]  # fmt: skip
    a, b = words(3, 64), words(4, 64)
    got = launch(lines, a, b, out=np.dtype(("u4", 4)))
    expected = [int(x) * int(y) for x, y in zip(a, b, strict=True)]
    assert [sum(int(w) << 32 * i for i, w in enumerate(row)) for row in got] == expected


def test_a_product_takes_and_gives_a_carry() -> None:
    """What the last test leaves: mad.hi.cc, and madc.lo with and without .cc."""
    lines = [at("q0", 4), at("q1", 4), at("q2", 16), "ld.global.u32 r0, [q0]", "ld.global.u32 r1, [q1]",
             "mad.hi.cc.u32 r2, r0, r1, r0", "madc.lo.cc.u32 r3, r0, r1, r1", "madc.lo.u32 r4, r0, r1, r0",
             "st.global.v4.u32 [q2], {r2, r3, r4, r4}"]  # fmt: skip
    a, b = words(5, 32), words(6, 32)
    got = launch(lines, a, b, out=np.dtype(("u4", 4)))
    for x, y, row in zip(a.tolist(), b.tolist(), got.tolist(), strict=True):
        first = (x * y >> 32) + x
        second = x * y % 2**32 + y + (first >> 32)
        third = x * y + x + (second >> 32)
        assert row[:3] == [n % 2**32 for n in (first, second, third)]


# --------------------------------------------------------------------------------------------------- vectors and memory


def test_registers_are_packed_and_unpacked() -> None:
    lines = [at("q0", 8), at("q1", 16), "ld.global.u64 q2, [q0]", "mov.b64 {r0, r1}, q2", "mov.b32 {h0, h1}, r0",
             "mov.b32 r2, {h1, h0}", "mov.b64 q3, {r1, r2}", "mov.b64 {_, r3}, q3", "cvt.u64.u32 q4, r3",
             "st.global.v2.u64 [q1], {q3, q4}"]  # fmt: skip
    x = words(7, 64)
    got = launch(lines, x, out=np.dtype(("u8", 2)))
    for v, (packed, upper) in zip(x.tolist(), got.tolist(), strict=True):
        swapped = (v & 0xFFFF) << 16 | v >> 16 & 0xFFFF
        assert (packed, upper) == (swapped << 32 | v >> 32, swapped)


@pytest.mark.parametrize("kind", ["u8", "s8", "u16", "s16", "b16", "u32", "s32", "f32", "u64", "s64", "f64"])
@pytest.mark.parametrize("space", ["global", "shared", "local", "generic"])
def test_loads_extend_and_stores_cut(kind: str, space: str) -> None:
    """A value goes through a place of its type in each space, and is sign- or zero-extended to 64 bits."""
    size = int(kind[1:]) // 8
    register = {1: "h0", 2: "h0", 4: "r5", 8: "q5"}[size]
    wide = {1: "h1", 2: "h1", 4: "r6", 8: "q6"}[size]
    place = {"global": "q1", "shared": "r1", "local": "q4", "generic": "q4"}[space]
    name = "" if space == "generic" else f".{space}"
    bits = {"f32": "b32", "f64": "b64"}.get(kind, kind)
    signed = kind[0] == "s"
    lines = [".local .align 8 .b8 mine[8];", at("q0", size), at("q1", size), at("q2", 8), "mov.u64 q4, mine",
             "mov.u32 r1, tile", f"mad.lo.u32 r1, tid, {size}, r1",
             f"ld.global.b{8 * size} {register}, [q0]"]  # fmt: skip
    lines += ["cvta.local.u64 q4, q4"] if space == "generic" else []
    lines += [f"st{name}.{bits} [{place}], {register}", f"ld{name}.{bits} {wide}, [{place}]"]
    to, narrow = ("s64", f"s{max(16, 8 * size)}") if signed else ("u64", f"u{max(16, 8 * size)}")
    lines += [f"cvt.{to}.{narrow} q7, {wide}" if size < 8 else f"mov.b64 q7, {wide}", "st.global.u64 [q2], q7"]
    x = words(8, 8 * size)
    space_for = np.zeros(LANES, x.dtype)
    got = launch(lines, x, space_for, out=np.dtype("u8"), before=".shared .align 16 .b8 tile[512];")
    expected = x.view(f"i{size}").astype(np.int64).view(np.uint64) if signed else x.astype(np.uint64)
    np.testing.assert_array_equal(got, expected)


# -------------------------------------------------------------------------------------------------------------- atomics


def atomics() -> Iterator[tuple[str, Callable[[int, int], int]]]:
    for bits in (32, 64):
        for sign in "us":
            if (bits, sign) != (64, "s"):
                yield f"add.{sign}{bits}", lambda a, b: a + b
            yield f"min.{sign}{bits}", min
            yield f"max.{sign}{bits}", max
        yield f"and.b{bits}", lambda a, b: a & b
        yield f"or.b{bits}", lambda a, b: a | b
        yield f"xor.b{bits}", lambda a, b: a ^ b
        yield f"exch.b{bits}", lambda a, b: b
    yield "add.f32", lambda a, b: a + b
    yield "add.f64", lambda a, b: a + b


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("name", "f"), list(atomics()), ids=lambda x: x if isinstance(x, str) else "")
def test_atomics_fold_over_the_lanes(name: str, f: Callable, space: str) -> None:
    """All threads at one place: the end is the fold, and what they got are its steps, in the order of the lanes."""
    kind = name.split(".")[1]
    size = int(kind[1:]) // 8
    dtype = np.dtype({"u": "u", "s": "i", "b": "u", "f": "f"}[kind[0]] + str(size))
    r, r2 = (("r5", "r6") if size == 4 else ("q5", "q6")) if kind[0] != "f" or size == 8 else ("r5", "r6")
    values = words(9, 8 * size).view(dtype) if kind[0] != "f" else np.arange(LANES).astype(dtype)
    start = values[:1] if kind[0] != "f" else np.zeros(1, dtype)
    lines = ["mov.b64 q8, q1", at("q0", size), at("q2", size), f"ld.global.b{8 * size} {r}, [q0]"]
    if space == "shared":
        lines += ["mov.u64 q9, tile", "setp.eq.u32 p0, tid, 0", f"@p0 ld.global.b{8 * size} {r2}, [q8]",
                  f"@p0 st.shared.b{8 * size} [q9], {r2}", "bar.sync 0"]  # fmt: skip
    place = "[q9]" if space == "shared" else "[q8]"
    lines += [f"atom.{space}.{name} {r2}, {place}, {r}", f"st.global.b{8 * size} [q2], {r2}"]
    got = launch(lines, values, start, out=dtype, before=".shared .align 16 .b8 tile[16];")
    steps = [start.tolist()[0]]
    for value in values.tolist():
        steps.append(int(np.array(f(steps[-1], value) & (1 << 8 * size) - 1, f"u{size}").view(dtype))
                     if kind[0] != "f" else f(steps[-1], value))  # fmt: skip
    assert got.tolist() == steps[:-1]


@pytest.mark.parametrize("bits", [32, 64])
def test_compare_and_swap(bits: int) -> None:
    """Thread t swaps t for t + 1: in order, all succeed."""
    size, r = bits // 8, "r" if bits == 32 else "q"
    convert = [] if bits == 32 else ["cvt.u64.u32 q5, tid"]
    compare = "tid" if bits == 32 else "q5"
    lines = [*convert, at("q1", size), f"add.u{bits} {r}6, {compare}, 1",
             f"atom.global.cas.b{bits} {r}7, [q0], {compare}, {r}6", f"st.global.b{bits} [q1], {r}7"]  # fmt: skip
    got = launch(lines, np.zeros(1, f"u{size}"), out=np.dtype(f"u{size}"))
    assert got.tolist() == list(range(LANES))


def test_red_gives_nothing_back() -> None:
    memory = Memory()
    total = memory.put(np.full(1, 5, np.uint32))
    report = Module(snippet("red.relaxed.gpu.global.add.u32 [q0], tid")).launch("k", (2,), (LANES,), [total], memory)
    assert report.clean, report
    assert total.array[0] == 5 + 2 * sum(range(LANES))


# ---------------------------------------------------------------------------------------------------------- collectives


def shuffled(mode: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """PTX ISA 9.7.9.6, its pseudocode: (source lane, predicate)."""
    segment, clamp = c >> 8 & 31, c & 31
    high = (lane & segment) | (clamp & ~segment & 31)
    low = lane & segment
    j, inside = {
        "up": (lane - b, lane - b >= high),
        "down": (lane + b, lane + b <= high),
        "bfly": (lane ^ b, (lane ^ b) <= high),
        "idx": (low | (b & ~segment & 31), (low | (b & ~segment & 31)) <= high),
    }[mode]
    return (j, True) if inside else (lane, False)


@pytest.mark.parametrize("width", [32, 16, 8, 4])
@pytest.mark.parametrize("by", [0, 1, 3, 16])
@pytest.mark.parametrize("mode", ["up", "down", "bfly", "idx"])
def test_shuffles(mode: str, by: int, width: int) -> None:
    """`c` as CUDA's __shfl intrinsics make it for a width."""
    c = (32 - width) << 8 | (0 if mode == "up" else 31)
    lines = [at("q0", 8), f"shfl.sync.{mode}.b32 r0|p0, tid, {by}, {c}, 0xffffffff", "selp.u32 r1, 1, 0, p0",
             "st.global.v2.u32 [q0], {r0, r1}"]  # fmt: skip
    got = launch(lines, out=np.dtype(("u4", 2)))
    for thread, (value, inside) in enumerate(got.tolist()):
        source, ok = shuffled(mode, thread % 32, by, c)
        assert (value, inside) == (thread // 32 * 32 + source, ok)


def test_votes_and_the_active_mask() -> None:
    lines = [at("q0", 20), "mul.lo.u32 r0, tid, tid", "and.b32 r0, r0, 5", "setp.eq.u32 p0, r0, 4",
             "vote.sync.ballot.b32 r1, p0, 0xffffffff", "vote.sync.any.pred p1, p0, 0xffffffff",
             "selp.u32 r2, 1, 0, p1",
             "vote.sync.all.pred p1, p0, 0xffffffff", "selp.u32 r3, 1, 0, p1", "vote.sync.uni.pred p1, p0, 0xffffffff",
             "selp.u32 r4, 1, 0, p1", "mov.u32 r5, 0", "@p0 activemask.b32 r5", "st.global.u32 [q0], r1",
             "st.global.u32 [q0+4], r2", "st.global.u32 [q0+8], r3", "st.global.u32 [q0+12], r4",
             "st.global.u32 [q0+16], r5", "membar.gl"]  # fmt: skip
    got = launch(lines, out=np.dtype(("u4", 5)))
    for warp in range(2):
        yes = [t * t & 5 == 4 for t in range(32 * warp, 32 * warp + 32)]
        ballot = sum(y << lane for lane, y in enumerate(yes))
        for lane, row in enumerate(got[32 * warp : 32 * warp + 32].tolist()):
            assert row == [ballot, any(yes), all(yes), len(set(yes)) == 1, ballot if yes[lane] else 0]


REDUCTIONS = {
    "add.s32": lambda a, b: a + b, "add.u32": lambda a, b: a + b, "min.s32": min, "max.s32": max, "min.u32": min,
    "max.u32": max, "and.b32": lambda a, b: a & b, "or.b32": lambda a, b: a | b, "xor.b32": lambda a, b: a ^ b,
}  # fmt: skip


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reductions(name: str) -> None:
    signed = name.endswith("s32")
    x = words(11, 32).view(np.int32 if signed else np.uint32)
    lines = [
        at("q0", 4),
        at("q1", 4),
        "ld.global.u32 r0, [q0]",
        f"redux.sync.{name} r1, r0, 0xffffffff",
        "st.global.u32 [q1], r1",
    ]
    got = launch(lines, x, out=np.dtype("u4"))
    for warp in range(2):
        whole = reduce(REDUCTIONS[name], x[32 * warp : 32 * warp + 32].tolist())
        assert set(got[32 * warp : 32 * warp + 32].tolist()) == {whole % 2**32}


def test_special_registers() -> None:
    """Each thread writes which it is, at its place in the grid."""
    names = ["%tid.x", "%tid.y", "%tid.z", "%ntid.x", "%ntid.y", "%ntid.z", "%ctaid.x", "%ctaid.y", "%ctaid.z",
             "%nctaid.x", "%nctaid.y", "%nctaid.z", "%laneid", "%warpid", "%lanemask_lt", "%lanemask_ge",
             "%dynamic_smem_size"]  # fmt: skip
    grid, block = (2, 3, 2), (4, 4, 3)
    memory = Memory()
    out = memory.empty((12, 48, len(names)), np.uint32)
    lines = ["mov.u32 r0, %ctaid.z", "mad.lo.u32 r0, r0, 3, %ctaid.y", "mad.lo.u32 r0, r0, 2, %ctaid.x",
             "mov.u32 r1, %tid.z", "mad.lo.u32 r1, r1, 4, %tid.y", "mad.lo.u32 r1, r1, 4, %tid.x",
             "mad.lo.u32 r1, r0, 48, r1", f"mad.wide.u32 q1, r1, {4 * len(names)}, q0",
             *(line for i, n in enumerate(names)
               for line in (f"mov.u32 r2, {n}", f"st.global.u32 [q1+{4 * i}], r2"))]  # fmt: skip
    report = Module(snippet(*lines)).launch("k", grid, block, [out], memory, 256, Options("random"))
    assert report.clean, report
    for b in range(12):
        for t in range(48):
            lane = t % 32
            thread, of_block = (t % 4, t // 4 % 4, t // 16), (b % 2, b // 2 % 3, b // 6)
            masks = ((1 << lane) - 1, 2**32 - (1 << lane))
            assert tuple(out.array[b, t]) == (*thread, *block, *of_block, *grid, lane, t // 32, *masks, 256)


def test_every_handler_is_tested() -> None:
    """Here, or in one of the other three files."""
    here = {"mov.pack", "mov.unpack", "ld", "st", "shfl.sync", "vote.sync", "activemask.b32", "nop"}
    here |= {f"atom.{name}" for name, _ in atomics()} | {"atom.cas.b32", "atom.cas.b64"}
    here |= {f"redux.sync.{name}" for name in REDUCTIONS}
    here |= {f"{n}{c}.{s}{b}" for n in ("add", "sub") for c in (".cc", "c.cc", "c") for s in "us" for b in (32, 64)}
    here |= {f"{n}.u32" for n in ("mad.lo.cc", "mad.hi.cc", "madc.lo", "madc.hi", "madc.lo.cc", "madc.hi.cc")}
    layouts = {"ldmatrix", *(f"mma.{name}" for name in MULTIPLICATIONS)}
    assert set(handlers()) == here | IN_CHECKS | layouts | covered()
