"""What ptxsim finds, each on the smallest kernel that has it, and beside it the kernel that is right."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ptxsim import EVERY_SCHEDULE, Buffer, Memory, Module, Options, PtxError, Report
from ptxsim.snippet import snippet

pytestmark = [pytest.mark.cpu, pytest.mark.usefixtures("cxx")]

TILE = ".shared .align 16 .b8 tile[1024];"
ADDRESS = ("mov.u32 r0, tile", "mad.lo.u32 r1, tid, 4, r0")  # r1: this thread's word of the tile
NEXT_LANE = ("xor.b32 r2, tid, 1", "mad.lo.u32 r2, r2, 4, r0")  # r2: a word of the neighbour in the warp
NEXT_WARP = ("xor.b32 r2, tid, 32", "mad.lo.u32 r2, r2, 4, r0")  # r2: the same lane's word in the other warp
OUT = ("mad.wide.u32 q1, tid, 4, q0", "st.global.u32 [q1], r3")


def run(
    *lines: str, threads: int = 64, grid: int = 1, options: Options = Options(), words: int = 64,  # noqa: B008
    buffers: tuple[Buffer, ...] = (), memory: Memory | None = None, shared: int = 0, before: str = TILE,
) -> tuple[Report, np.ndarray]:  # fmt: skip
    """Launches the lines with `words` of output at q0 and `buffers` from q1 on."""
    memory = memory or Memory()
    out = memory.empty(words, np.uint32)
    text = snippet(*lines, parameters=1 + len(buffers), before=before)
    report = Module(text).launch("k", (grid,), (threads,), [out, *buffers], memory, shared, options)
    return report, out.array


every = pytest.mark.parametrize("options", EVERY_SCHEDULE, ids=lambda o: f"{o.schedule}-{o.copies}")

WRONG = {
    "global load past the end": ("bounds", ["add.s64 q1, q0, 256", "ld.global.u32 r3, [q1]"]),
    "global store before the start": ("bounds", ["st.global.u32 [q0+-4], tid"]),
    "half of an access past the end": ("bounds", ["add.s64 q1, q0, 252", "st.global.v2.u32 [q1+-4], {tid, tid}",
                                                  "st.global.v4.u32 [q1+4], {tid, tid, tid, tid}"]),
    "shared past the end": ("bounds", [*ADDRESS, "st.shared.u32 [r1+1020], tid"]),
    "generic address of shared memory past the end": ("bounds", ["mov.u64 q1, tile", "cvta.shared.u64 q1, q1",
                                                                 "st.u32 [q1+1024], tid"]),
    "local past the end": ("bounds", [".local .align 4 .b8 mine[16];", "mov.u64 q1, mine",
                                     "st.local.u32 [q1+16], tid"]),
    "global misaligned": ("alignment", ["ld.global.v2.u32 {r3, r4}, [q0+4]"]),
    "shared misaligned": ("alignment", [*ADDRESS, "st.shared.v4.u32 [r0+4], {tid, tid, tid, tid}"]),
    "cp.async misaligned": ("alignment", [*ADDRESS, "cp.async.ca.shared.global [r0], [q0+4], 8"]),
    "shared, not written": ("uninitialised", [*ADDRESS, "ld.shared.u32 r3, [r1]"]),
    "global, not written": ("uninitialised", ["ld.global.u32 r3, [q0]"]),
    "lanes of a warp, no barrier": ("race", [*ADDRESS, *NEXT_LANE, "st.shared.u32 [r1], tid",
                                             "ld.shared.u32 r3, [r2]"]),
    "a warp barrier is not for warps": ("race", [*ADDRESS, *NEXT_WARP, "st.shared.u32 [r1], tid",
                                                 "bar.warp.sync 0xffffffff", "ld.shared.u32 r3, [r2]"]),
    "a shuffle orders nothing": ("race", [*ADDRESS, *NEXT_LANE, "st.shared.u32 [r1], tid",
                                          "shfl.sync.bfly.b32 r4, tid, 1, 31, 0xffffffff", "ld.shared.u32 r3, [r2]"]),
    "written before others have read": ("race", [*ADDRESS, *NEXT_WARP, "st.shared.u32 [r1], tid", "bar.sync 0",
                                                 "ld.shared.u32 r3, [r2]", "st.shared.u32 [r1], tid"]),
    "two lanes write one word": ("race", [*ADDRESS, "st.shared.u32 [r0], tid"]),
    "a byte beside a word": ("race", [*ADDRESS, *NEXT_LANE, "st.shared.u32 [r1], tid", "ld.shared.u8 r3, [r2+3]"]),
    "an atomic beside a store": ("race", [*ADDRESS, "setp.eq.u32 p0, tid, 0", "@p0 st.shared.u32 [r0], tid",
                                          "@!p0 red.shared.add.u32 [r0], 1"]),
    "two blocks write one word": ("race", ["st.global.u32 [q0], tid"]),
    "read while the copy flies": ("race", [*ADDRESS, "cp.async.ca.shared.global [r1], [q1], 4",
                                           "cp.async.commit_group", "ld.shared.u32 r3, [r1]"]),
    "wait of the wrong group": ("race", [*ADDRESS, "cp.async.ca.shared.global [r1], [q1], 4",
                                         "cp.async.commit_group", "cp.async.wait_group 1", "ld.shared.u32 r3, [r1]"]),
    "waited for, but no barrier": ("race", [*ADDRESS, *NEXT_WARP, "cp.async.ca.shared.global [r1], [q1], 4",
                                            "cp.async.wait_all", "ld.shared.u32 r3, [r2]"]),
    "copied over what others read": ("race", [*ADDRESS, *NEXT_WARP, "st.shared.u32 [r1], tid", "bar.sync 0",
                                              "ld.shared.u32 r3, [r2]", "cp.async.ca.shared.global [r1], [q1], 4",
                                              "cp.async.wait_all"]),
    "shuffle with lanes missing": ("divergence", ["setp.lt.u32 p0, lane, 7",
                                                  "@p0 shfl.sync.bfly.b32 r3, tid, 1, 31, 0xffffffff"]),
    "vote with lanes missing": ("divergence", ["setp.lt.u32 p0, lane, 7",
                                               "@p0 vote.sync.ballot.b32 r3, p0, 0xffffffff"]),
    "barrier in one branch of a warp": ("divergence", ["setp.lt.u32 p0, lane, 7", "@p0 bar.sync 0"]),
    "ldmatrix in a branch": ("divergence", [*ADDRESS, "st.shared.u32 [r1], tid", "bar.sync 0",
                                            "setp.lt.u32 p0, lane, 7",
                                            "@p0 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {r3}, [r0]"]),
    "barrier that a warp passes by": ("barrier", ["setp.lt.u32 p0, tid, 32", "@p0 bar.sync 0"]),
    "warps at two barriers": ("barrier", ["setp.lt.u32 p0, tid, 32", "@p0 bra A", "bar.sync 0", "bra B", "A:",
                                          "bar.sync 0", "B:"]),
    "lanes that left before the barrier": ("barrier", ["setp.lt.u32 p0, lane, 7", "@p0 ret", "bar.sync 0"]),
    "loop without an end": ("limit", ["L:", "bra L"]),
    "trap": ("bounds", ["trap"]),
}  # fmt: skip


@every
@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_found(name: str, options: Options) -> None:
    kind, lines = WRONG[name]
    memory = Memory()
    source = memory.put(np.arange(8, dtype=np.uint32))
    options = Options(options.schedule, options.copies, options.seed, max_instructions=10_000)
    copies = any("[q1]" in line and "cp.async" in line for line in lines)
    report, _ = run(*lines, memory=memory, options=options, grid=2, buffers=(source,) if copies else ())
    assert kind in report.kinds(), report
    assert report.findings[0].line > 0
    assert kind in str(report)


RIGHT = {
    "lanes of a warp": [*ADDRESS, *NEXT_LANE, "st.shared.u32 [r1], tid", "bar.warp.sync 0xffffffff",
                        "ld.shared.u32 r3, [r2]", "xor.b32 r3, r3, 1", *OUT],
    "warps": [*ADDRESS, *NEXT_WARP, "st.shared.u32 [r1], tid", "bar.sync 0", "ld.shared.u32 r3, [r2]",
              "xor.b32 r3, r3, 32", *OUT],
    "written after others have read": [*ADDRESS, *NEXT_WARP, "st.shared.u32 [r1], lane", "bar.sync 0",
                                       "ld.shared.u32 r4, [r2]", "bar.sync 0", "st.shared.u32 [r1], tid",
                                       "ld.shared.u32 r3, [r1]", *OUT],
    "bytes side by side": [*ADDRESS, "add.u32 r1, r0, tid", "st.shared.u8 [r1], tid", "ld.shared.u8 r3, [r1]", *OUT],
    "a thread's own copy": [*ADDRESS, "cp.async.ca.shared.global [r1], [q1], 4", "cp.async.wait_all",
                            "ld.shared.u32 r3, [r1]", "add.u32 r3, r3, tid", *OUT],
    "generic and shared addresses": [*ADDRESS, "cvt.u64.u32 q2, r1", "cvta.shared.u64 q2, q2", "st.u32 [q2], tid",
                                     "cvta.to.shared.u64 q2, q2", "ld.shared.u32 r3, [q2]", *OUT],
    "half a block each, with its own barrier": [
        *ADDRESS, "setp.ge.u32 p0, tid, 32", "@p0 bra B", "st.shared.u32 [r1], tid", "bar.warp.sync -1",
        "ld.shared.u32 r3, [r1]", "bar.sync 1, 32", "bra C", "B:", "mov.u32 r3, tid", "bar.sync 2, 32", "C:", *OUT],
    "a warp that gives and does not wait": [
        *ADDRESS, *NEXT_WARP, "mov.u32 r3, tid", "setp.ge.u32 p0, tid, 32", "@p0 bra B", "st.shared.u32 [r1], tid",
        "bar.arrive 1, 64", "bra C", "B:", "bar.sync 1, 64", "ld.shared.u32 r3, [r2]", "add.u32 r3, r3, 32", "C:",
        *OUT],
}  # fmt: skip


@every
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_is_not_reported(name: str, options: Options) -> None:
    """In each, thread t stores t."""
    memory = Memory()
    source = memory.put(np.zeros(8, np.uint32))
    needs = any("[q1]" in line and "cp.async" in line for line in RIGHT[name])
    lines = [
        line.replace("q1", "q3") if "st.global" in line or line.startswith("mad.wide") else line for line in RIGHT[name]
    ]
    report, out = run(*lines, memory=memory, options=options, buffers=(source,) if needs else ())
    assert report.clean, report
    assert (out == np.arange(64)).all()


def test_an_atomic_sum_is_no_race() -> None:
    report, out = run("red.global.add.u32 [q1], 1", grid=3, buffers=(), words=1, before="") if False else atomic_sum()
    assert report.clean, report
    assert out[0] == 3 * 64


def atomic_sum() -> tuple[Report, np.ndarray]:
    memory = Memory()
    total = memory.put(np.zeros(1, np.uint32))
    report = Module(snippet("red.global.add.u32 [q0], 1")).launch("k", (3,), (64,), [total], memory)
    return report, total.array


def test_a_copy_is_late_when_it_may_be() -> None:
    """Read without waiting: there with eager copies, poison with lazy ones; a race either way."""
    lines = [*ADDRESS, "cp.async.ca.shared.global [r1], [q1], 4", "ld.shared.u32 r3, [r1]",
             "mad.wide.u32 q2, tid, 4, q0", "st.global.u32 [q2], r3"]  # fmt: skip
    seen = {}
    for copies in ("eager", "lazy", "mixed"):
        memory = Memory()
        source = memory.put(np.full(8, 7, np.uint32))
        report, out = run(*lines, memory=memory, buffers=(source,), options=Options(copies=copies, seed=3))
        assert report.kinds() == {"race"}
        seen[copies] = set(out)
    assert seen == {"eager": {7}, "lazy": {2**32 - 1}, "mixed": {7, 2**32 - 1}}


def test_a_short_copy_is_filled_with_zeros() -> None:
    lines = [*ADDRESS, "and.b32 r4, tid, 1", "shl.b32 r4, r4, 2", "cp.async.ca.shared.global [r1], [q1], 4, r4",
             "cp.async.wait_all", "ld.shared.u32 r3, [r1]", "mad.wide.u32 q2, tid, 4, q0",
             "st.global.u32 [q2], r3"]  # fmt: skip
    memory = Memory()
    source = memory.put(np.full(8, 7, np.uint32))
    report, out = run(*lines, memory=memory, buffers=(source,))
    assert report.clean, report
    assert (out == np.arange(64) % 2 * 7).all()


def test_a_schedule_is_drawn_from_its_seed() -> None:
    """Eight warps take numbers: in order, in reverse, or as the seed says."""

    def order(options: Options) -> list[int]:
        memory = Memory()
        counter, out = memory.put(np.zeros(1, np.uint32)), memory.empty(8, np.uint32)
        lines = ["setp.ne.u32 p0, lane, 0", "@p0 ret", "atom.global.add.u32 r0, [q0], 1", "shr.u32 r1, tid, 5",
                 "mad.wide.u32 q2, r1, 4, q1", "st.global.u32 [q2], r0"]  # fmt: skip
        report = Module(snippet(*lines, parameters=2)).launch(
            "k", (1,), (256,), [counter, out], memory, options=options
        )
        assert report.clean, report
        return [int(x) for x in out.array]

    assert order(Options()) == list(range(8))
    assert order(Options("reversed")) == list(range(8))[::-1]
    drawn = [order(Options("random", seed=s)) for s in range(6)]
    assert drawn == [order(Options("random", seed=s)) for s in range(6)]
    assert len({tuple(d) for d in drawn}) > 1


# --------------------------------------------------------------------------------------------------------------- counts


def wavefronts(words: list[int]) -> int:
    """The most distinct words in one bank."""
    return max(len({w for w in words if w % 32 == bank}) for bank in range(32))


@settings(max_examples=20)
@given(st.lists(st.integers(0, 255), min_size=32, max_size=32), st.sampled_from([1, 2, 4]))
def test_conflicts_and_sectors_are_counted_exactly(places: list[int], vector: int) -> None:
    """Loads of 1, 2 or 4 words at any places: wavefronts by quarter, half or whole warp; sectors by 32 bytes."""
    places = [p // vector * vector for p in places]
    memory = Memory()
    where = memory.put(np.array(places, np.uint32) * 4)
    data = memory.put(np.zeros(256, np.uint32))
    load = {1: "u32 r3", 2: "v2.u32 {r3, r4}", 4: "v4.u32 {r3, r4, r5, r6}"}[vector]
    lines = ["mad.wide.u32 q2, tid, 4, q0", "ld.global.u32 r1, [q2]", "cvt.u64.u32 q3, r1", "add.s64 q3, q1, q3",
             f"ld.global.{load}, [q3]", "mov.u32 r0, tile", "add.u32 r1, r1, r0",
             f"ld.shared.{load}, [r1]"]  # fmt: skip
    module = Module(snippet(*lines, parameters=2, before=TILE))
    report = module.launch("k", (1,), (32,), [where, data], memory)
    assert report.kinds() == {"uninitialised"}
    _, from_global, from_shared = [row for row in report.rows if row.opcode.startswith(("ld.global", "ld.shared"))]
    group = 32 // vector
    phases = [places[i : i + group] for i in range(0, 32, group)]
    words = [[p + k for p in phase for k in range(vector)] for phase in phases]
    assert from_shared.wavefronts == sum(map(wavefronts, words))
    assert from_shared.ideal_wavefronts == vector
    assert from_global.sectors == len({(p + k) // 8 for p in places for k in range(vector)})
    assert from_global.ideal_sectors == -(-len(set(places)) * vector // 8)


# -------------------------------------------------------------------------------------------------------------- control


def test_lanes_loop_as_often_as_they_must() -> None:
    """Steps of the Collatz sequence of each lane: lanes leave the loop one by one and meet after it."""
    lines = ["add.u32 r0, tid, 1", "mov.u32 r3, 0", "L:", "setp.eq.u32 p0, r0, 1", "@p0 bra DONE", "add.u32 r3, r3, 1",
             "and.b32 r1, r0, 1", "setp.eq.u32 p1, r1, 0", "@p1 bra EVEN", "mad.lo.u32 r0, r0, 3, 1", "bra.uni L",
             "EVEN:",
             "shr.u32 r0, r0, 1", "bra.uni L", "DONE:", "bar.warp.sync 0xffffffff", *OUT]  # fmt: skip

    def steps(n: int) -> int:
        return 0 if n == 1 else 1 + steps(n // 2 if n % 2 == 0 else 3 * n + 1)

    report, out = run(*lines)
    assert report.clean, report
    assert [int(x) for x in out] == [steps(t + 1) for t in range(64)]


def test_a_switch_jumps_by_a_table() -> None:
    lines = ["and.b32 r0, tid, 3", "mov.u32 r3, 0", "T: .branchtargets A, B, C, D", "brx.idx r0, T",
             *(line for i, name in enumerate("ABCD") for line in (f"{name}:", f"add.u32 r3, r3, {10**i}", "bra.uni E")),
             "E:", *OUT]  # fmt: skip
    report, out = run(*lines)
    assert report.clean, report
    assert [int(x) for x in out] == [10 ** (t % 4) for t in range(64)]


def test_a_function_is_called() -> None:
    """Its parameters and results go through the caller's places; registers of the same name are its own."""
    function = """
.func (.param .b32 result) twice(.param .b32 given)
{
.reg .b32 r<4>;
ld.param.b32 r3, [given];
add.u32 r3, r3, r3;
st.param.b32 [result], r3;
ret;
}
"""
    call = [
        "{",
        ".param .b32 a;",
        "st.param.b32 [a], r3",
        ".param .b32 b;",
        "call.uni (b), twice, (a)",
        "ld.param.b32 r3, [b]",
        "}",
    ]
    report, out = run("mov.u32 r3, tid", *call, *call, *OUT, before=function)
    assert report.clean, report
    assert (out == 4 * np.arange(64)).all()


