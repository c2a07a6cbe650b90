"""Mutants of the bf16 attention and of the merge of its parts."""

import test_cuda_attention as tests
from cuda_fixture import compiled

from .framework import Subject, bug

KERNEL, WALK, KEYS = "attention_bf16.cuh", "walk.cuh", "keys.cuh"
DEVICE, MERGE = "device.cuh", "attention_merge.cuh"
AFTER_K = "__syncthreads();  // K is here for all, and the last V has been used by all"
AFTER_V = "__syncthreads();  // V is here for all, and K has been used by all"
WAIT, NEXT_K = "wait_for_copies();", "if (left > 1) block.copy_keys(at);"
SYNCHRONISATION = [
    bug("race", "no barrier after K", WALK, AFTER_K, ""),
    bug("race", "no barrier after V", WALK, AFTER_V, ""),
    bug("race", "K not waited for", WALK, WAIT, "", 0),
    bug("race", "V not waited for", WALK, WAIT, "", 1),
    bug(
        "race",
        "next K copied before the barrier",
        WALK,
        f"{WAIT}\n        {AFTER_V}\n        {NEXT_K}",
        f"{NEXT_K}\n        {WAIT}\n        {AFTER_V}",
    ),
    bug(
        "race",
        "V copied before the barrier",
        WALK,
        f"{AFTER_K}\n        block.copy_values(at);",
        f"block.copy_values(at);\n        {AFTER_K}",
    ),
    bug("race", "wait that leaves a group in flight", DEVICE, "cp.async.wait_group 0;", "cp.async.wait_group 1;"),
    bug(
        "race",
        "the same in one kernel's PTX",
        "attention_bf16.ptx",
        "cp.async.wait_group 0;",
        "cp.async.wait_group 1;",
        0,
    ),
    bug("divergence", "barrier that one lane misses", WALK, AFTER_V, f"if (threadIdx.x != 5 || left != 1) {AFTER_V}"),
    bug("barrier", "barrier that one warp misses", WALK, AFTER_V, f"if (threadIdx.x >= 32 || left != 1) {AFTER_V}"),
    bug("race", "answer read before the warp has written it", KEYS, "__syncwarp();", "", 1),
]
BOUNDS = [
    bug("bounds", "queries read past the last", WALK, "row < call.a.queries)", "true)"),
    bug("bounds", "answers written past the last", KEYS, "if (first + row < call.a.queries)", "if (true)"),
    bug("any", "parts written past the last", KEYS, "if (query >= call.a.queries) continue;", ""),
    bug("bounds", "merge past the last row", MERGE, "if (row >= rows) return;", ""),
    bug(
        "bounds",
        "too little shared memory",
        "attention_bf16.cu",
        "::kSharedBytes, stream",
        "::kSharedBytes - 1024, stream",
    ),
    bug("bounds", "rows of a plain array past a piece", KERNEL, "copy_row + i * kStepRows < at.rows)", "true)"),
    bug(
        "alignment",
        "queries a chunk off",
        WALK,
        "copy_chunk) * (16 / sizeof(Element))",
        "copy_chunk) * (16 / sizeof(Element)) + 4",
    ),
]
GEOMETRY = [
    bug("value", "padding looked at", KERNEL, "if (at.rows < kGranule) hide(at.rows);", ""),
    bug("value", "one row of padding looked at", KERNEL, "i % 2 >= rows)", "i % 2 > rows)"),
    bug("any", "end of a piece missed by one", KEYS, "if (rows <= 0)", "if (rows < 0)"),
    bug("value", "head ignored", KEYS, "head * static_cast<Offset>(call.head)", "0"),
    bug(
        "value",
        "a part one granule short",
        KEYS,
        "min(first + deal.part, deal.granules)",
        "min(first + deal.part - 1, deal.granules)",
    ),
    bug("value", "sinks not cut off at their end", KEYS, "min(last, deal.sinks)", "last"),
    bug("value", "sinks from the wrong position", KERNEL, "turn ? call.a.q : call.a.q_sink", "call.a.q"),
    bug(
        "any",
        "a slot's start in rows, not granules",
        "launch.cuh",
        "a.row_stride ? a.row_stride : granule * a.heads",
        "granule * a.heads",
    ),
]
NUMBERS = [
    bug("value", "sums not rescaled", KERNEL, "sums[t][n][half * 2 + 1] *= shrink;", ""),
    bug("value", "weights not rescaled", KERNEL, "weight[t][half] *= shrink;", ""),
    bug("value", "maximum that never rises", KERNEL, "> kSlack;", "> 1e38f;"),
    bug(
        "value",
        "maximum over half the lanes",
        DEVICE,
        "return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));",
        "return x;",
    ),
    bug("value", "sum over half the lanes", DEVICE, "return x + __shfl_xor_sync(kAllLanes, x, 2);", "return x;"),
    bug("value", "fragments of K exchanged", KERNEL, "b[0], b[1]", "b[1], b[0]", 0),
    bug("value", "fragments of V exchanged", KERNEL, "b[0], b[1]", "b[1], b[0]", 1),
    bug(
        "value",
        "weights packed the wrong way round",
        KERNEL,
        "pack_bf16(pair[i % 2 * 2], pair[i % 2 * 2 + 1])",
        "pack_bf16(pair[i % 2 * 2 + 1], pair[i % 2 * 2])",
    ),
    bug("value", "V not transposed", KERNEL, "load_matrices_transposed(b", "load_matrices(b"),
    bug("value", "powers of e, not of two", "launch.cuh", "a.scale * 1.44269504f", "a.scale"),
    bug(
        "value",
        "first part left out of the merge",
        MERGE,
        "for (int i = 0; i < parts; ++i) {",
        "for (int i = 1; i < parts; ++i) {",
    ),
    bug("value", "parts merged without their weights", MERGE, "exp2_fast(logarithm[i * rows] - top)", "1.0f"),
    bug("any", "tile not swizzled", DEVICE, "(chunk ^ ((row / kRowsOfALine) & (kChunks - 1)))", "chunk"),
]


