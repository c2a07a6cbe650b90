"""Mutants of the 8-bit attention."""

import test_cuda_attention as tests
from cuda_fixture import compiled

from .framework import Subject, bug

KERNEL = "attention_int8_fp8.cuh"
MUTANTS = [
    bug(
        "race",
        "no barrier after V",
        "walk.cuh",
        "__syncthreads();  // V is here for all, and K has been used by all",
        "",
    ),
    bug("race", "no barrier before the answer", KERNEL, "__syncthreads();  // the answer is put where", "// "),
    bug("value", "padding looked at", KERNEL, "if (at.rows < kGranule) hide(at.rows);", ""),
    bug("value", "keys scaled by the first granule", KERNEL, "call.a.k_scale[at.offset]", "call.a.k_scale[0]"),
    bug("any", "keys scaled by the next granule", KERNEL, "call.a.k_scale[at.offset]", "call.a.k_scale[at.offset + 1]"),
    bug(
        "bounds",
        "queries' scales past the last",
        KERNEL,
        "min(query_of(i / 2, i % 2), call.a.queries - 1)",
        "query_of(i / 2, i % 2)",
    ),
    bug("value", "values' scales exchanged", KERNEL, "i % 2 ? scale.y : scale.x", "i % 2 ? scale.x : scale.y"),
    bug(
        "value",
        "weights packed the wrong way round",
        KERNEL,
        "biased(t, n, half, 0), biased(t, n, half, 1),",
        "biased(t, n, half, 1), biased(t, n, half, 0),",
    ),
    bug(
        "value",
        "sums not rescaled",
        KERNEL,
        "fmaf(sums[t][n + j][e], shrink[t][e / 2], tile[e])",
        "sums[t][n + j][e] + tile[e]",
    ),
    bug(
        "value", "weights not rescaled", KERNEL, "fmaf(weight[t][half], shrink[t][half], sum)", "weight[t][half] + sum"
    ),
    bug("value", "half of V used twice", KERNEL, "a[1], b[1][i], b[1][i + 1]", "a[1], b[0][i], b[0][i + 1]", 1),
    bug("value", "bias left in", KERNEL, "fmaf(-kBias, scale, kFullWeight - most)", "kFullWeight - most"),
    bug("value", "tokens of V in another order", "attention_int8_fp8.cu", "in / 8 * 2 + in % 2", "in % 2 * 2 + in / 8"),
    bug("any", "parts without keys written", KERNEL, "if (is_idle(call)) return;", ""),
    bug("value", "a device before Ada", "device.h", "10 * major + minor >= 89", "10 * major + minor >= 80"),
]
SUBJECT = Subject(
    "attention_int8_fp8",
    {
        "wrap, sink, tail": lambda: tests.test_int8_fp8_is_the_formula("wrap, sink, tail", False),
        "three parts": lambda: tests.test_int8_fp8_is_the_formula("three parts", False),
        "record": lambda: tests.test_a_record_is_the_list_in_8_bits(9),
        "device": tests.test_int8_fp8_is_refused_before_ada,
    },
    MUTANTS,
    compiled.cache_clear,
)