def test_variables_of_the_module_are_memory() -> None:
    table = ".const .align 4 .b32 table[4] = {5, 6, 7, 0x8};\n.global .align 8 .b8 bytes[4] = {1, 2, 3, 4};"
    lines = ["and.b32 r0, tid, 3", "mov.u64 q2, table", "mad.wide.u32 q2, r0, 4, q2", "ld.const.u32 r3, [q2]",
             "mov.u64 q3, bytes", "cvt.u64.u32 q4, r0", "add.s64 q3, q3, q4", "ld.global.u8 r4, [q3]",
             "mad.lo.u32 r3, r3, 10, r4", *OUT]  # fmt: skip
    report, out = run(*lines, before=table)
    assert report.clean, report
    assert [int(x) for x in out] == [(51, 62, 73, 84)[t % 4] for t in range(64)]


def test_dynamic_shared_memory_lies_behind_the_static() -> None:
    before = ".shared .align 4 .b8 fixed[20];\n.extern .shared .align 16 .b8 dynamic[];"
    lines = ["mov.u32 r3, dynamic", "mad.lo.u32 r1, tid, 4, r3", "st.shared.u32 [r1], tid", *OUT]
    report, out = run(*lines, before=before, shared=256)
    assert report.clean, report
    assert set(out) == {32}
    report, _ = run(*lines, before=before, shared=252)
    assert report.kinds() == {"bounds"}


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("frobnicate.b32 r0, r1", r"PTX line \d+: unknown opcode 'frobnicate.b32'"),
        ("add.rz.f32 f0, f1, f2", r"PTX line \d+: unknown opcode 'add.rz.f32'"),
        ("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {q1}, {q2}, {q3}, {q4}", "unknown opcode 'mma.sync"),
        ("wgmma.fence.sync.aligned", "unknown opcode 'wgmma.fence.sync.aligned'"),
        ("add.s32 r0, r1, nobody", "expected a register, a variable or a number, got 'nobody'"),
        ("add.s32 r0, r1, q0", r"'add.s32': expected operands of \[4, 4, 4\] bytes, got \[4, 4, 8\]"),
        ("call.uni nobody, ()", "expected a call of a function of this module, got 'nobody'"),
    ],
)
def test_what_is_not_known_is_an_error(line: str, message: str) -> None:
    with pytest.raises(PtxError, match=message):
        run(line)


def test_arguments_have_the_parameters_sizes() -> None:
    with pytest.raises(TypeError, match=r"expected arguments of \[8\] bytes, got \[4\]"):
        Module(snippet()).launch("k", (1,), (32,), [np.int32(1)], Memory())


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match=r"expected schedule to be one of .*, got 'chaos'"):
        run(options=Options("chaos"))