def _case(name: str, layout: str) -> None:
    tests.test_bf16_is_the_formula(name, layout)


def _to_the_end() -> None:
    """Rows of an array that ends with the last piece, in the middle of a granule."""
    case = tests.Case(70, 1, 128, 40, [0, 2, 1])
    case.k, case.v = case.k[:3], case.v[:3]
    case.check(case.bf16("rows")[0])


RECORDS = [
    bug("value", "the record's sinks ignored", KEYS, "call.a.q_sink ? pass->sink_granules : 0", "0"),
    bug("any", "the record's pieces ignored", KEYS, "call.a.pass ? call.a.pass->pieces[i] :", ""),
    bug("any", "parts without keys written", KERNEL, "if (is_idle(call)) return;", ""),
    bug("uninitialised", "parts without keys merged", MERGE, "Deal(call).parts()", "call.a.splits"),
]


SUBJECT = Subject(
    "attention_bf16",
    {
        "wrap, sink, tail": lambda: _case("wrap, sink, tail", "granules"),
        "whole granules": lambda: _case("whole granules", "granules"),
        "three parts": lambda: _case("three parts", "granules"),
        "rows": lambda: _case("wrap, sink, tail", "rows"),
        "rows to the end of the array": _to_the_end,
        "a maximum that rises late": tests.test_a_maximum_that_rises_late_is_followed,
        "random schedule": lambda: tests.test_bf16_does_not_depend_on_the_schedule(
            "three parts", tests.EVERY_SCHEDULE[2]
        ),
        "record": lambda: tests.test_a_record_in_device_memory_is_the_list("wrap, sink, tail"),
        "record of few keys": lambda: tests.test_a_record_in_device_memory_is_the_list("more parts than granules"),
        "parts without keys": tests.test_parts_without_keys_write_nothing,
        "bank conflicts": tests.test_bf16_moves_no_more_than_it_must,
    },
    SYNCHRONISATION + BOUNDS + GEOMETRY + NUMBERS + RECORDS,
    compiled.cache_clear,
)
