"""Mutants of the quantisers."""

import test_cuda_quantise as tests
from cuda_fixture import compiled

from .framework import Subject, bug

FILE = "quantise.cu"
FIRST, REST = "__syncthreads();\n    for (int warp", "__syncthreads();\n    if (thread >= kColumns)"
MUTANTS = [
    bug("race", "no barrier after the ranges of a row", FILE, FIRST, "for (int warp"),
    bug("race", "no barrier after the ranges of columns", FILE, REST, "if (thread >= kColumns)"),
    bug("value", "rows side by side taken for granted", FILE, "x += row * stride", "x += row * width"),
    bug(
        "value", "columns of another chunk", FILE, "thread % 8 * kSkew + thread / 8", "thread / 8 * kSkew + thread % 8"
    ),
    bug("value", "earlier values forgotten", FILE, "held = fmaxf(held, range / limit);", "held = range / limit;"),
    bug(
        "value",
        "range of one warp",
        FILE,
        "for (int warp = 0; warp < kWarps; ++warp)",
        "for (int warp = 0; warp < 1; ++warp)",
    ),
    bug(
        "any",
        "a row of zeros divided by zero",
        FILE,
        "float range = kLeastRange;\n    for (std",
        "float range = 0;\n    for (std",
    ),
]
SUBJECT = Subject(
    "quantise",
    {
        "rows": lambda: tests.test_a_row_is_rounded_to_255_steps_of_its_own_range(tests.EVERY_SCHEDULE[2]),
        "scales": lambda: tests.test_scales_of_values_hold_all_that_they_have_seen(tests.EVERY_SCHEDULE[2]),
    },
    MUTANTS,
    compiled.cache_clear,
)
