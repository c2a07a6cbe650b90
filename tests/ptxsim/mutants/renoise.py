"""Mutants of the re-noise kernel."""

import test_cuda_renoise as tests
from cuda_fixture import compiled

from .framework import Subject, bug

FILE = "renoise.cu"
MUTANTS = [
    bug("bounds", "a quad where fewer are left", FILE, "count - first >= 4", "count - first >= 1"),
    bug(
        "bounds",
        "last elements read without a bound",
        FILE,
        "i < 4 && first + i < count; ++i) quad",
        "i < 4; ++i) quad",
    ),
    bug(
        "bounds",
        "last elements written without a bound",
        FILE,
        "i < 4 && first + i < count; ++i) out",
        "i < 4; ++i) out",
    ),
    bug("value", "one element read four times", FILE, "= x0[first + i]", "= x0[first]"),
    bug("alignment", "alignment taken for granted", FILE, "addresses % sizeof(Quad<T>) == 0", "addresses != 0"),
    bug("value", "counter of elements, not quads", FILE, "(first / 4), x)", "(first), x)"),
    bug("race", "stride of one block", FILE, "static_cast<std::int64_t>(gridDim.x)", "1"),
    bug(
        "value",
        "signal and noise exchanged",
        "csrc/renoise.h",
        "how.signal * x[i] + how.sigma",
        "how.sigma * x[i] + how.signal",
    ),
    bug("value", "the record's seed ignored", FILE, "how.noise.seed = pass->seed, ", ""),
    bug("value", "the record's unit ignored", FILE, ", how.noise.unit = pass->unit", ""),
    bug("race", "blocks that overlap", FILE, "4 * (kThreads * static_cast", "4 * (128 * static_cast"),
]
SUBJECT = Subject(
    "renoise",
    {
        "aligned": lambda: tests.test_renoise_equals_its_cpu_twin("bfloat16", 1021, 0),
        "misaligned": lambda: tests.test_renoise_equals_its_cpu_twin("float32", 1021, 1),
        "record": tests.test_renoise_by_a_record_in_device_memory,
        "several blocks": lambda: tests.test_renoise_does_not_depend_on_the_schedule(tests.EVERY_SCHEDULE[2]),
    },
    MUTANTS,
    compiled.cache_clear,
)
